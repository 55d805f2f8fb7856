"""Groups as flat arrays of completion tokens, one trajectory after another, and the batch to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jackpot.compute.batching import AttentionCost, Siblings
from jackpot.config import AdvantageConfig
from jackpot.trajectory import DEFERRED, EXACT_KL, Group, ScoredGroup, TokenScores, VersionSpan


@dataclass(frozen=True, slots=True, eq=False)
class SequenceSlice:
    """A trajectory, or the part of it that one weight version sampled. Its tokens are [start, end) of the flat arrays.

    ``input_ids`` ends with the last of these tokens: later ones cannot affect them.
    """

    trajectory_id: str
    input_ids: NDArray[np.int64]  # [P + T], the given tokens and then the sampled ones
    prompt_length: int  # P, given tokens: the prompt, and for a part also the completion before it
    start: int
    end: int

    @property
    def num_inputs(self) -> int:
        """How many tokens a model reads: all but the last."""
        return len(self.input_ids) - 1

    def part(self, start: int, end: int) -> SequenceSlice:
        """Completion tokens [start, end) of a whole trajectory."""
        prompt = self.prompt_length
        return SequenceSlice(
            self.trajectory_id, self.input_ids[: prompt + end], prompt + start, self.start + start, self.start + end
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenArrays:
    """Everything known about N completion tokens before the learner's forward pass."""

    token_ids: Tensor  # [N] int64
    actor_logprobs: Tensor  # [N] float32, log p_inf
    reference_logprobs: Tensor  # [N] float32, log p_ref
    acceptance_probs: Tensor  # [N] float32, a(x)
    mask: Tensor  # [N] float32, Bernoulli(a)
    normalizer_head: Tensor  # [N] float32, Z_S
    normalizer_tail: Tensor  # [N] float32, U
    topk_mass: Tensor  # [N] float32
    obrs_lambda: Tensor  # [N] float32, the λ of acceptance, mask and normalizer
    sequence_index: Tensor  # [N] int64, the token's trajectory within the batch
    advantages: Tensor  # [N] float32, the trajectory's advantage at each of its tokens
    topk_ids: Tensor | None  # [N, k] int64, the actor's; only with target = policy
    topk_logprobs: Tensor | None  # [N, k] float32
    initial_logprobs: Tensor | None = None  # [N] float32; only with a penalty on KL to the initial policy in the reward

    def select(self, index: Tensor) -> TokenArrays:
        """The same arrays at the given token positions."""
        return self._each(lambda value: value[index])

    def to(self, device: torch.device) -> TokenArrays:
        """The same arrays on ``device``."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenArrays:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return TokenArrays(**changed)


def sequences_of(groups: Sequence[Group]) -> tuple[SequenceSlice, ...]:
    """The whole trajectories of groups, one after another."""
    sequences: list[SequenceSlice] = []
    end = 0
    for group in groups:
        prompt = group.prompt_token_ids.astype(np.int64)
        for trajectory in group.trajectories:
            start, end = end, end + trajectory.num_tokens
            input_ids = np.concatenate([prompt, trajectory.token_ids.astype(np.int64)])
            sequences.append(SequenceSlice(trajectory.trajectory_id, input_ids, len(prompt), start, end))
    return tuple(sequences)


def parts_by_version(
    groups: Sequence[Group], sequences: Sequence[SequenceSlice]
) -> Mapping[int, Sequence[tuple[int, SequenceSlice]]]:
    """What each actor version sampled, oldest version first: parts of sequences, each with its sequence's number.

    Args:
        groups: the groups.
        sequences: the result of :func:`sequences_of` for these groups.
    """
    parts: dict[int, list[tuple[int, SequenceSlice]]] = {}
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    for number, (trajectory, sequence) in enumerate(zip(trajectories, sequences, strict=True)):
        for span in trajectory.version_spans:
            parts.setdefault(span.version, []).append((number, sequence.part(span.start, span.end)))
    return dict(sorted(parts.items()))


def token_arrays(groups: Sequence[ScoredGroup], advantages: NDArray[np.floating]) -> TokenArrays:
    """The arrays of groups, one after another; ``advantages`` are per token, [N]."""
    trajectories = [t for scored in groups for t in scored.group.trajectories]
    scores = [s for scored in groups for s in scored.scores]

    def flat(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.float32 if dtype.is_floating_point else np.int64))

    lengths = [t.num_tokens for t in trajectories]
    with_topk = all(t.topk_ids is not None for t in trajectories)
    return TokenArrays(
        token_ids=flat([t.token_ids for t in trajectories], torch.int64),
        actor_logprobs=flat([t.actor_logprobs for t in trajectories], torch.float32),
        reference_logprobs=flat([s.target_logprobs for s in scores], torch.float32),
        acceptance_probs=flat([s.acceptance_probs for s in scores], torch.float32),
        mask=flat([s.mask for s in scores], torch.float32),
        normalizer_head=flat([s.normalizer_head for s in scores], torch.float32),
        normalizer_tail=flat([s.normalizer_tail for s in scores], torch.float32),
        obrs_lambda=torch.tensor([g.obrs_lambda for g in groups]).repeat_interleave(
            torch.tensor([g.group.num_tokens for g in groups])
        ),
        topk_mass=flat([s.topk_mass for s in scores], torch.float32),
        sequence_index=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        advantages=torch.from_numpy(advantages.astype(np.float32)),
        topk_ids=flat([t.topk_ids for t in trajectories if t.topk_ids is not None], torch.int64) if with_topk else None,
        topk_logprobs=flat([t.topk_logprobs for t in trajectories if t.topk_logprobs is not None], torch.float32)
        if with_topk
        else None,
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Scored groups, flattened. Groups keep their order, so that a replayed batch is identical."""

    sequences: tuple[SequenceSlice, ...]
    tokens: TokenArrays
    group_ids: tuple[str, ...]
    group_starts: tuple[int, ...]  # index of each group's first sequence
    rewards: NDArray[np.float64]  # [sequences]
    truncated: NDArray[np.bool_]  # [sequences]
    oldest_versions: NDArray[np.int64]  # [groups]
    reference_versions: NDArray[np.int64]  # [groups], version of the policy that scored; −1 where the learner scores
    version_spans: tuple[tuple[VersionSpan, ...], ...]  # [sequences], who sampled
    temperature: float
    exact_kl: NDArray[np.float64] | None  # [groups, 2], KL before and after OBRS summed over each group's tokens
    num_cut_tokens: int = 0  # sampled tokens beyond learner.max_sequence_tokens

    @property
    def num_tokens(self) -> int:
        """N, completion tokens in all."""
        return len(self.tokens.token_ids)

    def siblings(self, attention: AttentionCost) -> Siblings:
        """The sequences that share a prompt: those of a group. Argument as for :class:`Siblings`."""
        sizes = np.diff([*self.group_starts, len(self.sequences)])
        prompts = np.repeat(np.arange(len(sizes)), sizes)
        return Siblings(prompts.tolist(), [sequence.prompt_length for sequence in self.sequences], attention)

    def split(self, parts: int) -> list[Batch]:
        """Split into ``parts`` batches with the same number of groups (one per optimizer step)."""
        per_part = len(self.group_starts) // parts
        bounds = [*self.group_starts, len(self.sequences)]
        return [self._groups(bounds, part * per_part, (part + 1) * per_part) for part in range(parts)]

    def _groups(self, bounds: Sequence[int], first: int, last: int) -> Batch:
        sequences = self.sequences[bounds[first] : bounds[last]]
        offset = sequences[0].start
        tokens = self.tokens.select(torch.arange(offset, sequences[-1].end))
        return Batch(
            sequences=tuple(
                replace(sequence, start=sequence.start - offset, end=sequence.end - offset) for sequence in sequences
            ),
            tokens=replace(tokens, sequence_index=tokens.sequence_index - bounds[first]),
            group_ids=self.group_ids[first:last],
            group_starts=tuple(start - bounds[first] for start in bounds[first:last]),
            rewards=self.rewards[bounds[first] : bounds[last]],
            truncated=self.truncated[bounds[first] : bounds[last]],
            oldest_versions=self.oldest_versions[first:last],
            reference_versions=self.reference_versions[first:last],
            temperature=self.temperature,
            exact_kl=None if self.exact_kl is None else self.exact_kl[first:last],
            version_spans=self.version_spans[bounds[first] : bounds[last]],
            num_cut_tokens=self.num_cut_tokens,
        )


