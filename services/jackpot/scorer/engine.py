"""The one place where models are used: scoring and weight swaps take turns here, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from jackpot.errors import DeadlineError
from jackpot.scorer.target import PendingWeights, TargetPolicy
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity
from jackpot.trajectory import Group, ScoredGroup

LOG = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.2
"""How long scoring waits for newer weights to be read. Small models' are there by then; reading and verifying large
ones takes many seconds, in which the version held goes on scoring."""


class Scorer(Protocol):
    """What scores: a :class:`GroupScorer`, or the rank that leads several."""

    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """As :meth:`GroupScorer.score_groups`."""


class ScoringEngine:
    """Serves the worker on the bus and the RPC alike.

    The models belong to one thread: health checks, leases and RPCs stay live, and a swap never meets a forward
    pass, not even that of a call which was cancelled half-way.

    Args:
        target: the target policy.
        scorer: scores groups with it.
        metrics: where tokens and weight versions are counted.
        instance: this replica's name in its record of activities.
        poll_seconds: how often to look for newer weights.
        groups_apart: whether each group goes through the models by itself, so that its scores do not depend on its
            company, to the bit.
        activity: what the time goes into.
    """

    def __init__(
        self,
        target: TargetPolicy,
        scorer: Scorer,
        metrics: Metrics,
        instance: str,
        poll_seconds: float,
        activity: Activity | None = None,
        *,
        groups_apart: bool = False,
    ) -> None:
        self._target = target
        self._scorer = scorer
        self._metrics = metrics
        self._poll_seconds = poll_seconds
        self._groups_apart = groups_apart
        self.activity = activity or Activity(metrics, "scorer", instance)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._refreshing = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self.tokens_scored = 0

    @property
    def version(self) -> int | None:
        """The policy version held; None before the first."""
        return self._target.version

    @property
    def obrs_lambda(self) -> float:
        """The λ that the next score applies."""
        return self._target.obrs_lambda

    @property
    def num_refused_versions(self) -> int:
        """How many times a damaged policy version was refused."""
        return self._target.num_refused

    async def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups with the version held. Errors as :meth:`Scorer.score_groups`."""
        loop = asyncio.get_running_loop()
        scored = await loop.run_in_executor(self._thread, self._score, groups)
        num_tokens = sum(group.num_tokens for group in groups)
        self.tokens_scored += num_tokens
        self._metrics.tokens_scored_total.inc(num_tokens)
        return scored

    def _score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        with self.activity.doing("score"):
            if self._groups_apart:
                return [scored for group in groups for scored in self._scorer.score_groups([group])]
            return self._scorer.score_groups(groups)

    async def refresh(self) -> None:
        """Take up the newest policy version, if there is a newer one. Scoring goes on while it is read."""
        async with self._refreshing:
            refused = self._target.num_refused
            pending = await asyncio.to_thread(self._target.read_newer)
            if self._target.num_refused > refused:
                self._metrics.count_weights_refused("policy")
            if pending is None:
                return
            started = time.monotonic()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._apply, pending)
            seconds = pending.read_seconds + time.monotonic() - started
        self._metrics.observe_weights("policy", pending.version, seconds)
        details = {"version": pending.version, "obrs_lambda": pending.obrs_lambda, "seconds": seconds}
        LOG.info("policy weights loaded", extra=details)

    def _apply(self, pending: PendingWeights) -> None:
        with self.activity.doing("load_weights"):
            self._target.apply(pending)

    async def refresh_soon(self) -> None:
        """As :meth:`refresh`, but while a version takes long to be read, return and leave the reading under way."""
        if self._reading is None:
            self._reading = asyncio.create_task(self.refresh())
        await asyncio.wait((self._reading,), timeout=PATIENCE_SECONDS)
        if self._reading.done():
            reading, self._reading = self._reading, None
            reading.result()

    async def follow(self) -> None:
        """Keep up with the newest policy version until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._poll_seconds)

    async def wait_for_version(self, min_version: int, timeout_seconds: float) -> None:
        """Return once a policy version ≥ ``min_version`` is held.

        Raises:
            DeadlineError: it was not published, or could not be loaded, in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while self.version is None or self.version < min_version:
            await self.refresh()
            if self.version is not None and self.version >= min_version:
                return
            if time.monotonic() >= deadline:
                held = "none is held" if self.version is None else f"version {self.version} is held"
                raise DeadlineError(
                    f"version {min_version} of the policy's weights ({held})",
                    timeout_seconds,
                    "Look at the learner's log and for refused weights in the scorer's.",
                )
            await asyncio.sleep(min(self._poll_seconds, max(0.0, deadline - time.monotonic())))

    def close(self) -> None:
        """Wait for the work under way and refuse more."""
        if self._reading is not None:
            self._reading.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
