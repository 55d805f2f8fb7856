"""The weight, mask and normalizer of every token of a batch, for each correction (paper eq. 5, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from jackpot.algorithm.corrections import Correction, SampledTokens
from jackpot.algorithm.corrections.jackpot import JackpotCorrection
from jackpot.algorithm.obrs import Normalizer, calibrate, mean_acceptance, normalizer_with
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.scoring.batch import TokenArrays


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenWeights:
    """What multiplies each token's loss. N tokens; nothing here carries a gradient."""

    weight: Tensor  # [N] float32, ρ after clipping
    raw_weight: Tensor  # [N] float32, ρ before clipping
    clipped_c1: Tensor  # [N] bool; without OBRS: where the correction's bound cut or masked the weight
    clipped_c2: Tensor  # [N] bool
    mask: Tensor  # [N] float32, Bernoulli draw or acceptance probability; 1 without OBRS
    acceptance_probs: Tensor  # [N] float32
    normalizer: Tensor  # [N] float32, Z
    topk_mass: Tensor  # [N] float32
    target_logprobs: Tensor  # [N] float32, log p_t
    obrs_lambda: Tensor  # [N] float32, λ; without OBRS 0, which rejects nothing
    bias_correction: float  # κ or τ, before τ is clipped to [0, 1]

    def select(self, index: Tensor) -> TokenWeights:
        """The weights at the given token positions."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenWeights(**values | {name: v[index] for name, v in values.items() if isinstance(v, Tensor)})

    def split(self, counts: Sequence[int]) -> list[TokenWeights]:
        """Consecutive parts with these numbers of tokens."""
        positions = torch.split(torch.arange(sum(counts)), list(counts))
        return [self.select(index) for index in positions]


def token_weights(
    tokens: TokenArrays,
    correction: Correction,
    reference_logprobs: Tensor | None = None,
    ranks: Ranks = SOLO,
) -> TokenWeights:
    """Weights of a whole batch, with the batch scalar of Z calibrated over exactly these tokens.

    Args:
        tokens: acceptance, mask, λ and normalizer ingredients belong to the target. ``reference_logprobs`` holds the
            target's log-probabilities.
        correction: the correction. Z, mask and λ matter only if it rejects tokens.
        reference_logprobs: log p_ref if the target is the policy, else None.
        ranks: rank 0 has all of the batch's tokens and calibrates for the others. Tokens that another rank lacks get
            meaningless weights there.
    """
    obrs = correction.obrs
    if obrs is None:
        ones = torch.ones_like(tokens.reference_logprobs)
        tokens = replace(tokens, acceptance_probs=ones, mask=ones, obrs_lambda=torch.zeros_like(ones))
        normalizer = Normalizer(value=ones, scalar=1.0, raw_scalar=1.0)
    else:
        normalizer = _normalizer(tokens, obrs, ranks)
    weights = correction.weights(
        SampledTokens(
            target_logprobs=tokens.reference_logprobs,
            actor_logprobs=tokens.actor_logprobs,
            sequence_index=tokens.sequence_index,
            normalizer=normalizer.value,
            obrs_lambda=tokens.obrs_lambda,
            reference_logprobs=reference_logprobs,
        )
    )
    return TokenWeights(
        weight=weights.value,
        raw_weight=weights.raw,
        clipped_c1=weights.clipped,
        clipped_c2=torch.zeros_like(weights.clipped) if weights.clipped_c2 is None else weights.clipped_c2,
        mask=tokens.acceptance_probs if obrs is not None and obrs.mask == "expected" else tokens.mask,
        acceptance_probs=tokens.acceptance_probs,
        normalizer=normalizer.value,
        topk_mass=tokens.topk_mass,
        target_logprobs=tokens.reference_logprobs,
        obrs_lambda=tokens.obrs_lambda,
        bias_correction=normalizer.raw_scalar,
    )


def _normalizer(tokens: TokenArrays, obrs: JackpotCorrection, ranks: Ranks) -> Normalizer:
    """Z of each token, with rank 0's scalar."""
    head, tail, name = tokens.normalizer_head, tokens.normalizer_tail, obrs.normalizer
    scalar = torch.tensor(calibrate(head, tail, name, mean_acceptance(tokens.acceptance_probs)), dtype=torch.float64)
    ranks.of_rank_0_(scalar)
    return normalizer_with(head, tail, name, float(scalar))
