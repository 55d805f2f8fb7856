"""Uses the models: scoring and weight swaps take turns in one thread, outside the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from jackpot.errors import DeadlineError, WeightCorruptError, WeightError
from jackpot.scorer.target import PendingWeights, TargetPolicy
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity
from jackpot.trajectory import Group, ScoredGroup

LOG = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.2
"""How long scoring waits while newer weights are read. Small models are read by then. Reading and verifying large ones
takes many seconds, during which the present weights continue scoring."""


class Scorer(Protocol):
    """Scores groups: a :class:`GroupScorer`, or the leader of several ranks."""

    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """As :meth:`GroupScorer.score_groups`."""


class ScoringEngine:
    """Serves both the bus worker and the RPC.

    One thread owns the models. Health checks, leases and RPCs therefore stay responsive, and a swap never coincides
    with a forward pass, not even with that of a cancelled call.

    Args:
        target: the target policy.
        scorer: scores groups with it.
        metrics: counts tokens and weight versions.
        instance: this replica's name in its record of activities.
        poll_seconds: how often to look for newer weights.
        groups_apart: whether each group runs through the models alone, so that its scores do not depend on other groups
            in any bit.
        activity: records how time is spent.
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
        self._reading_weights = asyncio.Lock()
        self._scoring = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self.tokens_scored = 0

    @property
    def version(self) -> int | None:
        """The newest policy version read; None before the first."""
        return self._target.newest

    @property
    def obrs_lambda(self) -> float:
        """The λ published with the newest version."""
        return self._target.newest_lambda

    @property
    def num_refused_versions(self) -> int:
        """How often a damaged policy version was refused."""
        return self._target.num_refused

    def serves(self, version: int) -> bool:
        """As :meth:`TargetPolicy.serves`."""
        return self._target.serves(version)

    async def score(self, groups: Sequence[Group], version: int | None = None) -> list[ScoredGroup]:
        """Score groups, all with one version of the policy. Errors as :meth:`Scorer.score_groups`.

        Args:
            groups: the groups to score.
            version: the version to score with; the newest replaces one that is damaged or pruned. None is the newest.
        """
        loop = asyncio.get_running_loop()
        async with self._scoring:
            version = self.version if version is None else version
            pending = None if version in (None, self._target.version) else await self._read(version)
            scoring = loop.run_in_executor(self._thread, self._score, groups, pending)
            try:
                scored = await asyncio.shield(scoring)
            finally:  # a cancelled caller leaves a pass running: the model's version is settled only after it
                await asyncio.wait((scoring,))
        num_tokens = sum(group.num_tokens for group in groups)
        self.tokens_scored += num_tokens
        self._metrics.tokens_scored_total.inc(num_tokens)
        return scored

    async def _read(self, version: int) -> PendingWeights:
        if (held := self._target.held(version)) is not None:
            return held
        async with self._reading_weights:
            try:
                return await asyncio.to_thread(self._target.read_version, version)
            except (WeightError, FileNotFoundError) as error:
                if self.version in (None, version):
                    raise
                if isinstance(error, WeightCorruptError):
                    self._metrics.count_weights_refused("policy")
                LOG.error("version %s scores in place of version %s: %s", self.version, version, error)
                assert self.version is not None
                return await asyncio.to_thread(self._target.read_version, self.version)

    def _score(self, groups: Sequence[Group], pending: PendingWeights | None) -> list[ScoredGroup]:
        if pending is not None:
            with self.activity.doing("load_weights"):
                self._take_up(pending)
        with self.activity.doing("score"):
            if self._groups_apart:
                return [scored for group in groups for scored in self._scorer.score_groups([group])]
            return self._scorer.score_groups(groups)

    def _take_up(self, pending: PendingWeights) -> None:
        try:
            self._target.apply(pending)
        except WeightCorruptError as error:
            self._metrics.count_weights_refused("policy")
            if self._target.version is None:
                raise
            LOG.error("version %s scores in place of version %s: %s", self._target.version, pending.version, error)

    async def refresh(self) -> None:
        """Read the newest policy version if there is a newer one. Scoring continues meanwhile."""
        async with self._reading_weights:
            refused = self._target.num_refused
            pending = await asyncio.to_thread(self._target.read_newer)
        if self._target.num_refused > refused:
            self._metrics.count_weights_refused("policy")
        if pending is None:
            return
        self._metrics.observe_weights("policy", pending.version, pending.read_seconds)
        details = {"version": pending.version, "obrs_lambda": pending.obrs_lambda, "seconds": pending.read_seconds}
        LOG.info("policy weights loaded", extra=details)

    async def refresh_soon(self) -> None:
        """As :meth:`refresh`, but return before a slow read has finished and let it continue."""
        if self._reading is None:
            self._reading = asyncio.create_task(self.refresh())
        await asyncio.wait((self._reading,), timeout=PATIENCE_SECONDS)
        if self._reading.done():
            reading, self._reading = self._reading, None
            reading.result()

    async def follow(self) -> None:
        """Follow the newest policy version until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._poll_seconds)

    async def wait_for_version(self, min_version: int, timeout_seconds: float) -> None:
        """Return once a policy version ≥ ``min_version`` is held.

        Raises:
            DeadlineError: no such version was published, or could be loaded, in time.
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
        """Wait for running work and refuse further work."""
        if self._reading is not None:
            self._reading.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
