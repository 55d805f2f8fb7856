"""Groups as flat arrays of completion tokens, one trajectory after the other, and what a model reads of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jackpot.trajectory import Group, ScoredGroup


@dataclass(frozen=True, slots=True, eq=False)
class SequenceSlice:
    """A trajectory, or the part of it that one weight version sampled: its tokens are [start, end) of the flat arrays.

    ``input_ids`` is everything up to the last of them: what comes later cannot matter.
    """

    trajectory_id: str
    input_ids: NDArray[np.int64]  # [P + T], what is known beforehand and the tokens
    prompt_length: int  # P, tokens known beforehand: the prompt, and of a part the completion before it
    start: int
    end: int

    @property
    def num_inputs(self) -> int:
        """What a model has to read: everything before the last token."""
        return len(self.input_ids) - 1

    def part(self, start: int, end: int) -> SequenceSlice:
        """Completion tokens [start, end) of a whole trajectory."""
        prompt = self.prompt_length
        return SequenceSlice(
            self.trajectory_id, self.input_ids[: prompt + end], prompt + start, self.start + start, self.start + end
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenArrays:
    """Everything known per completion token before the learner's own forward pass. N tokens in all."""

    token_ids: Tensor  # [N] int64
    actor_logprobs: Tensor  # [N] float32, log p_inf
    reference_logprobs: Tensor  # [N] float32, log p_ref
    acceptance_probs: Tensor  # [N] float32, a(x)
    mask: Tensor  # [N] float32, Bernoulli(a)
    normalizer_head: Tensor  # [N] float32, Z_S
    normalizer_tail: Tensor  # [N] float32, U
    topk_mass: Tensor  # [N] float32
    obrs_lambda: Tensor  # [N] float32, the λ that acceptance, mask and normalizer belong to
    sequence_index: Tensor  # [N] int64, which of the batch's trajectories the token belongs to
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
    """The trajectories of groups, whole, one after the other."""
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
    """What each actor version sampled, the oldest version first: parts of sequences, each with its sequence's number.

    Args:
        groups: whole.
        sequences: theirs, of :func:`sequences_of`.
    """
    parts: dict[int, list[tuple[int, SequenceSlice]]] = {}
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    for number, (trajectory, sequence) in enumerate(zip(trajectories, sequences, strict=True)):
        for span in trajectory.version_spans:
            parts.setdefault(span.version, []).append((number, sequence.part(span.start, span.end)))
    return dict(sorted(parts.items()))


def token_arrays(groups: Sequence[ScoredGroup], advantages: NDArray[np.floating]) -> TokenArrays:
    """The arrays of groups, one after the other; ``advantages`` are of each token, [N]."""
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