def build_batch(
    groups: Sequence[ScoredGroup], advantage: AdvantageConfig, max_sequence_tokens: int | None = None
) -> Batch:
    """Flatten scored groups.

    All groups share the job's sampling temperature. Each group has its own λ: where λ follows an acceptance rate, a
    batch may hold groups scored before and after a change.

    Args:
        groups: of one batch, in slot order.
        advantage: the estimator.
        max_sequence_tokens: maximum length of prompt plus completion. Tokens beyond it are cut off and counted.
    """
    num_sampled = sum(scored.group.num_tokens for scored in groups)
    if max_sequence_tokens is not None:
        groups = [cut_group(scored, max_sequence_tokens) for scored in groups]
    sequences = sequences_of([scored.group for scored in groups])
    trajectories = [t for scored in groups for t in scored.group.trajectories]
    rewards = np.array([t.reward for t in trajectories], dtype=np.float64)
    lengths = np.array([t.num_tokens for t in trajectories])
    sizes = torch.tensor([len(scored.group.trajectories) for scored in groups])
    advantages = advantage.estimate(
        torch.from_numpy(rewards),
        torch.arange(len(groups)).repeat_interleave(sizes),
        torch.from_numpy(lengths),
    )
    return Batch(
        sequences=sequences,
        tokens=token_arrays(groups, np.repeat(advantages.numpy(), lengths)),
        group_ids=tuple(scored.group_id for scored in groups),
        group_starts=tuple(np.cumsum([0, *sizes.tolist()])[:-1].tolist()),
        rewards=rewards,
        truncated=np.array([t.finish_reason == "length" for t in trajectories]),
        oldest_versions=np.array([scored.group.oldest_version for scored in groups], dtype=np.int64),
        reference_versions=np.array([_reference_version(scored) for scored in groups], dtype=np.int64),
        temperature=groups[0].group.temperature,
        exact_kl=_exact_kl(groups),
        version_spans=tuple(t.version_spans for t in trajectories),
        num_cut_tokens=num_sampled - sum(scored.group.num_tokens for scored in groups),
    )


