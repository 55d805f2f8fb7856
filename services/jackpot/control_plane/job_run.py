"""One session of a job: launch, follow, stop, sum up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from jackpot.config import JobSpec
from jackpot.control_plane.bus_observer import BusObserver
from jackpot.control_plane.curves import draw_run
from jackpot.control_plane.launcher import Launcher, LaunchStatus
from jackpot.control_plane.live_view import Snapshot, View, open_view
from jackpot.control_plane.local_launcher import LocalLauncher
from jackpot.control_plane.run_directory import RunDirectory
from jackpot.control_plane.summary import State, build_summary, write_summary
from jackpot.errors import DeadlineError, JackpotError
from jackpot.runtime.bus import BusDepths, Ledger

POLL_SECONDS = 0.1
VIEW_SECONDS = 0.5


@dataclass(slots=True)
class _Outcome:
    state: State = "failed"
    error: str | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    ledger: Ledger | None = None


def run_job(
    run: RunDirectory,
    job: JobSpec,
    console: Console,
    *,
    resumed: bool,
    view: View | None = None,
    on_started: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a job in its directory until it has succeeded, failed or been stopped; the summary.

    Leaves ``summary.json`` and ``curves.png``. SIGINT and SIGTERM stop the job cleanly.

    Args:
        run: the run directory.
        job: the job as resolved.
        console: where the run is shown, unless ``view`` is given.
        resumed: whether this session continues an earlier one.
        view: shows the run instead of the console's own view.
        on_started: called once every process has been started.

    Raises:
        JackpotError: another launcher holds the run, or its processes could not be started at all.
    """
    with run.locked():
        started = time.monotonic()
        outcome = asyncio.run(_session(run, job, view or open_view(console), started, on_started))
        summary = build_summary(
            run,
            state=outcome.state,
            wall_seconds=time.monotonic() - started,
            ledger=outcome.ledger,
            restarts=outcome.restarts,
            resumed=resumed,
            error=outcome.error,
        )
        write_summary(run, summary)
        draw_run(run, run.path / "curves.png")
        return summary


async def _session(
    run: RunDirectory, job: JobSpec, view: View, started: float, on_started: Callable[[], None] | None
) -> _Outcome:
    outcome = _Outcome()
    launcher: Launcher = LocalLauncher(run, job)
    observer = BusObserver(run.job_id, job.bus, run.path / "payloads")
    try:
        with _stop_signals() as stop:
            try:
                await launcher.start()
                if on_started is not None:
                    on_started()
                await _follow(run, job, launcher, observer, view, stop, started, outcome)
            finally:
                outcome.ledger = await observer.ledger(launcher.redis_url)
                await observer.close()
                await launcher.stop()
    except JackpotError as error:
        outcome.state, outcome.error = "failed", str(error)
    finally:
        view.close()
    return outcome


async def _follow(
    run: RunDirectory,
    job: JobSpec,
    launcher: Launcher,
    observer: BusObserver,
    view: View,
    stop: asyncio.Event,
    started: float,
    outcome: _Outcome,
) -> None:
    """Look after the processes until the job is over; fills in the outcome.

    Raises:
        DeadlineError: no first step within the start-up deadline and the batch deadline.
    """
    shown_at = 0.0
    timeout = job.run.startup_timeout_seconds + job.learner.batch_timeout_seconds
    while True:
        status = await launcher.check()
        outcome.restarts = status.restarts
        now = time.monotonic()
        if now - shown_at >= VIEW_SECONDS or _is_over(status, stop):
            shown_at = now
            depths = None if _is_over(status, stop) else await observer.depths(launcher.redis_url)
            snapshot = _snapshot(run, job, depths, status, now - started)
            view.show(snapshot)
            if not snapshot.steps and now - started > timeout:
                raise DeadlineError("the first optimizer step", timeout, f"Look at the logs in {run.path / 'logs'}.")
        if _is_over(status, stop):
            break
        await asyncio.sleep(POLL_SECONDS)
    if status.error is not None:
        outcome.state, outcome.error = "failed", status.error
    else:
        outcome.state = "succeeded" if status.finished else "stopped"


def _is_over(status: LaunchStatus, stop: asyncio.Event) -> bool:
    return status.finished or status.error is not None or stop.is_set()


def _snapshot(
    run: RunDirectory, job: JobSpec, depths: BusDepths | None, status: LaunchStatus, elapsed_seconds: float
) -> Snapshot:
    return Snapshot(
        job_id=run.job_id,
        total_steps=job.learner.steps,
        steps=run.steps,
        evaluations=run.evaluations,
        depths=depths,
        restarts=sum(status.restarts.values()),
        elapsed_seconds=elapsed_seconds,
    )


@contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
