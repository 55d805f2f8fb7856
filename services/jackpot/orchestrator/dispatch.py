"""Takes each slot of the training order to a rewarded group on the bus."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from jackpot.bus import TrajectoryBus
from jackpot.bus.coalesce import all_ended
from jackpot.config import JobSpec
from jackpot.errors import (
    ConfigError,
    EngineError,
    JackpotError,
    JobFailedError,
    PayloadError,
    PromptError,
    RequestRefusedError,
    RewardError,
)
from jackpot.orchestrator.deferral import Deferral
from jackpot.orchestrator.prompts import PromptEncoder
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.orchestrator.rewards import RewardPool, rewarded
from jackpot.orchestrator.slots import SlotBook
from jackpot.orchestrator.tasks import Item, Task
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.orchestrator.versions import VersionWatch
from jackpot.rpc.proto import ids_to_bytes
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity
from jackpot.trajectory import Group, GroupKey, Trajectory, seeded_as
from jackpot.v1 import rollout_pb2

LOG = logging.getLogger(__name__)

BUDGET_POLL_SECONDS = 0.05
BUDGET_LOG_SECONDS = 30.0
FAILURES_BATCHES = 4  # if this many batches' worth of groups fail in a row, it is not bad luck


class TrainingPrompts:
    """The training prompts and their token ids, made outside the event loop: some tasks need a second per prompt."""

    def __init__(self, task: Task, encoder: PromptEncoder) -> None:
        self._task = task
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, "prompts")  # one thread: tasks need not be thread-safe

    async def prompt(self, index: int) -> tuple[Item, NDArray[np.uint32]]:
        """Prompt ``index`` and its token ids [P].

        Raises:
            ConfigError: the task cannot make the prompt, or the chat template refuses it.
            PromptError: the prompt cannot be encoded or is too long.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._make, index)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, index: int) -> tuple[Item, NDArray[np.uint32]]:
        try:
            item = self._task.train_prompt(index)
        except Exception as error:  # foreign code: the error costs this group, and many in a row cost the job
            problem = f"cannot make this prompt ({type(error).__name__}: {error})"
            raise ConfigError("task.train_prompt", index, problem, "Look at the task.") from error
        return item, self._encoder.encode(item)


