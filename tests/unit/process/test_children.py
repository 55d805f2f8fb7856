"""Children that end with the process that started them: what the command gets, and when it is not run at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jackpot.process import children
from jackpot.process.children import ending_with_us

# What a process may see of how it was started.
TELL = """
import json, os, signal, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "pid": os.getpid(), "session": os.getsid(0), "arguments": sys.argv[1:], "mine": os.environ["MINE"],
    "inherited": os.read(int(sys.argv[1]), 100).decode(), "stdin": sys.stdin.read(), "ignored": status["SigIgn"],
    "blocked": status["SigBlk"], "isolated": sys.flags.isolated, "path": os.environ["PYTHONPATH"],
}))
"""
# A process that ends at once, without a word, after it started a child; the child tells that it runs.
PARENT = """
import os, signal, subprocess, sys
from jackpot.process.children import ending_with_us
script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
subprocess.Popen(ending_with_us([sys.executable, "-c", script]), start_new_session=True)
signal.pause()
"""
BUSY_GRPC = """
import os, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from jackpot.process.children import ending_with_us

server = grpc.server(ThreadPoolExecutor(4))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{port}"))

def call():
    while True:
        stub.Check(health_pb2.HealthCheckRequest())

for _ in range(4):
    threading.Thread(target=call, daemon=True).start()
print([subprocess.run(ending_with_us(["true"])).returncode for _ in range(8)], flush=True)
os._exit(0)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")


@linux
def test_the_command_gets_what_it_would_get_if_it_were_started_directly() -> None:
    told = []
    for command in ([sys.executable, "-c", TELL], ending_with_us([sys.executable, "-c", TELL])):
        reading, writing = os.pipe()
        os.write(writing, b"through the pipe")
        os.close(writing)
        process = subprocess.Popen(
            [*command, str(reading), "", "ä b", "-c"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[reading],
            env=os.environ | {"MINE": "so", "PYTHONPATH": "/nowhere"},
            start_new_session=True,
        )
        os.close(reading)
        answer = json.loads(process.communicate(b"into stdin")[0])
        assert answer.pop("pid") == answer.pop("session") == process.pid
        assert answer.pop("arguments") == [str(reading), "", "ä b", "-c"]
        told.append(answer)
    assert told[1] == told[0]
    assert (told[1]["inherited"], told[1]["stdin"], told[1]["mine"]) == ("through the pipe", "into stdin", "so")


@linux
def test_no_signal_is_ignored_that_a_command_expects_to_end_it() -> None:
    ignored = []
    for command in (["cat", "/proc/self/status"], ending_with_us(["cat", "/proc/self/status"])):
        status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ignored.append([line for line in status.splitlines() if line.startswith("SigIgn")])
    assert ignored[1] == ignored[0]


@linux
def test_a_child_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            assert child.ppid() == parent.pid
            parent.kill()
            child.wait(timeout=10)
        finally:
            parent.kill()
            if child.is_running():
                child.kill()


@linux
def test_a_child_whose_parent_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    command = ending_with_us(["touch", tmp_path / "begun"])
    assert command[4] == str(os.getpid())
    command[4] = str(os.getppid())  # one that is not its parent, as if ours had ended meanwhile
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "begun").exists()


@linux
def test_a_command_that_is_not_there_is_told() -> None:
    done = subprocess.run(ending_with_us(["/nowhere/server"]), capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert done.stderr.startswith("error: /nowhere/server cannot be executed: [Errno 2]")
    assert len(done.stderr.splitlines()) == 1


@linux
def test_children_start_while_grpc_is_busy() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY_GRPC], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == str([0] * 8), done.stderr
    assert done.stderr == ""  # gRPC complains of each fork that it sees


def test_elsewhere_the_command_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children.sys, "platform", "darwin")
    assert ending_with_us([Path("/bin/server"), "config"]) == ["/bin/server", "config"]
