"""A whole job as on a cluster: mutual TLS between the services, Redis over TLS, a user per role."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from job_world import write_job
from patience import PATIENCE_SECONDS, TEST_SECONDS
from secured_redis import SecuredRedis, secured_redis

from jackpot.config import load_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.control_plane.sessions.preparation import prepare_job
from jackpot.storage.run_directory import RunDirectory, new_job_id

pytestmark = pytest.mark.timeout(TEST_SECONDS)

PEER = "jackpot-worker"


def test_a_job_trains_with_tls_everywhere(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    authority = Authority()
    tls_dir = authority.issue(tmp_path / "tls", PEER)
    job = prepare_job(load_job(write_job(tmp_path, make_model, steps=4)))
    run = RunDirectory.create(tmp_path / "run", new_job_id("tls"), job)
    ports = iter(free_ports(6))
    rollout, evaluator, scorer = (f"localhost:{next(ports)}" for _ in range(3))
    health = [f"localhost:{next(ports)}" for _ in range(3)]
    common = {"run_dir": run.path, "job_id": run.job_id, "tls_dir": str(tls_dir), "tls_peer_name": PEER, "threads": 1}
    with secured_redis(tmp_path / "redis", authority) as redis, ExitStack() as stack:
        url = redis.url
        processes = {
            name: stack.enter_context(started(name, service, tmp_path, **common, **settings))
            for name, service, settings in (
                ("learner", "learner", {"redis_url": url("learner")}),
                ("rollout", "rollout", {"listen": rollout, "health_listen": health[0]}),
                ("evaluator", "rollout", {"listen": evaluator, "health_listen": health[1], "role": "policy"}),
                ("scorer", "scorer", {"redis_url": url("scorer"), "listen": scorer, "health_listen": health[2]}),
                (
                    "orchestrator",
                    "orchestrator",
                    {
                        "redis_url": url("orchestrator"),
                        "rollout_addresses": (rollout,),
                        "evaluator_address": evaluator,
                    },
                ),
            )
        }
        wait_until_done(processes, tmp_path)
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert redis.refusals() == []
        check_health(health)
        check_plaintext_is_refused(rollout, scorer)
        check_secrets(redis, run.path, tmp_path)


@contextmanager
def started(name: str, service: str, directory: Path, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """A service, by its variables alone."""
    variables = ServiceEnvironment.model_validate(settings).to_env() | {"OMP_NUM_THREADS": "1"}
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"jackpot.{service}"], env=os.environ | variables, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def wait_until_done(processes: dict[str, subprocess.Popen[bytes]], directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(processes[name].poll() is None for name in ("learner", "orchestrator")):
        ended = {name: process.returncode for name, process in processes.items() if process.poll() not in (None, 0)}
        in_time = time.monotonic() < deadline
        assert not ended and in_time, f"{ended or 'not done in time'}\n" + "".join(
            f"== {name}\n{(directory / f'{name}.log').read_text()[-2000:]}\n" for name in processes
        )
        time.sleep(0.1)
    assert [processes[name].returncode for name in ("learner", "orchestrator")] == [0, 0]


def check_health(addresses: list[str]) -> None:
    """Probes that speak no TLS are answered."""
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service="readiness")
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_SECONDS).status
        assert status == health_pb2.HealthCheckResponse.SERVING


def check_plaintext_is_refused(*addresses: str) -> None:
    for address in addresses:
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def check_secrets(redis: SecuredRedis, run_dir: Path, directory: Path) -> None:
    """No password in a log or in the run directory."""
    for path in (*run_dir.rglob("*.json*"), *directory.glob("*.log")):
        text = path.read_text(errors="replace")
        assert not [user for user, password in redis.passwords.items() if password in text], path


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
