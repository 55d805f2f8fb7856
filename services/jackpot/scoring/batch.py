"""From scored groups to flat arrays that a batch is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from jackpot.compute.batching import AttentionCost, Siblings
from jackpot.config import AdvantageConfig
from jackpot.scoring.tokens import SequenceSlice, TokenArrays, sequences_of, token_arrays
from jackpot.trajectory import DEFERRED, EXACT_KL, ScoredGroup, TokenScores


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Scored groups, flattened. Groups keep their order, so that a replayed batch is the same batch."""

    sequences: tuple[SequenceSlice, ...]
    tokens: TokenArrays
    group_ids: tuple[str, ...]
    group_starts: tuple[int, ...]  # index of each group's first sequence
    rewards: NDArray[np.float64]  # [sequences]
    truncated: NDArray[np.bool_]  # [sequences]
    oldest_versions: NDArray[np.int64]  # [groups]
    reference_versions: NDArray[np.int64]  # [groups], the policy that scored; −1 where the learner's own pass scores
    temperature: float
    exact_kl: NDArray[np.float64] | None  # [groups, 2], KL before and after OBRS summed over each group's tokens
    num_cut_tokens: int = 0  # sampled, but beyond learner.max_sequence_tokens

    @property
    def num_tokens(self) -> int:
        """N, completion tokens in all."""
        return len(self.tokens.token_ids)

    def siblings(self, attention: AttentionCost) -> Siblings:
        """Which sequences have one prompt: those of a group. Argument as :class:`Siblings`."""
        sizes = np.diff([*self.group_starts, len(self.sequences)])
        prompts = np.repeat(np.arange(len(sizes)), sizes)
        return Siblings(prompts.tolist(), [sequence.prompt_length for sequence in self.sequences], attention)

    def split(self, parts: int) -> list[Batch]:
        """Split into ``parts`` batches of equally many groups (one per optimizer step)."""
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
            num_cut_tokens=self.num_cut_tokens,
        )


def build_batch(
    groups: Sequence[ScoredGroup], advantage: AdvantageConfig, max_sequence_tokens: int | None = None
) -> Batch:
    """Flatten scored groups.

    All groups share one sampling temperature, the job's. λ is each group's own: where it follows an acceptance rate,
    a batch may hold groups that were scored before and after a change.

    Args:
        groups: of one batch, in slot order.
        advantage: which estimator.
        max_sequence_tokens: greatest length of prompt and completion; what lies beyond is cut off, and counted.
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
        num_cut_tokens=num_sampled - sum(scored.group.num_tokens for scored in groups),
    )


def cut_group(scored: ScoredGroup, max_sequence_tokens: int) -> ScoredGroup:
    """The group with its completions cut to what a sequence may have, the first token in any case. Rewards stay."""
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
    # Its sums are over all tokens.
    metadata = {key: value for key, value in group.metadata.items() if key != EXACT_KL}
    return replace(scored, group=replace(group, trajectories=trajectories, metadata=metadata), scores=scores)


def _reference_version(scored: ScoredGroup) -> int:
    return -1 if scored.normalizer == DEFERRED else scored.policy_version


def _exact_kl(groups: Sequence[ScoredGroup]) -> NDArray[np.float64] | None:
    """What the scorer found over the whole vocabulary; None with estimators that do not look at all of it."""
    pairs = [scored.group.metadata.get(EXACT_KL) for scored in groups]
    return None if any(pair is None for pair in pairs) else np.array(pairs, dtype=np.float64)
