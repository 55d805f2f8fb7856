"""Scoring left to the learner (``scorer.reuse_reference``): groups are checked and passed on, no model is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jackpot.config import JackpotCorrection, JobSpec
from jackpot.errors import ConfigError, ScoringError, WeightMissingError
from jackpot.runtime.weights import WeightStore
from jackpot.scorer.target import PendingWeights
from jackpot.scorer.tokens import check_group
from jackpot.trajectory import DEFERRED, Group, ScoredGroup, unscored


class PolicyVersion:
    """Which version of the policy is the newest, without its weights.

    Args:
        model: the policy's directory; its config.json tells the vocabulary.
        store: the job's weight store.
        obrs_lambda: λ for versions that do not carry one.

    Raises:
        ConfigError: config.json tells no vocabulary.
    """

    num_refused = 0

    def __init__(self, model: str, store: WeightStore, obrs_lambda: float) -> None:
        self.version: int | None = None
        self.obrs_lambda = obrs_lambda
        self.vocabulary = _vocabulary(model)
        self._store = store

    def read_newer(self) -> PendingWeights | None:
        """The newest version if it is newer than the one known; without state."""
        started = time.monotonic()
        try:
            newest = self._store.latest("policy")
        except WeightMissingError:
            return None
        if newest is None or (self.version is not None and newest.version <= self.version):
            return None
        obrs_lambda = float(newest.metadata.get("obrs_lambda", self.obrs_lambda))
        return PendingWeights(newest.version, obrs_lambda, {}, time.monotonic() - started)

    def apply(self, pending: PendingWeights) -> None:
        """Take note of a version."""
        self.version, self.obrs_lambda = pending.version, pending.obrs_lambda


class DeferredScorer:
    """Gives groups the form of scored ones, with scores that stand for none: everything accepted, Z = 1.

    Args:
        job: the job as resolved.
        target: the policy's version, which is stamped on groups.
    """

    def __init__(self, job: JobSpec, target: PolicyVersion) -> None:
        self._with_topk = isinstance(job.algorithm.correction, JackpotCorrection)
        self._target = target

    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Pass groups on; the actor's top-k stays where the learner needs it for Z.

        Raises:
            PayloadError: a group's arrays do not fit the model or the job.
            ScoringError: no policy version is known yet.
        """
        if self._target.version is None:
            raise ScoringError("no version of the policy's weights is published yet. Wait until the scorer is ready.")
        for group in groups:
            check_group(group, self._target.vocabulary, with_topk=self._with_topk)
        return [
            ScoredGroup(
                group=group if self._with_topk else _without_topk(group),
                scores=tuple(unscored(trajectory) for trajectory in group.trajectories),
                obrs_lambda=self._target.obrs_lambda,
                policy_version=self._target.version,
                normalizer=DEFERRED,
            )
            for group in groups
        ]


def _without_topk(group: Group) -> Group:
    trajectories = tuple(replace(t, topk_ids=None, topk_logprobs=None) for t in group.trajectories)
    return replace(group, trajectories=trajectories)


def _vocabulary(model: str) -> int:
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"its config.json tells no vocab_size ({error})"
        raise ConfigError("policy.model", model, problem, "Download or export the model again.") from None
