"""Local processes: an embedded server and one process per service, restarted when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jackpot.bus import TrajectoryBus
from jackpot.bus.server import EmbeddedServer
from jackpot.config import JobSpec
from jackpot.control_plane.launch.launcher import LaunchStatus
from jackpot.control_plane.launch.local_processes import ROLLOUT, LocalPlan, LocalProcess
from jackpot.control_plane.launch.operator_settings import VARIABLES, OperatorSettings
from jackpot.control_plane.launch.socket_directory import close_socket_directory, open_socket_directory
from jackpot.control_plane.launch.supervision import Deaths, told
from jackpot.errors import ConfigError, JackpotError
from jackpot.process.children import HASH_SEED, ending_with_us
from jackpot.process.scaling import forget_rollouts, withdraw_rollout
from jackpot.process.service_process import EVALUATOR
from jackpot.storage.job_storage import payload_place
from jackpot.storage.run_directory import RunDirectory, last_lines
from jackpot.telemetry.scrape_targets import forget_target, forget_targets

# A SIGTERM asks every process to finish its current unit of work; after this long it gets a SIGKILL.
GRACE_SECONDS = 6.0
LEFTOVERS_SECONDS = 15.0  # for processes of a killed session to notice that it is gone, and end
POLL_SECONDS = 0.02
NEVER_RESTARTED = {
    2: "cannot work with this configuration",
    70: "stopped the job",
    78: "cannot work with this configuration",
}
MUST_FINISH = ("learner", "orchestrator")
SERVER = "bus-server"


@dataclass(slots=True)
class _ServerWatch:
    """The embedded server under supervision."""

    deaths: Deaths
    started_at: float = 0.0
    restart_at: float | None = None


class LocalLauncher:
    """Runs a job's processes on this machine.

    Start it from the main thread: the kernel ends the processes when the thread that started them ends.

    Args:
        run: the run directory, held by the caller.
        job: the job as resolved.
        operator_settings: what the operator decides for all jobs; None reads it from this process's environment.

    Raises:
        ConfigError: an operator's setting is not valid.
    """

    def __init__(self, run: RunDirectory, job: JobSpec, operator_settings: OperatorSettings | None = None) -> None:
        self._run = run
        self._job = job
        self._operator_settings = operator_settings or OperatorSettings.from_env()
        external = job.bus.url or self._operator_settings.bus_url
        self._server = EmbeddedServer(run.files.bus_server) if external is None else None
        self._server_watch = _ServerWatch(Deaths(job.run.max_restarts))
        self._plan: LocalPlan | None = None
        self._processes: list[LocalProcess] = []
        self._leaving: list[LocalProcess] = []
        self._restarts: Counter[str] = Counter()
        self._bus_url: str | None = None

    @property
    def redis_url(self) -> str | None:
        """Where the job's bus is; None before it is started."""
        return self._bus_url

    async def start(self) -> None:
        """Start the server, then every process at once.

        Raises:
            JackpotError: the server could not be started, or a process of an earlier session does not end.
        """
        await end_leftovers(self._run.path)
        self._bus_url = await self._start_bus()
        self._plan = LocalPlan(
            job=self._job,
            job_id=self._run.job_id,
            run_dir=self._run.path,
            sockets=open_socket_directory(self._run.path),
            bus_url_of=self._bus_url_of,
            metrics_host=self._operator_settings.metrics_host,
        )
        self._processes = self._plan.processes()
        forget_targets(self._run.path)
        forget_rollouts(self._run.path)
        for process in self._processes:
            self._spawn(process)

    async def scale(self, rollout_replicas: int) -> None:
        """Start missing rollout replicas; ask surplus ones to finish and end."""
        assert self._plan is not None, "scaled before it was started"
        rollouts = [process for process in self._processes if process.service == ROLLOUT and not _evaluates(process)]
        for process in rollouts[rollout_replicas:]:
            self._processes.remove(process)
            self._leaving.append(process)
            if process.popen is not None and process.popen.poll() is None:
                process.popen.terminate()
            process.end_at = time.monotonic() + GRACE_SECONDS
        for index in range(len(rollouts), rollout_replicas):
            await self._wait_until_left(f"rollout-{index}")
            joined = self._plan.joining_rollout(index)
            self._processes.append(joined)
            self._spawn(joined)

    async def check(self) -> LaunchStatus:
        """Restart what died; say whether the job is finished or cannot go on."""
        self._check_leaving()
        error = await self._check_server()
        for process in self._processes:
            error = error or self._check_process(process)
        finished = all(p.finished for p in self._processes if p.service in MUST_FINISH)
        return LaunchStatus(finished=finished, error=error, restarts=dict(self._restarts))

    async def stop(self) -> None:
        """SIGTERM to all, SIGKILL to those that ignore it, the server last."""
        processes = (*self._processes, *self._leaving)
        running = [p.popen for p in processes if p.popen is not None and p.popen.poll() is None]
        for popen in running:
            popen.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(popen.poll() is None for popen in running) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        for popen in running:
            popen.kill()
            popen.wait()
        if self._server is not None:
            await self._server.stop(timeout_seconds=2.0)
        close_socket_directory(self._run.path)

    async def _start_bus(self) -> str:
        if self._server is not None:
            await self._server.start()
            self._server_watch.started_at = time.monotonic()
            return self._server.url
        # Without this check every process would wait for a server at a mistyped address.
        url, settings = self._bus_url_of("control-plane"), self._job.bus
        payloads = payload_place(self._job, self._run.job_id, self._run.path)
        bus = await TrajectoryBus.connect(url, self._run.job_id, settings, "launcher", payloads)
        await bus.close()
        return url

    def _bus_url_of(self, role: str) -> str:
        if self._server is not None:
            return self._server.url
        return self._job.bus.url or self._operator_settings.bus_url_of(role) or ""

    def _spawn(self, process: LocalProcess) -> None:
        threads = str(process.environment.threads)
        variables = HASH_SEED | {name: text for name, text in os.environ.items() if name not in VARIABLES}
        variables |= process.environment.to_env()
        variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        with self._run.log(process.name).open("ab") as log:
            process.popen = subprocess.Popen(
                # The services ask for this themselves, but only once Python is up.
                ending_with_us([sys.executable, "-m", f"jackpot.{process.service}"]),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        process.started_at = time.monotonic()
        process.restart_at = None

    def _check_process(self, process: LocalProcess) -> str | None:
        """Check one process; why the job must stop, or None."""
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
        delay = None if code in NEVER_RESTARTED else process.deaths.restart_delay(now - process.started_at)
        if delay is None:
            why = NEVER_RESTARTED.get(code, f"keeps dying ({told(code)})")
            return (
                f"{process.name} {why}; the end of {self._run.log(process.name)}:\n{self._run.last_lines(process.name)}"
            )
        self._restarts[process.name] += 1
        process.restart_at = now + delay
        return None

    def _check_leaving(self) -> None:
        """Kill processes that were asked to leave and stay, and clean up after those that left."""
        for process in list(self._leaving):
            popen = process.popen
            if popen is not None and popen.poll() is None:
                if time.monotonic() > process.end_at:
                    popen.kill()
                continue
            self._leaving.remove(process)
            withdraw_rollout(self._run.path, process.environment.instance)
            forget_target(self._run.path, process.name)

    async def _wait_until_left(self, name: str) -> None:
        """A new replica may reuse the name and socket of one that is gone, but not of one that is still leaving."""
        while any(process.name == name for process in self._leaving):
            self._check_leaving()
            await asyncio.sleep(POLL_SECONDS)

    async def _check_server(self) -> str | None:
        """Check the embedded server; why the job must stop, or None."""
        server, watch, now = self._server, self._server_watch, time.monotonic()
        if server is None:
            return None
        if watch.restart_at is None:
            code = server.poll()
            return None if code is None else self._plan_server_restart(server, told(code))
        if now < watch.restart_at:
            return None
        try:
            await server.start()
        except ConfigError as error:
            return str(error)  # the binary is gone
        except JackpotError as error:
            return self._plan_server_restart(server, str(error))
        watch.started_at, watch.restart_at = time.monotonic(), None
        return None

    def _plan_server_restart(self, server: EmbeddedServer, why: str) -> str | None:
        watch, now = self._server_watch, time.monotonic()
        delay = watch.deaths.restart_delay(now - watch.started_at)
        if delay is None:
            return f"the embedded server keeps dying ({why}); the end of {server.log}:\n{last_lines(server.log)}"
        self._restarts[SERVER] += 1
        watch.restart_at = now + delay
        return None


def _evaluates(process: LocalProcess) -> bool:
    return process.environment.instance == EVALUATOR


async def end_leftovers(run_dir: Path, timeout_seconds: float = LEFTOVERS_SECONDS) -> None:
    """Wait for processes of an earlier session whose launcher was killed; kill those that stay.

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

    async def alive_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
        deadline = time.monotonic() + seconds
        while (alive := psutil.wait_procs(processes, timeout=0)[1]) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        return alive

    leftovers = await alive_after([process for process in psutil.process_iter() if mine(process)], timeout_seconds)
    for process in leftovers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if alive := await alive_after(leftovers, 5.0):
        pids = ", ".join(str(process.pid) for process in alive)
        raise JackpotError(f"processes of an earlier session of {run_dir} do not end: {pids}; end them first")
