"""One session of a job: launch, follow, stop, sum up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console

from jackpot.bus import Ledger
from jackpot.config import JobSpec
from jackpot.control_plane.launch.launcher import Launcher
from jackpot.control_plane.launch.launcher_choice import LauncherChoice
from jackpot.control_plane.observing.bus_observer import BusObserver
from jackpot.control_plane.observing.curves import draw_run
from jackpot.control_plane.observing.live_view import Snapshot, View, open_view
from jackpot.control_plane.observing.trackers import TrackerFeed
from jackpot.control_plane.sessions.scaling import Scaling
from jackpot.control_plane.sessions.summary import State, build_summary
from jackpot.errors import DeadlineError, JackpotError
from jackpot.storage.run_directory import RunDirectory
from jackpot.storage.run_records import StepRows, write_summary
from jackpot.telemetry.logs import redact_url

POLL_SECONDS = 0.1
VIEW_SECONDS = 0.5

Result = TypeVar("Result")


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
    launcher_choice: LauncherChoice = LauncherChoice(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Run a job in its directory until it has succeeded, failed or been stopped; the summary.

    Writes its summary and a plot of its curves. SIGINT and SIGTERM stop the job cleanly.

    Args:
        run: the run directory.
        job: the job as resolved.
        console: where the run is shown, unless ``view`` is given.
        resumed: whether this session continues an earlier one.
        view: shows the run instead of the console's own view.
        on_started: called once every process has been started.
        launcher_choice: where processes run; on this machine by default.

    Raises:
        JackpotError: another launcher holds the run, or its processes could not be started at all.
    """
    with run.locked():
        started = time.monotonic()
        with TrackerFeed(run, job):
            outcome = asyncio.run(_session(run, job, view or open_view(console), launcher_choice, on_started))
        summary = build_summary(
            run,
            state=outcome.state,
            wall_seconds=time.monotonic() - started,
            ledger=outcome.ledger,
            restarts=outcome.restarts,
            resumed=resumed,
            error=outcome.error,
        )
        write_summary(run.files, summary)
        try:
            draw_run(run, run.files.curves)
        except (ImportError, OSError) as error:  # training itself has succeeded
            console.print(f"{run.files.curves.name} could not be drawn: {error}", highlight=False, markup=False)
        return summary


async def _session(
    run: RunDirectory, job: JobSpec, view: View, launcher_choice: LauncherChoice, on_started: Callable[[], None] | None
) -> _Outcome:
    outcome = _Outcome()
    launcher = launcher_choice.launcher(run, job)
    observer = BusObserver(run.job_id, job.bus)
    try:
        with _stop_signals() as stop:
            try:
                if await _unless_stopped(_start(launcher, on_started), stop):
                    await _follow(run, job, launcher, observer, view, stop, outcome)
                else:
                    outcome.state = "stopped"
            finally:
                try:
                    outcome.ledger = await observer.ledger(launcher.redis_url)
                    await observer.close()
                finally:
                    await launcher.stop()
    except JackpotError as error:
        outcome.state, outcome.error = "failed", redact_url(str(error))
    finally:
        view.close()
    return outcome


async def _start(launcher: Launcher, on_started: Callable[[], None] | None) -> bool:
    await launcher.start()
    if on_started is not None:
        on_started()
    return True


async def _follow(
    run: RunDirectory,
    job: JobSpec,
    launcher: Launcher,
    observer: BusObserver,
    view: View,
    stop: asyncio.Event,
    outcome: _Outcome,
) -> None:
    """Supervise the processes until the job is over; fills in the outcome.

    Raises:
        DeadlineError: no first step within the start-up deadline and the batch deadline.
    """
    scaling = Scaling(run.path, launcher, job.rollout.replicas)
    steps, evaluations = StepRows(run.files.metrics), StepRows(run.files.evaluations)
    shown_at, started = 0.0, time.monotonic()
    timeout = job.run.startup_timeout_seconds + job.learner.batch_timeout_seconds
    while True:
        # Not after a stop request: Ctrl-C reaches the processes, too, and their exit is then no failure.
        await _unless_stopped(scaling.look(), stop)
        status = await _unless_stopped(launcher.check(), stop)
        if status is None:
            outcome.state = "stopped"
            return
        outcome.restarts = status.restarts
        over, now = status.finished or status.error is not None, time.monotonic()
        if over or now - shown_at >= VIEW_SECONDS:
            shown_at = now
            snapshot = Snapshot(
                job_id=run.job_id,
                total_steps=job.learner.steps,
                steps=steps.refresh(),
                evaluations=evaluations.refresh(),
                depths=None if over else await observer.depths(launcher.redis_url),
                ledger=None if over else await observer.ledger(launcher.redis_url),
                restarts=sum(status.restarts.values()),
                elapsed_seconds=now - started,
            )
            view.show(snapshot)
            started = now if status.waiting else started
            if not over and not snapshot.steps and now - started > timeout:
                raise DeadlineError("the first optimizer step", timeout, f"Look at the logs in {run.files.logs}.")
        if over:
            outcome.state, outcome.error = ("failed" if status.error else "succeeded"), status.error
            return
        await asyncio.sleep(POLL_SECONDS)


async def _unless_stopped(work: Coroutine[Any, Any, Result], stop: asyncio.Event) -> Result | None:
    """The work's result; None, with the work cancelled, as soon as a stop is requested."""
    if stop.is_set():
        work.close()
        return None
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for pending in (task, stopped):
            pending.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


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
