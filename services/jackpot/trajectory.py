"""What travels through the pipeline: trajectories, in groups. Frozen, numpy only.

A *trajectory* is one completion with the log-probabilities it was sampled with. A *group* holds the
siblings of one prompt and is the unit of everything after sampling: it is complete by construction, so
that group advantages never wait. A *scored group* adds what the target policy says about each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

EXACT_KL = "exact_kl"
"""Key of a scored group's metadata: [KL(p_t ‖ p_inf), KL(p_t ‖ p'_inf)] over the whole vocabulary, summed over the
group's tokens. There with normalizer ``full`` alone."""

DEFERRED = "deferred"
"""Normalizer of scored groups that are not scored: their scores are those of :func:`unscored`."""

FinishReason = Literal["stop", "length"]
Role = Literal["policy", "actor"]


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What identifies a group. The same work always gets the same id, so duplicates are recognised.

    ``slot`` is the group's place in the training order: batch b trains slots [b·G, (b+1)·G). A dropped group's slot
    is given to another group, the slot's next attempt, so that every batch fills and its composition is reproducible.
    """

    slot: int
    epoch: int
    prompt_index: int
    attempt: int = 0  # how many groups held the slot before this one

    def group_id(self, job_id: str) -> str:
        """The id on the bus, in the ledger and in file names."""
        return f"{job_id}.s{self.slot}.e{self.epoch}.p{self.prompt_index}.a{self.attempt}"

    @classmethod
    def parse(cls, group_id: str) -> GroupKey:
        """The key behind an id.

        Raises:
            ValueError: the text is not a group id.
        """
        match = _GROUP_ID.fullmatch(group_id)
        if match is None:
            raise ValueError(f"{group_id!r} is not a group id (<job>.s<slot>.e<epoch>.p<prompt>.a<attempt>)")
        return cls(*(int(number) for number in match.groups()))


def seeded_as(name: str) -> str:
    """The name of a group or trajectory as seeds know it: without its job's id, which holds a time and chance.

    Two jobs with one seed then draw the same samples and masks. All jobs are seeded under the name that the committed
    studies' runs had, so that those can be made again to the bit. Other names stay as they are.
    """
    _, dot, rest = name.partition(".")
    return f"inline.{rest}" if dot and _KEY.match(rest) else name


_KEY = re.compile(r"s\d+\.e\d+\.p\d+\.a\d+(#\d+)?\Z")
_GROUP_ID = re.compile(r"[a-z0-9-]+\.s(\d+)\.e(\d+)\.p(\d+)\.a(\d+)")


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) were sampled by weight version ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trajectory:
    """One completion. T tokens; k candidates a position, the actor's most probable ones.

    The log-probabilities are those of the distribution really sampled from (after temperature).
    """

    trajectory_id: str  # "<group id>#<index>"
    token_ids: NDArray[np.uint32]  # [T], the completion, its stop token included
    actor_logprobs: NDArray[np.float32]  # [T], log p_inf of the sampled token
    topk_ids: NDArray[np.uint32] | None  # [T, k]; None once dropped after scoring
    topk_logprobs: NDArray[np.float16] | None  # [T, k], log p_inf, descending
    version_spans: tuple[VersionSpan, ...]  # contiguous, covering [0, T)
    finish_reason: FinishReason
    reward: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def oldest_version(self) -> int:
        """The oldest actor version that produced one of the tokens."""
        return min(span.version for span in self.version_spans)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Group:
    """The trajectories of one prompt."""

    group_id: str
    prompt_index: int
    prompt_token_ids: NDArray[np.uint32]  # [P]
    trajectories: tuple[Trajectory, ...]
    temperature: float
    dispatch_version: int  # the weight version that was current when the group was dispatched
    metadata: Mapping[str, Any] = field(default_factory=dict)  # JSON values only

    @property
    def slot(self) -> int:
        """The group's place in the training order."""
        return GroupKey.parse(self.group_id).slot

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the whole group."""
        return sum(trajectory.num_tokens for trajectory in self.trajectories)

    @property
    def oldest_version(self) -> int:
        """Staleness counts from here: the oldest actor version behind any token of the group."""
        return min(trajectory.oldest_version for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenScores:
    """What the target policy says about one trajectory's T tokens, and what OBRS makes of it.

    ``normalizer_head`` and ``normalizer_tail`` are the per-position ingredients of Z; the batch scalars
    that combine them (κ or τ) belong to the learner. For ``union_kappa`` and ``full`` the tail is zero.
    """

    target_logprobs: NDArray[np.float32]  # [T], log p_ref of the sampled token
    acceptance_probs: NDArray[np.float32]  # [T], a(x) = min(1, p_t / (λ p_inf))
    mask: NDArray[np.bool_]  # [T], Bernoulli(a), reproducible
    normalizer_head: NDArray[np.float32]  # [T], Z_S, or Z_approx for union_kappa, or Z for full
    normalizer_tail: NDArray[np.float32]  # [T], U, the most that the unseen tail can add to Z
    topk_mass: NDArray[np.float32]  # [T], target probability covered by the ids that were looked at


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoredGroup:
    """A group with the target policy's scores, ready to be trained on."""

    group: Group
    scores: tuple[TokenScores, ...]  # one per trajectory, same order
    obrs_lambda: float  # the λ that was applied; 0, which rejects nothing, if it is not scored
    policy_version: int  # the version of θ that scored, or the newest if it is not scored
    normalizer: str  # which estimator the head and tail belong to

    @property
    def group_id(self) -> str:
        return self.group.group_id


def deferred(group: Group, policy_version: int) -> ScoredGroup:
    """The group in the form of a scored one, its scores left to the learner."""
    return ScoredGroup(
        group=group,
        scores=tuple(unscored(trajectory) for trajectory in group.trajectories),
        obrs_lambda=0.0,
        policy_version=policy_version,
        normalizer=DEFERRED,
    )


def unscored(trajectory: Trajectory) -> TokenScores:
    """Scores that stand for none: everything is accepted, Z = 1."""
    ones = np.ones(trajectory.num_tokens, dtype=np.float32)
    return TokenScores(
        target_logprobs=trajectory.actor_logprobs,
        acceptance_probs=ones,
        mask=np.ones(trajectory.num_tokens, dtype=np.bool_),
        normalizer_head=ones,
        normalizer_tail=np.zeros_like(ones),
        topk_mass=np.zeros_like(ones),
    )
