"""Copies the logs of a job's pods, and Kubernetes' events about them, into the run directory."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jackpot.control_plane.launch.kubernetes.cluster_api import ClusterApi
from jackpot.control_plane.launch.kubernetes.naming import INSTANCE_LABEL, jobset_name
from jackpot.storage.run_directory import RunDirectory

LOOK_SECONDS = 3.0
EVENT_LOOKS = 5  # a namespace has many events, so they are read only every few looks
INDEX = "batch.kubernetes.io/job-completion-index"
COMPONENT = "app.kubernetes.io/component"
ONE_OF_A_KIND = ("orchestrator", "evaluator", "learner")


class PodLogs:
    """Follows every pod of a job. Run :meth:`run` as a task.

    Args:
        api: connected.
        run: the run directory, whose ``logs`` grow.
    """

    def __init__(self, api: ClusterApi, run: RunDirectory) -> None:
        self._api = api
        self._run = run
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._copied: set[str] = set()  # uids of pods that had ended before their logs were copied
        self._failed: dict[str, str] = {}  # by uid: the process
        self._looks = 0
        self._told: set[tuple[str, str]] = set()

    @property
    def restarts(self) -> Mapping[str, int]:
        """Pods that have failed, by process."""
        return Counter(self._failed.values())

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                for pod in await self._api.pods(self._run.job_id):
                    self._look(pod)
                await self._tell_events()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _look(self, pod: Mapping[str, Any]) -> None:
        uid, name, phase = pod["metadata"]["uid"], process_name(pod), (pod.get("status") or {}).get("phase")
        if name is None:
            return
        if phase == "Failed":
            self._failed[uid] = name
        if uid in self._copied or phase not in ("Running", "Succeeded", "Failed"):
            return
        if uid not in self._tasks or self._tasks[uid].done():  # a connection may drop while the pod runs
            self._tasks[uid] = asyncio.create_task(self._copy(pod["metadata"]["name"], name))
            if phase != "Running":
                self._copied.add(uid)

    async def _copy(self, pod: str, name: str) -> None:
        """Continues where this session or the previous one stopped, give or take a line."""
        path = self._run.log(name)
        since = int(time.time() - path.stat().st_mtime) + 1 if path.exists() and path.stat().st_size else None
        with path.open("ab") as file:
            async for line in self._api.log(pod, name.split("-")[0], since):
                file.write(line if line.endswith(b"\n") else line + b"\n")
                file.flush()

    async def _tell_events(self) -> None:
        """Logs each warning once: images that cannot be pulled, pods that fit on no node."""
        self._looks += 1
        if self._looks % EVENT_LOOKS != 1:
            return
        for event in await self._api.events(jobset_name(self._run.job_id)):
            key = (event["involvedObject"].get("name", ""), str(event.get("reason")))
            if event.get("type") == "Warning" and key not in self._told:
                self._told.add(key)
                print(f"{event['involvedObject'].get('kind')} {key[0]}: {key[1]}: {event.get('message')}", flush=True)


def process_name(pod: Mapping[str, Any]) -> str | None:
    """The name of a pod's process: ``learner``, ``rollout-0``; None if the pod is not the job's."""
    role = (pod["metadata"].get("labels") or {}).get(COMPONENT)
    if role is None or role in ONE_OF_A_KIND:
        return role
    labels = pod["metadata"].get("labels") or {}
    index = labels.get(INSTANCE_LABEL) or (pod["metadata"].get("annotations") or {}).get(INDEX) or labels.get(INDEX)
    return f"{role}-{index or 0}"