def cut_group(scored: ScoredGroup, max_sequence_tokens: int) -> ScoredGroup:
    """The group with its completions cut to the allowed length, but at least one token. Rewards stay."""
    group = scored.group
    keep = max(1, max_sequence_tokens - len(group.prompt_token_ids))
    if all(trajectory.num_tokens <= keep for trajectory in group.trajectories):
        return scored
    trajectories = tuple(
        replace(
            trajectory,
            token_ids=trajectory.token_ids[:keep],
            actor_logprobs=trajectory.actor_logprobs[:keep],
            topk_ids=None if trajectory.topk_ids is None else trajectory.topk_ids[:keep],
            topk_logprobs=None if trajectory.topk_logprobs is None else trajectory.topk_logprobs[:keep],
            version_spans=tuple(
                replace(span, end=min(span.end, keep)) for span in trajectory.version_spans if span.start < keep
            ),
        )
        for trajectory in group.trajectories
    )
    scores = tuple(TokenScores(**{f.name: getattr(s, f.name)[:keep] for f in fields(s)}) for s in scored.scores)
    # Its sums cover all tokens.
    metadata = {key: value for key, value in group.metadata.items() if key != EXACT_KL}
    return replace(scored, group=replace(group, trajectories=trajectories, metadata=metadata), scores=scores)


def _reference_version(scored: ScoredGroup) -> int:
    return -1 if scored.normalizer == DEFERRED else scored.policy_version


def _exact_kl(groups: Sequence[ScoredGroup]) -> NDArray[np.float64] | None:
    """KL over the whole vocabulary as the scorer computed it; None with estimators that use a part of it."""
    pairs = [scored.group.metadata.get(EXACT_KL) for scored in groups]
    return None if any(pair is None for pair in pairs) else np.array(pairs, dtype=np.float64)
