"""Decides which group is dispatched next, and when. Pure bookkeeping: no I/O.

Batch b trains slots [b·G, (b+1)·G). A slot belongs to one group at a time. If that group is dropped, the slot goes to
another group, its next attempt, so that every batch fills. This state can be rebuilt from group ids alone.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jackpot.config import JobSpec
from jackpot.trajectory import GroupKey

TerminalState = Literal["trained", "dropped"]

SAME_PROMPT = ("lost",)  # the group did nothing wrong
PERMUTATIONS_HELD = 8  # enough for two epochs with some attempts


@dataclass(frozen=True, slots=True)
class Pacing:
    """Decides when a slot may be dispatched, so that no token is older than ``max_staleness`` when it is trained on.

    Args:
        groups_per_batch: G.
        updates_per_batch: optimizer steps from one batch's start to the start of the next.
        max_staleness: greatest distance in optimizer steps from the version that samples to the step that trains.
    """

    groups_per_batch: int
    updates_per_batch: int
    max_staleness: int

    def start_step(self, slot: int) -> int:
        """The step at which training on the slot's batch starts."""
        return slot // self.groups_per_batch * self.updates_per_batch

    def first_slot(self, step: int) -> int:
        """The first slot whose batch starts to train at ``step`` or later."""
        return -(-step // self.updates_per_batch) * self.groups_per_batch

    def min_version(self, slot: int) -> int:
        """The oldest version that may sample for the slot; the slot is due once that version exists."""
        return max(0, self.start_step(slot) - self.max_staleness)


class PromptOrder:
    """Assigns a prompt to each slot: every epoch is a different permutation of the prompts.

    A slot whose group was dropped takes another prompt, from a further permutation of the same epoch. The choice
    depends only on the slot and the number of the attempt, never on the order in which groups end.

    Args:
        num_prompts: prompts in one epoch.
        seed: the job's seed.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        self._num_prompts = num_prompts
        self._seed = seed
        self._permutation = lru_cache(maxsize=PERMUTATIONS_HELD)(self._make_permutation)

    def prompt(self, slot: int, attempt: int = 0) -> tuple[int, int]:
        """(epoch, prompt index) of a slot at its ``attempt``-th group, counted from 0."""
        epoch, place = divmod(slot, self._num_prompts)
        return epoch, int(self._permutation(epoch, attempt)[place])

    def _make_permutation(self, epoch: int, attempt: int) -> NDArray[np.int64]:
        name = f"prompts {self._seed} {epoch}" + (f" {attempt}" if attempt else "")
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return generator.permutation(self._num_prompts)


class SlotBook:
    """Records which group holds each slot: receives every change of a group's state and chooses the next dispatch."""

    def __init__(self, num_slots: int, pacing: Pacing, order: PromptOrder) -> None:
        self._num_slots = num_slots
        self.pacing = pacing
        self._order = order
        self._next_slot = 0
        self._holders: dict[int, GroupKey] = {}  # slot → its group, from dispatch to the terminal state
        self._trained: set[int] = set()
        self._vacant: list[tuple[int, GroupKey]] = []  # heap: vacated slots, and the group that takes each next

    @classmethod
    def of_job(cls, job: JobSpec, num_prompts: int) -> SlotBook:
        """An empty book for a job."""
        learner = job.learner
        pacing = Pacing(learner.groups_per_batch, learner.updates_per_batch, job.orchestrator.max_staleness)
        return cls(job.num_groups, pacing, PromptOrder(num_prompts, job.seed))

    @property
    def num_trained(self) -> int:
        """Slots whose group has been trained on."""
        return len(self._trained)

    @property
    def open_groups(self) -> tuple[GroupKey, ...]:
        """The groups that hold a slot and have not ended."""
        return tuple(self._holders.values())

    def take_next(self, version: int, num_slots: int | None = None) -> GroupKey | None:
        """The next group to dispatch at weight version ``version``; its slot is then taken. None if none is due.

        Args:
            version: the newest version of the sampling weights.
            num_slots: only slots below this one; None is all slots of the job.
        """
        slot = self._vacant[0][0] if self._vacant else self._next_slot
        end = self._num_slots if num_slots is None else min(num_slots, self._num_slots)
        if slot >= end or version < self.pacing.min_version(slot):
            return None
        if self._vacant:
            _, key = heapq.heappop(self._vacant)
        else:
            key = self._first(slot)
            self._next_slot += 1
        self._holders[slot] = key
        return key

    def put_back(self, key: GroupKey) -> None:
        """Undo :meth:`take_next`: the group cannot be dispatched yet and will come again in its order."""
        del self._holders[key.slot]
        heapq.heappush(self._vacant, (key.slot, key))

    def close(self, key: GroupKey, state: TerminalState, reason: str) -> None:
        """Record the end of a group. Safe to repeat; groups that do not hold their slot change nothing."""
        if state == "trained":
            self._trained.add(key.slot)
        if self._holders.get(key.slot) != key:
            return
        del self._holders[key.slot]
        if state == "dropped" and reason != "unused":
            heapq.heappush(self._vacant, (key.slot, self._again(key, reason)))

    def restore(self, ended: Mapping[GroupKey, tuple[TerminalState, str]], opened: Iterable[GroupKey]) -> None:
        """Rebuild the book after a restart.

        Args:
            ended: every group with a terminal state: (state, reason).
            opened: every group without one. Slots in neither, up to the last dispatched one, are dispatched again.
        """
        self._holders = {key.slot: key for key in opened}
        known = [*ended, *self._holders.values()]
        self._next_slot = max((key.slot + 1 for key in known), default=0)
        self._trained = {key.slot for key, (state, _) in ended.items() if state == "trained"}
        by_attempt = sorted(ended.items(), key=lambda item: item[0].attempt)
        last = {key.slot: self._again(key, reason) for key, (_, reason) in by_attempt}
        taken = self._trained | set(self._holders)
        self._vacant = [
            (slot, last.get(slot) or self._first(slot)) for slot in range(self._next_slot) if slot not in taken
        ]
        heapq.heapify(self._vacant)

    def _first(self, slot: int) -> GroupKey:
        return GroupKey(slot, *self._order.prompt(slot))

    def _again(self, key: GroupKey, reason: str) -> GroupKey:
        """The next group for a dropped group's slot: with the same prompt if the group was lost, else with another."""
        attempt = key.attempt + 1
        if reason in SAME_PROMPT:
            return replace(key, attempt=attempt)
        return GroupKey(key.slot, *self._order.prompt(key.slot, attempt), attempt)
