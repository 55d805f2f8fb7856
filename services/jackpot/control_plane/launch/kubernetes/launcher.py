"""Runs a job as a JobSet. All state is in the JobSet, so that a later launcher can take it over as it stands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from jackpot.config import JobSpec
from jackpot.control_plane.launch.kubernetes.cluster_api import ClusterApi
from jackpot.control_plane.launch.kubernetes.jobset import jobset, joining_rollout
from jackpot.control_plane.launch.kubernetes.naming import jobset_name, rollout_job_name
from jackpot.control_plane.launch.kubernetes.pod_logs import PodLogs
from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings
from jackpot.control_plane.launch.kubernetes.status import Phase, Status
from jackpot.control_plane.launch.launcher import LaunchStatus
from jackpot.errors import ConfigError, JackpotError
from jackpot.process.scaling import forget_rollouts
from jackpot.storage.run_directory import RunDirectory
from jackpot.telemetry.scrape_targets import forget_target, forget_targets

GONE_SECONDS = 180.0  # pods get a minute of grace, and nodes are slow at times
STOP_SECONDS = 120.0  # how long deleting a JobSet is retried while the API server does not answer
POLL_SECONDS = 0.2
TAIL_SECONDS = 5.0  # for the last lines of logs to arrive


class KubernetesLauncher:
    """One job on the cluster.

    Args:
        run: the run directory, held by the caller, on the volume that the pods mount.
        job: the job as resolved.
        cluster: the cluster's settings.
        bus_url: the bus as seen from here; without it no queue depths are reported.
    """

    def __init__(self, run: RunDirectory, job: JobSpec, cluster: ClusterSettings, bus_url: str | None) -> None:
        self._run = run
        self._job = job
        self._cluster = cluster
        self._bus_url = bus_url
        self._name = jobset_name(run.job_id)
        self._api = ClusterApi(cluster.namespace)
        self._logs = PodLogs(self._api, run)
        self._tasks: list[asyncio.Task[None]] = []
        self._seen: Mapping[str, Any] | None = None
        self._missing = False

    @property
    def redis_url(self) -> str | None:
        """Where the job's bus is, if that is known here."""
        return self._bus_url

    async def start(self) -> None:
        """Create the JobSet, or take over the existing one, and wait until its pods run.

        Waits as long as the queue does: admission may take hours.

        Raises:
            ConfigError: there is no cluster.
            JackpotError: the API server refuses the JobSet, or it failed before its pods ran.
        """
        await self._api.connect()
        await self._make()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._logs.run())]
        while (status := self._status()) is None or status.phase not in (Phase.RUNNING, Phase.COMPLETED):
            if error := await self._error(status):
                raise JackpotError(error)
            await asyncio.sleep(POLL_SECONDS)

    async def check(self) -> LaunchStatus:
        """The JobSet's status. Kubernetes itself handles restarts."""
        status = self._status()
        error = await self._error(status)
        finished = status is not None and status.phase is Phase.COMPLETED
        if finished:
            await asyncio.sleep(TAIL_SECONDS)
        waiting = status is not None and status.phase is Phase.WAITING
        return LaunchStatus(finished=finished, waiting=waiting, error=error, restarts=dict(self._logs.restarts))

    async def scale(self, rollout_replicas: int) -> None:
        """Set the number of rollout replicas. The JobSet runs up to their initial number; each one beyond it runs as a
        Job that the JobSet owns. A repeated call completes one that failed halfway.

        Raises:
            JackpotError: the API server refuses, or a replica's earlier Job is still being deleted; try again.
        """
        job_id, configured = self._run.job_id, self._job.rollout.replicas
        running = await self._api.get(self._name)
        if running is None or running["metadata"].get("deletionTimestamp"):
            raise JackpotError(f"the JobSet {self._name} is not there")
        uid = running["metadata"]["uid"]
        await self._api.resize_job(rollout_job_name(job_id), min(configured, rollout_replicas))
        joined = await self._api.joined(job_id, uid)
        for instance, name in joined.items():
            if instance >= rollout_replicas:
                await self._api.delete_job(name)
        for instance in range(rollout_replicas, max([configured, *(extra + 1 for extra in joined)])):
            forget_target(self._run.path, f"rollout-{instance}")
        for instance in range(configured, rollout_replicas):
            if instance not in joined:
                await self._api.create_job(joining_rollout(job_id, self._job, self._cluster, instance, uid))

    async def stop(self) -> None:
        """Delete the JobSet, and wait until its pods have finished their unit of work and are gone.

        Raises:
            JackpotError: the JobSet cannot be deleted; it may run on.
        """
        try:
            await self._delete()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._api.close()

    async def _make(self) -> None:
        """Create it. Waits for one that is being deleted, and replaces one that has failed: this is a new attempt."""
        manifest = jobset(self._run.job_id, self._job, self._cluster)
        deadline = time.monotonic() + GONE_SECONDS
        while not await self._api.create(manifest):
            existing = await self._api.get(self._name)
            if existing is None:
                continue
            if not existing["metadata"].get("deletionTimestamp"):
                if Status.of(existing).phase is not Phase.FAILED:
                    return  # taken over as it stands
                await self._api.delete(self._name)
            if time.monotonic() > deadline:
                raise JackpotError(f"the JobSet {self._name} of an earlier session is still there; delete it first")
            await asyncio.sleep(POLL_SECONDS)
        forget_targets(self._run.path)
        forget_rollouts(self._run.path)

    async def _delete(self) -> None:
        """Retry until it succeeds: a cancelled job must not hold GPUs because one request was lost."""
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                await self._api.connect()
                await self._api.delete(self._name)
                gone_by = time.monotonic() + GONE_SECONDS
                while await self._api.get(self._name) is not None and time.monotonic() < gone_by:
                    await asyncio.sleep(POLL_SECONDS)
                return
            except ConfigError:
                return  # without a cluster there is nothing to delete
            except JackpotError as error:
                if time.monotonic() > deadline:
                    remedy = f"Delete it by hand: kubectl -n {self._cluster.namespace} delete jobset {self._name}"
                    raise JackpotError(f"the JobSet {self._name} may run on ({error}). {remedy}") from error
                await asyncio.sleep(1.0)

    async def _watch(self) -> None:
        async for running in self._api.follow(self._run.job_id):
            if running is None:
                self._missing = self._missing or self._seen is not None
            else:
                self._seen, self._missing = running, bool(running["metadata"].get("deletionTimestamp"))

    def _status(self) -> Status | None:
        return None if self._seen is None else Status.of(self._seen)

    async def _error(self, status: Status | None) -> str | None:
        """Why the job cannot go on, or None."""
        for task in self._tasks:
            if task.done():
                task.result()  # an error of ours: neither ends by itself
        if self._missing:
            return f"the JobSet {self._name} was deleted from outside"
        return await self._why(status) if status is not None and status.phase is Phase.FAILED else None

    async def _why(self, status: Status) -> str:
        """The reason, and the last lines of a process that failed."""
        await asyncio.sleep(TAIL_SECONDS)
        failed = next(iter(self._logs.restarts), None)
        tail = f"; the end of {self._run.log(failed)}:\n{self._run.last_lines(failed)}" if failed else ""
        return f"its JobSet failed ({status.message or 'no reason given'}){tail}"
