"""A control plane for tests: inside the test without jobs that run, or as the process that users start."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from job_world import JACKPOT, write_job
from patience import PATIENCE_SECONDS

from jackpot.client import Client
from jackpot.control_plane.api.app import create_app
from jackpot.control_plane.backend import Backend
from jackpot.control_plane.jobs.scheduler import SchedulingPolicy
from jackpot.control_plane.settings import ServeSettings

TINY_JOB: dict[str, Any] = {
    "name": "tiny",
    "policy": {"model": "builtin:complement/policy"},
    "actor": {"model": "builtin:complement/actor"},
    "task": {"name": "complement"},
}


@asynccontextmanager
async def api(data_dir: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Backend]]:
    """The application inside this process, on a real store; jobs are queued and never start."""
    settings = {"policy": SchedulingPolicy(slots=0), "requests_per_second": 0.0, **settings}
    backend = Backend(ServeSettings(data_dir=data_dir, **settings))
    app = create_app(backend)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with backend.open(), httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8700") as client:
        yield client, backend


class Server:
    """A `jackpot serve` process."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.data_dir = data_dir
        self._options = options
        self._port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it is ready."""
        with (self.data_dir.parent / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*JACKPOT, "serve", "--data-dir", str(self.data_dir), "--port", str(self._port), *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> None:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE_SECONDS)[0], (
            "the server does not say where it listens"
        )
        line = self.process.stdout.readline()
        assert line.startswith("jackpot serves at http"), line + self.log()
        self.url = line.split()[3]
        self._port = int(self.url.rpartition(":")[2])
        self.wait_until(self._ready, "the server to be ready")

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=PATIENCE_SECONDS).status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> Client:
        """A client of it."""
        return Client(self.url)

    def kill(self) -> None:
        """kill -9 of the server alone: neither its store nor its jobs are told."""
        self.process.kill()
        self.process.communicate()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; fails loudly."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}\n{self.log()}"
            time.sleep(0.05)

    def log(self) -> str:
        """What it has logged."""
        logs = [self.data_dir.parent / "serve.log", *self.data_dir.glob("runs/*/logs/*.log")]
        return "".join(f"== {path.name}\n{path.read_text()[-1500:]}\n" for path in logs)

    def sessions(self) -> list[psutil.Process]:
        """The processes that run this server's jobs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "jackpot.control_plane.sessions.run_child" in command and str(self.data_dir) in " ".join(command):
                    found.append(process)
        return found

    def close(self) -> None:
        """Stop it, and the jobs that it leaves behind."""
        try:
            if self.process.returncode is None:  # not killed by the test already
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(PATIENCE_SECONDS)
        finally:
            if self.process.stdout is not None and not self.process.stdout.closed:
                self.process.kill()
                self.process.communicate()
            for process in self.sessions():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@contextmanager
def standing_still(session: psutil.Process) -> Iterator[None]:
    """A session's job trains no step meanwhile: its learner is stopped. So it cannot end before the test is ready."""
    (learner,) = [child for child in session.children(recursive=True) if "jackpot.learner" in child.cmdline()]
    learner.suspend()
    try:
        yield
    finally:
        learner.resume()


@contextmanager
def running_server(data_dir: Path, *options: str) -> Iterator[Server]:
    """A `jackpot serve` process."""
    data_dir.mkdir(parents=True, exist_ok=True)
    server = Server(data_dir, *options)
    try:
        yield server
    finally:
        server.close()


def tiny_job(
    directory: Path, make_model: Callable[..., Path], *, scorer: bool = False, **learner: Any
) -> dict[str, Any]:
    """A job on two random models that trains in seconds. Most of them are its processes' start: without a scorer, the
    learner scores, and there is one less."""
    job: dict[str, Any] = yaml.safe_load(write_job(directory, make_model, **learner).read_text())
    if not scorer:
        job["scorer"] = {"reuse_reference": True}
    return job


def jackpot(*arguments: str, url: str, timeout: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a `jackpot` command against a server."""
    return subprocess.run(
        [*JACKPOT, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"JACKPOT_URL": url, "PYTHONUNBUFFERED": "1"},
    )
