"""Gives jobs their slots, follows their sessions, and records how they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jackpot.config import parse_job
from jackpot.control_plane.jobs.job_store import JobStore
from jackpot.control_plane.jobs.records import JobRecord, Progress, is_job_id, now
from jackpot.control_plane.jobs.states import JobState
from jackpot.control_plane.launch.launcher_choice import LauncherChoice
from jackpot.control_plane.sessions.scaling import request_scale
from jackpot.control_plane.sessions.session_process import Session
from jackpot.errors import JackpotError, JobNotFoundError, JobStateError
from jackpot.storage.job_storage import objects_of_run
from jackpot.storage.json_files import JsonLinesReader
from jackpot.storage.run_directory import RunDirectory, RunFiles

LOG = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
LEAD_SECONDS = 15.0  # a leader silent for longer loses the lead to another server
TROUBLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """How many jobs run at once, and what happens to a job whose processes are lost."""

    slots: int = 1  # jobs that hold processes at the same time
    max_losses: int = 3  # how often a job whose processes vanished is resumed before it counts as failed
    stop_seconds: float = 45.0  # how long a cancelled job may take to stop before it is killed


class _Watch:
    """A job that holds a slot: its session, and how far it has come."""

    def __init__(self, session: Session, run_dir: Path) -> None:
        self.session = session
        self._steps = JsonLinesReader(RunFiles(run_dir).metrics)
        self._evaluations = JsonLinesReader(RunFiles(run_dir).evaluations)
        self.progress = Progress()

    def look(self) -> Progress:
        """Read what the job has written since the last look."""
        update: dict[str, object] = {}
        for row in self._steps.rows():
            update |= {"step": row.get("step"), "reward": row.get("reward/mean")}
            update |= {"acceptance_rate": row.get("rollout_corr/obrs_acceptance_rate")}
        for row in self._evaluations.rows():
            update |= {name: row.get(name) for name in ("policy_accuracy", "accuracy_stderr")}
        if update:
            self.progress = self.progress.model_copy(update=update)
        return self.progress


class Scheduler:
    """The only writer of transitions that nobody requested; requests come in through :meth:`cancel` and :meth:`resume`.

    All its state is in the store and in the run directories, so that another scheduler can take over at any point.
    Where several servers share a store and a volume, one leads, and the others only follow the jobs' progress. Should
    two servers both believe that they lead, the store's check of each transition and the lock on the run directory
    keep them from acting on the same job.

    Args:
        store: the jobs.
        runs: parent of the run directories, each named by its job's id.
        policy: slots and losses.
        launcher_choice: where jobs run.
    """

    def __init__(self, store: JobStore, runs: Path, policy: SchedulingPolicy, launcher_choice: LauncherChoice) -> None:
        self._store = store
        self._runs = runs
        self._policy = policy
        self._launcher_choice = launcher_choice
        self._server = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._watched: dict[str, _Watch] = {}
        self._wake = asyncio.Event()
        self._stopped = False
        self._looked_at = time.monotonic()

    async def run(self) -> None:
        """Run until :meth:`stop`. Jobs keep running after it; the next scheduler finds them."""
        while not self._stopped:
            try:
                if await self._store.lead(self._server, LEAD_SECONDS):
                    await self.look()
                else:
                    await self._watch_only()
                pause = LOOK_SECONDS
                self._looked_at = time.monotonic()
            except (JackpotError, OSError) as error:
                LOG.error("a round of the scheduler failed: %s", error)
                pause = TROUBLE_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)
            self._wake.clear()
        with contextlib.suppress(JackpotError):
            await self._store.lead(self._server, 0)  # so that the next need not wait

    def stop(self) -> None:
        """End :meth:`run` after its current round. It is not cancelled: a cancelled round would be left half done, and
        redis-py's retries may mistake the cancellation for a lost connection and go on."""
        self._stopped = True
        self._wake.set()

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last completed round."""
        return time.monotonic() - self._looked_at

    @property
    def progress(self) -> Mapping[str, Progress]:
        """Progress of the jobs that hold a slot; for all others it is in their records."""
        return {job_id: watch.progress for job_id, watch in self._watched.items()}

    def run_dir(self, job_id: str) -> Path:
        """The run directory of a job.

        Raises:
            JobNotFoundError: the text cannot be a job's id.
        """
        if not is_job_id(job_id):
            raise JobNotFoundError(f"{job_id[:80]!r} is not a job's id")
        return self._runs / job_id

    def wake(self) -> None:
        """Start the next round at once: there is a new job."""
        self._wake.set()

    async def cancel(self, job_id: str, reason: str) -> JobRecord:
        """Stop a job. One that is stopping or cancelled already stays as it is.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: it has ended.
        """
        while True:
            record = await self._store.get(job_id)
            if record.state in (JobState.STOPPING, JobState.CANCELLED):
                return record
            if record.state.finished:
                raise JobStateError(f"{job_id} has {record.state} already; there is nothing to cancel")
            queued = record.state is JobState.QUEUED
            try:
                if queued:
                    return await self._store.transition(job_id, JobState.CANCELLED, reason, finished=now())
                return await self._store.transition(job_id, JobState.STOPPING, reason)
            except JobStateError:
                continue  # it got its slot, or ended, in between
            finally:
                self.wake()

    async def resume(self, job_id: str, reason: str) -> JobRecord:
        """Queue a failed or cancelled job again; it goes on from its last checkpoint.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: it has not ended, or it has succeeded.
        """
        record = await self._store.get(job_id)
        if not record.state.finished:
            raise JobStateError(f"{job_id} is {record.state}; only a failed or cancelled job can be resumed")
        if record.state is JobState.SUCCEEDED:
            raise JobStateError(f"{job_id} has succeeded already; submit it again with more learner.steps to train on")
        record = await self._store.transition(job_id, JobState.QUEUED, reason, error=None, finished=None, losses=0)
        self.wake()
        return record

    async def scale(self, job_id: str, rollout_replicas: int) -> JobRecord:
        """Set the number of rollout replicas of a running job; its later sessions use it, too.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: it does not run.
            ConfigError: the number is out of bounds, or the job's replicas cannot change.
        """
        record = await self._store.get(job_id)
        directory = self.run_dir(job_id)
        ready = RunFiles(directory).identity.exists()
        if record.state not in (JobState.STARTING, JobState.RUNNING) or not ready:
            state = record.state if record.state is not JobState.STARTING else "only just starting"
            raise JobStateError(f"{job_id} is {state}; only a job that runs can be scaled")
        await asyncio.to_thread(request_scale, RunDirectory.open(directory), rollout_replicas)
        return record

    async def delete(self, job_id: str) -> None:
        """Forget a finished job and remove what it has written: its run directory, its objects in a store.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: it has not finished.
            ObjectStoreError: not all of its objects could be removed; the message says where they are.
        """
        directory = self.run_dir(job_id)
        objects = await asyncio.to_thread(objects_of_run, directory)
        await self._store.delete(job_id)
        try:
            if objects is not None:
                await asyncio.to_thread(lambda: objects.delete([info.key for info in objects.list()]))
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _watch_only(self) -> None:
        """Progress of the jobs that another server leads."""
        active = await self._store.in_states(JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
        directories = [(record, self.run_dir(record.id)) for record in active]
        self._watched = {
            record.id: self._watched.get(record.id) or _Watch(Session(directory, record.session), directory)
            for record, directory in directories
            if directory.is_dir()
        }
        for watch in self._watched.values():
            watch.look()

    async def look(self) -> None:
        """Follow up on every active job once, and give free slots to the first in the queue.

        Raises:
            BusError: the store does not answer.
        """
        active = await self._store.in_states(JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
        for record in active:
            await self._look_after(record)
        taken = len([record for record in active if record.id in self._watched])
        self._watched = {record.id: self._watched[record.id] for record in active if record.id in self._watched}
        if taken < self._policy.slots:
            for record in await self._store.queue(self._policy.slots - taken):
                await self._start(record)

    async def _start(self, record: JobRecord) -> None:
        session = record.session + 1
        try:
            record = await self._store.transition(
                record.id,
                JobState.STARTING,
                "has a slot",
                session=session,
                started=record.started or now(),
            )
        except (JobStateError, JobNotFoundError):
            return  # cancelled in between
        await self._launch(record)

    async def _launch(self, record: JobRecord) -> None:
        try:
            directory = await self._prepare_directory(record)
            self._watched[record.id] = _Watch(
                Session.start(directory, record.session, self._launcher_choice.to_env()), directory
            )
        except (JackpotError, OSError, ValueError) as error:
            await self._store.transition(
                record.id, JobState.FAILED, "could not be started", error=str(error), finished=now()
            )

    async def _prepare_directory(self, record: JobRecord) -> Path:
        """The run directory, created unless an earlier session has done so."""
        directory = self.run_dir(record.id)
        if not RunFiles(directory).identity.exists():  # written last: without it the rest may be incomplete
            shutil.rmtree(directory, ignore_errors=True)
            spec = parse_job(json.loads(await self._store.spec(record.id)))
            RunDirectory.create(directory, record.id, spec)
        return directory

    async def _look_after(self, record: JobRecord) -> None:
        watch = self._watched.get(record.id)
        if watch is None:
            directory = self.run_dir(record.id)
            if not directory.is_dir():  # the control plane was killed before it created the directory
                if record.state is JobState.STARTING:
                    await self._launch(record)
                else:
                    await self._lost(record, Progress(), "its run directory is gone")
                return
            watch = self._watched[record.id] = _Watch(Session(directory, record.session), directory)
            LOG.info("took over %s", record.id, extra={"state": record.state, "session": record.session})
        watch.look()
        if not watch.session.alive():
            await self._ended(record, watch)
        elif record.state is JobState.STOPPING:
            watch.session.ask_to_stop(self._policy.stop_seconds)
        elif record.state is JobState.STARTING:
            status = watch.session.status
            if status is not None and status.phase == "running":
                await self._transition(record, JobState.RUNNING, "its processes are up")

    async def _ended(self, record: JobRecord, watch: _Watch) -> None:
        del self._watched[record.id]
        progress, status = watch.look(), watch.session.status
        state = status.state if status is not None and status.phase == "finished" else None
        ended = {"finished": now(), "progress": progress}
        if state == "succeeded":
            await self._transition(record, JobState.SUCCEEDED, "all steps are trained", **ended)
        elif state == "failed":
            error = status.error if status is not None else None
            await self._transition(record, JobState.FAILED, "its processes gave up", error=error, **ended)
        elif record.state is JobState.STOPPING:
            await self._transition(record, JobState.CANCELLED, record.reason, **ended)
        elif state == "stopped":
            await self._lost(record, progress, "stopped from outside")
        else:
            # A session of another server ended with that server; the processes that it followed did not.
            goes_on = self._launcher_choice.jobs_outlive_sessions and not watch.session.ours
            await self._lost(record, progress, "its processes vanished", goes_on=goes_on)

    async def _lost(self, record: JobRecord, progress: Progress, how: str, *, goes_on: bool = False) -> None:
        losses = record.losses + (0 if goes_on else 1)
        if record.state is JobState.STOPPING:
            await self._transition(record, JobState.CANCELLED, record.reason, finished=now())
        elif losses > self._policy.max_losses:
            error = f"{how}, for the {losses}th time. Look at the logs, then resume it."
            await self._transition(
                record, JobState.FAILED, "lost too often", error=error, finished=now(), progress=progress, losses=losses
            )
        elif goes_on:
            await self._transition(record, JobState.QUEUED, "its session ended; its processes run on, followed again")
        else:
            reason = f"lost ({how}); resumes by itself, {losses} of {self._policy.max_losses}"
            await self._transition(record, JobState.QUEUED, reason, losses=losses, progress=progress)

    async def _transition(self, record: JobRecord, state: JobState, reason: str, **changes: object) -> None:
        try:
            await self._store.transition(record.id, state, reason, **changes)
            LOG.info("%s is %s", record.id, state, extra={"reason": reason})
        except JobStateError:
            # It was cancelled since it was read; the next round sees that.
            LOG.info("%s changed meanwhile", record.id)
