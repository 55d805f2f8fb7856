"""Local processes: an embedded server and one process per service, restarted when they die."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.control_plane.launcher import LaunchStatus
from jackpot.control_plane.run_directory import RunDirectory
from jackpot.errors import JackpotError
from jackpot.runtime.bus.server import EmbeddedServer

# A SIGTERM asks every process to finish its current unit of work; after this long it is ended.
GRACE_SECONDS = 6.0
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# A process that stayed up this long has recovered: its earlier deaths no longer count against it.
STABLE_SECONDS = 120.0
NEVER_RESTARTED = {
    2: "cannot work with this configuration",
    70: "stopped the job",
    78: "cannot work with this configuration",
}
MUST_FINISH = ("learner", "orchestrator")
SERVER = "bus-server"


@dataclass(slots=True)
class _Process:
    """One supervised process."""

    name: str
    service: str
    environment: ServiceEnvironment
    popen: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    recent_deaths: int = 0
    finished: bool = False


@dataclass(slots=True)
class _Restarts:
    by_process: dict[str, int] = field(default_factory=dict)

    def count(self, name: str) -> None:
        self.by_process[name] = self.by_process.get(name, 0) + 1


class LocalLauncher:
    """Runs a job's processes on this machine.

    Start it from the main thread: the kernel ends the processes when the thread that started them ends.

    Args:
        run: the run directory, held by the caller.
        job: the job as resolved.
    """

    def __init__(self, run: RunDirectory, job: JobSpec) -> None:
        self._run = run
        self._job = job
        self._server = EmbeddedServer(run.path / "redis") if job.bus.url is None else None
        self._processes: list[_Process] = []
        self._restarts = _Restarts()
        self._socket_dir: Path | None = None
        self._server_deaths = 0

    @property
    def redis_url(self) -> str:
        """Where the job's bus is; known once started."""
        return self._job.bus.url or (self._server.url if self._server else "")

    async def start(self) -> None:
        """Start the server, then every process at once.

        Raises:
            JackpotError: the server could not be started, or a process of an earlier session does not end.
        """
        await end_leftovers(self._run.path)
        if self._server is not None:
            await self._server.start()
        # Unix sockets: no port to lose a race for, and nobody but this user can connect.
        self._socket_dir = Path(tempfile.mkdtemp(prefix="jackpot-"))
        self._processes = self._plan(self._socket_dir)
        targets = [{"targets": [p.environment.metrics_address], "labels": {"process": p.name}} for p in self._processes]
        (self._run.path / "prometheus_targets.json").write_text(json.dumps(targets, indent=2), encoding="utf-8")
        for process in self._processes:
            self._spawn(process)

    async def check(self) -> LaunchStatus:
        """Restart what died; say whether the job is finished or cannot go on."""
        error = await self._check_server()
        for process in self._processes:
            error = error or self._check_process(process)
        finished = all(p.finished for p in self._processes if p.service in MUST_FINISH)
        return LaunchStatus(finished=finished, error=error, restarts=dict(self._restarts.by_process))

    async def stop(self) -> None:
        """SIGTERM to all, SIGKILL to who ignores it, the server last."""
        running = [p.popen for p in self._processes if p.popen is not None and p.popen.poll() is None]
        for popen in running:
            popen.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(popen.poll() is None for popen in running) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for popen in running:
            popen.kill()
            popen.wait()
        if self._server is not None:
            await self._server.stop(timeout_seconds=2.0)
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _plan(self, sockets: Path) -> list[_Process]:
        job = self._job
        rollouts = [f"unix:{sockets}/rollout-{index}.sock" for index in range(job.rollout.replicas)]
        evaluator = f"unix:{sockets}/evaluator.sock"
        plan: list[tuple[str, str, Mapping[str, object]]] = [
            ("learner", "learner", {}),
            *(
                (f"rollout-{i}", "rollout", {"instance": str(i), "role": job.rollout_role, "listen": address})
                for i, address in enumerate(rollouts)
            ),
            ("evaluator", "rollout", {"instance": "evaluator", "role": "policy", "listen": evaluator}),
            *(
                (f"scorer-{i}", "scorer", {"instance": str(i), "listen": f"unix:{sockets}/scorer-{i}.sock"})
                for i in range(job.scorer.replicas)
            ),
            (
                "orchestrator",
                "orchestrator",
                {"rollout_addresses": tuple(rollouts), "evaluator_address": evaluator},
            ),
        ]
        threads = job.run.threads_per_process or max(1, (os.cpu_count() or 1) // (len(plan) - 1))
        common: dict[str, object] = {
            "run_dir": self._run.path,
            "job_id": self._run.job_id,
            "redis_url": self.redis_url,
            "threads": threads,
        }
        ports = free_ports(len(plan))
        return [
            _Process(
                name, service, ServiceEnvironment.model_validate({**common, **settings} | {"metrics_address": address})
            )
            for (name, service, settings), address in zip(plan, ports, strict=True)
        ]

    def _spawn(self, process: _Process) -> None:
        threads = str(process.environment.threads)
        variables = os.environ | process.environment.to_env()
        variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        with self._run.log(process.name).open("ab") as log:
            process.popen = subprocess.Popen(
                [sys.executable, "-m", f"jackpot.{process.service}"],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        process.started_at = time.monotonic()
        process.restart_at = None

    def _check_process(self, process: _Process) -> str | None:
        """Look at one process; why the job must stop, or None."""
        now = time.monotonic()
        if process.finished:
            return None
        if process.restart_at is not None:
            if now >= process.restart_at:
                self._spawn(process)
            return None
        code = None if process.popen is None else process.popen.poll()
        if code is None:
            return None
        if code == 0 and process.service in MUST_FINISH:
            process.finished = True
            return None
        if now - process.started_at > STABLE_SECONDS:
            process.recent_deaths = 0
        process.recent_deaths += 1
        if code in NEVER_RESTARTED or process.recent_deaths > self._job.run.max_restarts:
            why = NEVER_RESTARTED.get(code, f"keeps dying ({_told(code)})")
            return (
                f"{process.name} {why}; the end of {self._run.log(process.name)}:\n{self._run.last_lines(process.name)}"
            )
        self._restarts.count(process.name)
        process.restart_at = now + BACKOFF_SECONDS[min(process.recent_deaths, len(BACKOFF_SECONDS)) - 1]
        return None

    async def _check_server(self) -> str | None:
        if self._server is None or self._server.poll() is None:
            return None
        self._server_deaths += 1
        if self._server_deaths > self._job.run.max_restarts:
            return f"the embedded server keeps dying; see {self._run.path / 'redis' / 'server.log'}"
        self._restarts.count(SERVER)
        try:
            await self._server.start()
        except JackpotError as error:
            return f"the embedded server died and cannot be started again: {error}"
        return None


def free_ports(count: int) -> list[str]:
    """Loopback addresses with ports that nobody uses right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    finally:
        for one in sockets:
            one.close()


async def end_leftovers(run_dir: Path, timeout_seconds: float = 15.0) -> None:
    """Wait for processes of an earlier session of this run, whose launcher was killed; end those that stay.

    Raises:
        JackpotError: one of them cannot be ended.
    """
    import psutil

    def mine(process: psutil.Process) -> bool:
        try:
            variables = process.environ()
        except psutil.Error:
            return False
        return variables.get("JACKPOT_RUN_DIR") == str(run_dir) and process.pid != os.getpid()

    leftovers = [process for process in psutil.process_iter() if mine(process)]
    _, alive = await asyncio.to_thread(psutil.wait_procs, leftovers, timeout_seconds)
    for process in alive:
        process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, alive, 5.0)
    if alive:
        pids = ", ".join(str(process.pid) for process in alive)
        raise JackpotError(f"processes of an earlier session of {run_dir} do not end: {pids}; end them first")


def _told(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
