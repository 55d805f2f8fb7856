import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.process.service_process import run_service

pytestmark = pytest.mark.timeout(TEST_SECONDS)

JOB = '{"policy": {"model": "m"}, "actor": "policy", "task": {"name": "complement"}}'

SERVICE = """
import asyncio, sys
from jackpot.errors import ConfigError, EngineError
from jackpot.process.service_process import announce_ready, run_service

async def until_stopped(environment, job, stop):
    announce_ready(job=job.task.name, instance=environment.instance)
    await stop.wait()
    return 0

async def stuck(environment, job, stop):
    announce_ready()
    await asyncio.sleep(600)

async def done(environment, job, stop):
    return int(environment.instance)

async def engine_fails(environment, job, stop):
    raise EngineError("no engine at redis://u:s3cret@h:1")

async def misconfigured(environment, job, stop):
    raise ConfigError("rollout.engine", "vllm", "is not installed", "Install it.")

async def breaks(environment, job, stop):
    raise ZeroDivisionError("surprise")

if __name__ == "__main__":
    run_service("example", globals()[sys.argv[1]])
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "job.json").write_text(JOB)
    (tmp_path / "service.py").write_text(SERVICE)
    return tmp_path


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(main: str, **variables: str) -> subprocess.Popen[str]:
        environ = {name: text for name, text in os.environ.items() if not name.startswith("JACKPOT_")}
        settings = {"JACKPOT_RUN_DIR": str(run_dir), "JACKPOT_JOB_ID": "job-1", **variables}
        process = subprocess.Popen(
            [sys.executable, str(run_dir / "service.py"), main],
            env=environ | settings,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE_SECONDS)


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"the process ended without saying {text!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_service_cleanly(
    start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = start("until_stopped", JACKPOT_INSTANCE="3")
    assert "example/3 jackpot.process.service_process ready job=complement instance=3" in wait_for_line(
        process, " ready "
    )
    process.send_signal(number)
    _, rest = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert f"stopping on {number.name}" in rest
    assert rest.splitlines()[-1].endswith("finished exit_code=0")


def test_the_exit_code_is_what_main_returns(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("done", JACKPOT_INSTANCE="7")
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("main", "variables", "code", "message"),
    [
        ("engine_fails", {}, 1, "error: no engine at redis://u:***@h:1"),
        ("misconfigured", {}, 2, "error: rollout.engine = 'vllm': is not installed. Install it."),
        ("done", {"JACKPOT_JOB_ID": "No Id"}, 2, "error: JACKPOT_JOB_ID = 'No Id': string should match"),
        ("done", {"JACKPOT_RUN_DIR": "/nonexistent"}, 2, "error: JACKPOT_RUN_DIR = '/nonexistent': has no job.json"),
        ("done", {"JACKPOT_METRICS_ADDRESS": "here"}, 2, "error: JACKPOT_METRICS_ADDRESS = 'here': is not host:port"),
    ],
)
def test_known_errors_are_one_line_and_an_exit_code(
    start: Callable[..., subprocess.Popen[str]], main: str, variables: dict[str, str], code: int, message: str
) -> None:
    process = start(main, **variables)
    _, text = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code
    assert [line for line in text.splitlines() if line.startswith(message)], text
    assert "Traceback" not in text
    assert "s3cret" not in text


def test_a_job_that_cannot_work_is_named_before_main_runs(
    start: Callable[..., subprocess.Popen[str]], run_dir: Path
) -> None:
    (run_dir / "job.json").write_text(JOB.replace('"actor": "policy"', '"actor": "police"'))
    process = start("breaks")
    _, text = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert text.startswith("error: actor = 'police'")


def test_unexpected_errors_leave_a_traceback_and_exit_1(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("breaks")
    _, text = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert "CRITICAL example/0 jackpot.process.service_process stopped by an unexpected error" in text
    assert "ZeroDivisionError: surprise" in text


def test_metrics_are_served_while_the_service_runs(start: Callable[..., subprocess.Popen[str]], free_port: int) -> None:
    process = start("until_stopped", JACKPOT_METRICS_ADDRESS=f"127.0.0.1:{free_port}")
    wait_for_line(process, " ready ")
    with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=PATIENCE_SECONDS) as response:
        assert b"python_info" in response.read()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_service_stops_when_the_one_that_started_it_is_killed(run_dir: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, 'service.py', 'until_stopped'], stderr=subprocess.PIPE, text=True)\n"
        "for line in child.stderr:\n"
        "    if ' ready ' in line:\n"
        "        break\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environ = os.environ | {"JACKPOT_RUN_DIR": str(run_dir), "JACKPOT_JOB_ID": "job-1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=run_dir, env=environ, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=PATIENCE_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while is_running(child):
        assert time.monotonic() < deadline, "the orphan did not stop"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        # A zombie that nobody reaps has stopped, too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_settings_are_read_before_main_is_called(run_dir: Path) -> None:
    async def main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
        raise AssertionError("called with settings that cannot work")

    with pytest.raises(SystemExit) as caught:
        run_service("example", main, {"JACKPOT_RUN_DIR": str(run_dir)})
    assert caught.value.code == 2