class Dispatcher:
    """Keeps every due slot in progress until cancelled.

    Args:
        job: the job.
        job_id: its id.
        bus: an open bus.
        book: the holders of the slots; shared with the component that learns how groups ended.
        versions: the newest weight versions.
        replicas: the rollout replicas.
        prompts: the training prompts.
        tokenizer: the policy's tokenizer.
        rewards: computes the rewards.
        metrics: shows the groups in flight.
        activity: records what dispatch waits for: weights that make slots due, rollouts in flight, room on the bus.

    Raises:
        ConfigError: a stop string or the policy's vocabulary cannot be used.
    """

    def __init__(
        self,
        *,
        job: JobSpec,
        job_id: str,
        bus: TrajectoryBus,
        book: SlotBook,
        versions: VersionWatch,
        replicas: ReplicaPool,
        prompts: TrainingPrompts,
        tokenizer: PromptTokenizer,
        rewards: RewardPool,
        metrics: Metrics,
        activity: Activity,
    ) -> None:
        self._job = job
        self._job_id = job_id
        self._bus = bus
        self._book = book
        self._versions = versions
        self._replicas = replicas
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._metrics = metrics
        self._activity = activity
        self._stop_ids = tokenizer.stop_token_ids(job.sampling.stop)
        self._deferral = Deferral(job) if job.scorer.reuse_reference else None
        self._wake = asyncio.Event()
        self._in_flight = 0
        self._failures_in_a_row = 0
        self._held_since: float | None = None  # set while the bus's budget blocks dispatch
        self._next_evaluation: int | None = 0  # this step is evaluated before training goes beyond it; None: no wait

    def slots_changed(self) -> None:
        """Look for due slots again, because a group ended."""
        self._wake.set()

    def evaluated(self, next_step: int) -> None:
        """Record that what was due has been evaluated: training may go on. The next evaluation is of ``next_step``.

        Until the untrained policy is evaluated, the last slot of the first batch is held back, and everything else can
        proceed. A deterministic job waits in the same way for every evaluation; in other jobs timing decides which
        versions are evaluated.
        """
        self._next_evaluation = next_step if self._job.deterministic else None
        self._wake.set()

    async def run(self, again: Iterable[GroupKey] = ()) -> None:
        """Dispatch until cancelled.

        Args:
            again: groups that were dispatched before a restart but never published; they go first, with their old ids.

        Raises:
            JobFailedError: groups keep failing.
            DeadlineError: no replica is ready.
            BusError: the bus failed.
        """
        first = list(again)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._wake_on_versions())
            await self._wait_for_first_versions()
            while True:
                self._wake.clear()
                keys = self._take_due(first)
                # Concurrently but in order, so that they reach the bus in one exchange.
                reserved = await all_ended(self._reserve(key) for key in keys)
                for key in compress(keys, reserved):
                    self._count_in_flight(1)
                    # Not in the task itself: a task cancelled before it starts runs no finally block.
                    tasks.create_task(self._carry(key)).add_done_callback(lambda _: self._count_in_flight(-1))
                if keys:
                    self._note_holding(key.slot for key, room in zip(keys, reserved, strict=True) if not room)
                if not keys or not all(reserved):
                    await self._wait_for_change()

    def _take_due(self, first: list[GroupKey]) -> list[GroupKey]:
        """The groups to dispatch now: first those of ``first``, which is emptied, then those that are due."""
        keys: list[GroupKey] = []
        room = self._job.orchestrator.max_in_flight_groups - self._in_flight
        while len(keys) < room and (key := first.pop(0) if first else self._take_next()):
            keys.append(key)
        return keys

    def _take_next(self) -> GroupKey | None:
        step = self._next_evaluation
        end = None if step is None else self._book.pacing.first_slot(step) + self._job.learner.groups_per_batch - 1
        return self._book.take_next(self._current_version, end)

    @property
    def _current_version(self) -> int:
        return self._versions.newest(self._job.rollout_role)

    async def _wait_for_first_versions(self) -> None:
        """Wait for the versions that groups are stamped with, also for those that go first after a restart."""
        with self._activity.doing("wait_weights"):
            for role in ("policy", self._job.rollout_role):
                await self._versions.wait(role, 0)

    async def _wake_on_versions(self) -> None:
        while True:
            await self._versions.wait(self._job.rollout_role, self._current_version + 1)
            self._wake.set()

    async def _wait_for_change(self) -> None:
        held = self._held_since is not None
        full = self._in_flight >= self._job.orchestrator.max_in_flight_groups
        reason = "wait_bus_budget" if held else "wait_rollouts" if full else "wait_weights"
        with self._activity.doing(reason), suppress(TimeoutError):
            async with asyncio.timeout(BUDGET_POLL_SECONDS if held else None):
                await self._wake.wait()

    async def _reserve(self, key: GroupKey) -> bool:
        """Reserve room for the group on the bus, or put it back: dispatch waits, and nothing is trimmed."""
        # A group of the batch being filled ignores the budget: the groups that exhaust it wait for this one.
        urgent = self._book.pacing.start_step(key.slot) <= self._current_version
        reserved = await self._bus.reserve(key.group_id(self._job_id), largest_group_bytes(self._job), urgent=urgent)
        if not reserved:
            self._book.put_back(key)
        return reserved

    def _note_holding(self, refused: Iterable[int]) -> None:
        """Record whether dispatch waits because the bus has no room for some slot, even if it has room for others."""
        slot, now = next(iter(refused), None), time.monotonic()
        if slot is None:
            self._held_since = None
        elif self._held_since is None or now - self._held_since > BUDGET_LOG_SECONDS:
            LOG.warning("dispatch holds: the bus's budget (bus.max_bytes) is spent", extra={"slot": slot})
            self._held_since = now

    async def _carry(self, key: GroupKey) -> None:
        """Take one group from its prompt to the bus, or drop it."""
        group_id = key.group_id(self._job_id)
        try:
            group = await self._make_group(key, group_id)
            if self._job.algorithm.advantage.filter_zero_variance and _all_equal(group.trajectories):
                await self._bus.drop(group_id, "zero_variance", f"every reward is {group.trajectories[0].reward}")
            else:
                await self._publish(group)
            self._failures_in_a_row = 0
        except RewardError as error:
            await self._drop_failed(group_id, "reward_failed", error)
        except PromptError as error:
            await self._drop_failed(group_id, "prompt_unusable", error)
        except (EngineError, RequestRefusedError, ConfigError, PayloadError) as error:
            await self._drop_failed(group_id, "rollout_failed", error)

    async def _publish(self, group: Group) -> None:
        """Send the group to the scorers, or directly to the learner if there are no scorers."""
        if self._deferral is None:
            await self._bus.publish(group)
        else:
            await self._bus.publish_deferred(self._deferral.defer(group, self._versions.newest("policy")))

    async def _make_group(self, key: GroupKey, group_id: str) -> Group:
        item, prompt_ids = await self._prompts.prompt(key.prompt_index)
        sampling, version = self._job.sampling, self._current_version
        request = rollout_pb2.GenerateRequest(
            group_id=group_id,
            prompt_token_ids=ids_to_bytes(prompt_ids),
            num_trajectories=sampling.group_size,
            sampling=rollout_pb2.SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                stop_token_ids=self._stop_ids,
                top_logprobs=self._job.rollout.top_logprobs,
                seed=sampling_seed(self._job.seed, group_id),
            ),
            min_version=self._book.pacing.min_version(key.slot),
        )
        trajectories = await self._replicas.generate(request)
        texts = [self._tokenizer.decode(trajectory.token_ids) for trajectory in trajectories]
        with self._activity.doing("reward"):
            judged = await self._rewards.judge(item, texts)
        return Group(
            group_id=group_id,
            prompt_index=key.prompt_index,
            prompt_token_ids=prompt_ids,
            trajectories=rewarded(trajectories, judged),
            temperature=sampling.temperature,
            dispatch_version=version,
        )

    async def _drop_failed(self, group_id: str, reason: str, error: JackpotError) -> None:
        self._failures_in_a_row += 1
        LOG.warning("group dropped: %s", error, extra={"group_id": group_id, "reason": reason})
        await self._bus.drop(group_id, reason, f"{type(error).__name__}: {error}"[:500])
        limit = FAILURES_BATCHES * self._job.learner.groups_per_batch
        if self._failures_in_a_row >= limit:
            raise JobFailedError(f"{limit} groups in a row failed, the last one: {error}")

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        self._metrics.observe_in_flight(self._in_flight)
        self._wake.set()


def sampling_seed(job_seed: int, name: str) -> int:
    """The 64-bit seed for sampling under ``name``: the same on every replica, and in any job with that seed."""
    digest = hashlib.blake2b(f"{job_seed} {seeded_as(name)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def largest_group_bytes(job: JobSpec) -> int:
    """The most bytes that a group of this job can take on the bus, besides its prompt and some hundred bytes."""
    per_token = 4 + 4 + job.rollout.top_logprobs * (4 + 2)  # id and log-probability, of the token and of k candidates
    return job.sampling.group_size * job.sampling.max_tokens * per_token + (64 << 10)


def _all_equal(trajectories: Sequence[Trajectory]) -> bool:
    return len({trajectory.reward for trajectory in trajectories}) == 1
