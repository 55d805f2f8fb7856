"""What a correction is: settings from the job file, and the weight that they give each sampled token. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jackpot.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from jackpot.algorithm.corrections.jackpot import JackpotCorrection

MAX_LOG_RATIO = 20.0
"""Logarithms of ratios are cut here (a ratio of 5e8; verl has the same bound) and reported as clipped: products over
long completions leave float32, and one infinite weight would spoil the whole batch's gradient."""

Level = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampledTokens:
    """What a correction may look at. No gradient is taken through any of it."""

    target_logprobs: Tensor  # [tokens], log p_t: p_ref, unless OBRS aligns to the policy itself
    actor_logprobs: Tensor  # [tokens], log p_inf
    sequence_index: Tensor  # [tokens] int64, the completion of each
    normalizer: Tensor  # [tokens], Z; 1 without OBRS
    obrs_lambda: Tensor  # [tokens], λ; 0, which rejects nothing, without OBRS
    reference_logprobs: Tensor | None = None  # [tokens], log p_ref where the target is the policy


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights:
    """What multiplies each token's loss, and what it was before it was cut. No gradient."""

    value: Tensor  # [tokens]
    raw: Tensor  # [tokens], before truncation, for the record
    clipped: Tensor  # [tokens] bool, where value differs from raw, or raw from the ratio that it stands for
    clipped_c2: Tensor | None = None  # [tokens] bool, where p_ref/p_t was cut; None without such a factor


class Correction(Section):
    """Base of all corrections. A subclass has a ``name`` with a default, and says what a token's weight is."""

    compared_in_demo: ClassVar[bool] = False
    """Whether `jackpot demo --compare` runs it."""

    name: str

    def weights(self, tokens: SampledTokens) -> Weights:
        """The weight of each token.

        Masked tokens have weight 0 and stay in every denominator: s makes the mean over all sampled tokens an
        expectation under the policy, and leaving tokens out would undo that.
        """
        raise NotImplementedError

    @property
    def obrs(self) -> JackpotCorrection | None:
        """Settings of rejection sampling where tokens are rejected; None where all are kept."""
        return None


def target_ratio(
    target_logprobs: Tensor, actor_logprobs: Tensor, sequence_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = p_t/p_inf, and where its logarithm was cut at ± MAX_LOG_RATIO; [tokens] each.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        sequence_index: [tokens] int64, the completion of each token, for Π s over the completion at each of its
            tokens in place of the token's own s; None for the token's own.
    """
    log_ratio = target_logprobs.detach() - actor_logprobs.detach()
    if sequence_index is not None and log_ratio.numel():
        sums = log_ratio.double().new_zeros(int(sequence_index.max()) + 1)
        log_ratio = sums.index_add_(0, sequence_index, log_ratio.double())[sequence_index].to(log_ratio.dtype)
    beyond = log_ratio.abs() > MAX_LOG_RATIO
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), beyond


def masked_outside(raw: Tensor, beyond: Tensor, low: float, high: float) -> Weights:
    """``raw`` where low ≤ raw ≤ high, else 0. Arguments as :func:`target_ratio` returns them, [tokens] each."""
    outside = (raw < low) | (raw > high)
    return Weights(value=raw.masked_fill(outside, 0.0), raw=raw, clipped=outside | beyond)
