"""The weight, mask and normalizer of every token of a batch, for each correction (paper eq. 5, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from jackpot.algorithm.correction import (
    Weights,
    icepop_weights,
    is_weights,
    mis_weights,
    no_weights,
    tis_weights,
)
from jackpot.algorithm.normalizer import calibrate, mean_acceptance, normalizer_with
from jackpot.algorithm.obrs import jackpot_weights
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.config import (
    CorrectionConfig,
    IcepopCorrection,
    IsCorrection,
    JackpotCorrection,
    MisCorrection,
    TisCorrection,
)
from jackpot.scoring.tokens import TokenArrays


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenWeights:
    """What multiplies each token's loss. N tokens; nothing here carries a gradient."""

    weight: Tensor  # [N] float32, ρ after clipping
    raw_weight: Tensor  # [N] float32, ρ before clipping
    clipped_c1: Tensor  # [N] bool; without OBRS, where the correction's own bound cut or masked it
    clipped_c2: Tensor  # [N] bool
    mask: Tensor  # [N] float32, Bernoulli draw or acceptance probability; 1 without OBRS
    acceptance_probs: Tensor  # [N] float32
    normalizer: Tensor  # [N] float32, Z
    topk_mass: Tensor  # [N] float32
    target_logprobs: Tensor  # [N] float32, log p_t
    obrs_lambda: Tensor  # [N] float32, λ; 0, which rejects nothing, without OBRS
    bias_correction: float  # κ or τ, before τ is clipped to [0, 1]

    def select(self, index: Tensor) -> TokenWeights:
        """The weights at the given token positions."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenWeights(**values | {name: v[index] for name, v in values.items() if isinstance(v, Tensor)})

    def split(self, counts: Sequence[int]) -> list[TokenWeights]:
        """Consecutive parts of so many tokens each."""
        positions = torch.split(torch.arange(sum(counts)), list(counts))
        return [self.select(index) for index in positions]


def reference_target_weights(tokens: TokenArrays, correction: CorrectionConfig, ranks: Ranks = SOLO) -> TokenWeights:
    """Weights of a whole batch from what the scorer found; target = reference, or no OBRS at all.

    Args:
        tokens: the batch.
        correction: which correction.
        ranks: whose other members may lack tokens; those get no meaningful weights there.
    """
    if correction.name == "jackpot":
        return obrs_weights(tokens, correction, reference_logprobs=None, ranks=ranks)
    found = _plain_weights(tokens, correction)
    ones = torch.ones_like(found.value)
    return TokenWeights(
        weight=found.value,
        raw_weight=found.raw,
        clipped_c1=found.clipped,
        clipped_c2=torch.zeros_like(found.clipped),
        mask=ones,
        acceptance_probs=ones,
        normalizer=ones,
        topk_mass=tokens.topk_mass,
        target_logprobs=tokens.reference_logprobs,
        obrs_lambda=torch.zeros_like(ones),
        bias_correction=1.0,
    )


def _plain_weights(tokens: TokenArrays, correction: CorrectionConfig) -> Weights:
    """F of a correction without rejection. Masked tokens have weight 0 and stay in every denominator: s makes the
    mean over all sampled tokens an expectation under the policy, and leaving tokens out would undo that."""
    logprobs = tokens.reference_logprobs, tokens.actor_logprobs
    match correction:
        case IsCorrection():
            return is_weights(*logprobs, sequence_index=_sequences(tokens, correction.level))
        case TisCorrection():
            return tis_weights(*logprobs, cap=correction.cap, sequence_index=_sequences(tokens, correction.level))
        case IcepopCorrection():
            return icepop_weights(*logprobs, low=correction.low, high=correction.high)
        case MisCorrection():
            return mis_weights(*logprobs, sequence_index=tokens.sequence_index, cap=correction.cap, low=correction.low)
        case _:
            return no_weights(*logprobs)


def _sequences(tokens: TokenArrays, level: Literal["token", "sequence"]) -> Tensor | None:
    return tokens.sequence_index if level == "sequence" else None


def obrs_weights(
    tokens: TokenArrays, correction: JackpotCorrection, reference_logprobs: Tensor | None, ranks: Ranks = SOLO
) -> TokenWeights:
    """Jackpot's weights, with the batch scalar of Z calibrated over exactly these tokens.

    Args:
        tokens: acceptance, mask, λ and normalizer ingredients belong to the target; its log-probabilities stand in
            ``reference_logprobs`` of the arrays when the target is the reference.
        correction: clips, mask and estimator.
        reference_logprobs: log p_ref when the target is the policy (``tokens.reference_logprobs`` then holds the
            target's), else None.
        ranks: rank 0 has all of the batch's tokens and calibrates for the others, which may lack some.
    """
    head, tail, name = tokens.normalizer_head, tokens.normalizer_tail, correction.normalizer
    scalar = torch.tensor(calibrate(head, tail, name, mean_acceptance(tokens.acceptance_probs)), dtype=torch.float64)
    ranks.of_rank_0_(scalar)
    normalizer = normalizer_with(head, tail, name, float(scalar))
    found = jackpot_weights(
        tokens.reference_logprobs,
        tokens.actor_logprobs,
        normalizer.value,
        obrs_lambda=tokens.obrs_lambda,
        c1=correction.c1,
        reference_logprobs=reference_logprobs,
        c2=None if reference_logprobs is None else correction.c2,
    )
    return TokenWeights(
        weight=found.value,
        raw_weight=found.raw,
        clipped_c1=found.clipped,
        clipped_c2=found.clipped_c2,
        mask=tokens.acceptance_probs if correction.mask == "expected" else tokens.mask,
        acceptance_probs=tokens.acceptance_probs,
        normalizer=normalizer.value,
        topk_mass=tokens.topk_mass,
        target_logprobs=tokens.reference_logprobs,
        obrs_lambda=tokens.obrs_lambda,
        bias_correction=normalizer.raw_scalar,
    )
