"""The interface of corrections: settings from the job file, and the weight of each sampled token. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jackpot.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from jackpot.algorithm.corrections.jackpot import JackpotCorrection

MAX_LOG_RATIO = 20.0
"""Logarithms of ratios are cut at this value (a ratio of 5e8; verl has the same bound) and reported as clipped.
Products over long completions exceed the range of float32, and one infinite weight would spoil the whole batch's
gradient."""

Level = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampledTokens:
    """The inputs of a correction. No gradient flows through them."""

    target_logprobs: Tensor  # [tokens], log p_t: log p_ref, unless OBRS aligns to the policy itself
    actor_logprobs: Tensor  # [tokens], log p_inf
    sequence_index: Tensor  # [tokens] int64, the completion of each
    normalizer: Tensor  # [tokens], Z; 1 without OBRS
    obrs_lambda: Tensor  # [tokens], λ; without OBRS 0, which rejects nothing
    reference_logprobs: Tensor | None = None  # [tokens], log p_ref if the target is the policy


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights:
    """The factor of each token's loss, and its value before truncation. No gradient."""

    value: Tensor  # [tokens]
    raw: Tensor  # [tokens], before truncation, for metrics
    clipped: Tensor  # [tokens] bool, where value differs from raw, or raw from the exact ratio
    clipped_c2: Tensor | None = None  # [tokens] bool, where p_ref/p_t was cut; None without such a factor


class Correction(Section):
    """Base of all corrections. A subclass has a ``name`` with a default and computes the tokens' weights."""

    compared_in_demo: ClassVar[bool] = False
    """Whether `jackpot demo --compare` runs this correction."""

    name: str

    def weights(self, tokens: SampledTokens) -> Weights:
        """The weight of each token.

        Masked tokens have weight 0 and stay in every denominator: the factor s makes the mean over all sampled tokens
        an expectation under the policy, and leaving tokens out would undo that.
        """
        raise NotImplementedError

    @property
    def obrs(self) -> JackpotCorrection | None:
        """The settings of rejection sampling; None if the correction keeps all tokens."""
        return None


def target_ratio(
    target_logprobs: Tensor, actor_logprobs: Tensor, sequence_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = p_t/p_inf, and whether its logarithm was cut at ± MAX_LOG_RATIO; [tokens] each.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        sequence_index: [tokens] int64, the completion of each token. Every token then gets Π s over its completion.
            None: every token gets its own s.
    """
    log_ratio = target_logprobs.detach() - actor_logprobs.detach()
    if sequence_index is not None and log_ratio.numel():
        sums = log_ratio.double().new_zeros(int(sequence_index.max()) + 1)
        log_ratio = sums.index_add_(0, sequence_index, log_ratio.double())[sequence_index].to(log_ratio.dtype)
    beyond = log_ratio.abs() > MAX_LOG_RATIO
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), beyond


def masked_outside(raw: Tensor, beyond: Tensor, low: float, high: float) -> Weights:
    """``raw`` where low ≤ raw ≤ high, else 0. Arguments as returned by :func:`target_ratio`, [tokens] each."""
    outside = (raw < low) | (raw > high)
    return Weights(value=raw.masked_fill(outside, 0.0), raw=raw, clipped=outside | beyond)
