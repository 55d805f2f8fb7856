"""Jackpot: optimal budgeted rejection sampling, and the weights of accepted tokens (paper §3 and §4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from jackpot.algorithm.corrections.base import Correction, SampledTokens, Weights
from jackpot.section import Number, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

NormalizerName = Literal["tail", "union_tail", "union_kappa", "full", "none"]


class JackpotCorrection(Correction):
    """Optimal budgeted rejection sampling (paper §3 and §4).

    A token is accepted with probability a = min(1, s/λ), and then has weight
    ρ = min(Z · max(λ, s), c1) · min(p_ref/p_t, c2).
    """

    compared_in_demo: ClassVar[bool] = True

    name: Literal["jackpot"] = "jackpot"
    obrs_lambda: PositiveFloat | None = 1.0
    """λ: larger rejects more and aligns more. At 1 a token is rejected exactly as far as the actor over-represents it.
    null with ``acceptance_rate``."""
    acceptance_rate: Annotated[float, Field(gt=0, le=1), Number] | None = None
    """Instead of λ: the minimum share of tokens to accept. Every batch then determines λ, starting from 1, and λ is
    published with the weights. 0.9 spends up to a tenth of the tokens on alignment. The rate is a floor, not a quota:
    λ stops at the batch's max s, where alignment is complete, so that hardly any token is rejected when actor and
    policy agree."""
    lambda_smoothing: Annotated[float, Field(ge=0, lt=1), Number] = 0.5
    """Weight of the past in log λ while ``acceptance_rate`` controls it: a batch's λ is noisy, and the mismatch drifts
    within a few steps."""
    lambda_min: PositiveFloat = 1e-3
    """Least λ that ``acceptance_rate`` may set; practically every token is then accepted."""
    lambda_max: PositiveFloat = 1e3
    """Greatest λ that ``acceptance_rate`` may set."""
    c1: PositiveFloat = 3.0
    """Upper clip of the weight Z·max(λ, p_t/p_inf). 3 cuts one or two tokens in a thousand in our studies, and their
    accuracies do not distinguish it from 1 or from no clip (docs/experiments)."""
    c2: PositiveFloat = 3.0
    """Upper clip of p_ref/p_t; used only with target = policy."""
    target: Literal["reference", "policy"] = "reference"
    """The distribution that OBRS aligns to. ``policy`` is for many optimizer steps per rollout batch; it keeps top-k on
    the bus."""
    mask: Literal["bernoulli", "expected"] = "bernoulli"
    """``bernoulli`` draws acceptance; ``expected`` multiplies by its probability: same mean, less noise. The default
    is the paper's: 32 pairs of runs do not distinguish the two, though they lean towards ``expected``
    (docs/experiments)."""
    normalizer: NormalizerName = "tail"
    """Estimator of Z. ``tail`` needs only the actor's returned top-k. ``union_tail``, ``union_kappa`` and ``full`` run
    the actor's forward pass in the scorer; ``full`` reads the whole vocabulary (tests, small models). ``none`` leaves Z
    out of the weight. With Z each position counts in proportion to it (the paper's soft trust region); without it and
    with ``denominator: all`` all positions count equally, at a higher variance. The metrics then show the Z of
    ``tail``."""
    top_k: Annotated[int, Field(ge=1, le=1024), Number] = 20
    """How many of the target's most probable tokens enter the estimate (paper §4.4)."""

    @model_validator(mode="before")
    @classmethod
    def _lambda_or_acceptance_rate(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("acceptance_rate") is None:
            return data
        if data.get("obrs_lambda") is not None:
            raise ValueError(
                f"obrs_lambda = {data['obrs_lambda']!r} and acceptance_rate = {data['acceptance_rate']!r} exclude each "
                "other, since the rate decides λ. Remove one of them, or set obrs_lambda to null"
            )
        return data | {"obrs_lambda": None}

    @model_validator(mode="after")
    def _lambda_is_known(self) -> JackpotCorrection:
        if self.obrs_lambda is None and self.acceptance_rate is None:
            raise ValueError("obrs_lambda = null needs an acceptance_rate. Set either of them")
        if not self.lambda_min < 1 < self.lambda_max:
            raise ValueError("lambda_min and lambda_max must lie on either side of 1. Widen them")
        return self

    @model_validator(mode="after")
    def _target_policy_has_no_actor_forward(self) -> JackpotCorrection:
        if self.target == "policy" and self.normalizer in ("union_tail", "full"):
            raise ValueError(
                f"normalizer = {self.normalizer!r} needs the actor's forward pass beside the target's, which "
                "target = 'policy' does not have. Use normalizer 'tail' or 'union_kappa', or target 'reference'"
            )
        return self

    @property
    def initial_lambda(self) -> float:
        """λ of the first batch."""
        return 1.0 if self.obrs_lambda is None else self.obrs_lambda

    @property
    def needs_actor_forward(self) -> bool:
        """Whether the estimate of Z needs the actor's forward pass in the scorer."""
        return self.normalizer not in ("tail", "none")

    @property
    def needs_candidates(self) -> bool:
        """Whether the estimate of Z needs the actor's returned top-k."""
        return self.normalizer != "full"

    @property
    def obrs(self) -> JackpotCorrection:
        """These settings."""
        return self

    def weights(self, tokens: SampledTokens) -> Weights:
        """ρ, to be multiplied by the mask."""
        return jackpot_weights(
            tokens.target_logprobs,
            tokens.actor_logprobs,
            tokens.normalizer.new_ones(tokens.normalizer.shape) if self.normalizer == "none" else tokens.normalizer,
            obrs_lambda=tokens.obrs_lambda,
            c1=self.c1,
            reference_logprobs=tokens.reference_logprobs,
            c2=None if tokens.reference_logprobs is None else self.c2,
        )


def jackpot_weights(
    target_logprobs: Tensor,
    actor_logprobs: Tensor,
    normalizer: Tensor,
    *,
    obrs_lambda: float | Tensor,
    c1: float,
    reference_logprobs: Tensor | None = None,
    c2: float | None = None,
) -> Weights:
    """ρ = min(Z · max(λ, p_t/p_inf), c1) · min(p_ref/p_t, c2); Algorithm 1, eq. 5.

    The weights are meant for accepted tokens. Rejected tokens have weights too, which their mask removes.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        normalizer: Z, [tokens].
        obrs_lambda: λ > 0; [tokens] if it differs between them, as in a batch that spans a change of λ.
        c1: upper clip of w_obrs; ``math.inf`` for none.
        reference_logprobs: log p_ref, [tokens], if the target is the policy. None if the target is the reference
            itself: the second factor is then 1.
        c2: upper clip of p_ref/p_t; None for none.

    Returns:
        The weights, without gradient.
    """
    import torch

    log_ratio = target_logprobs.detach() - actor_logprobs.detach()
    log_lambda = torch.as_tensor(obrs_lambda, dtype=log_ratio.dtype, device=log_ratio.device).log()
    raw = normalizer.detach() * torch.maximum(log_ratio, log_lambda).exp()
    value = torch.clamp(raw, max=c1)
    clipped_c2: Tensor | None = None
    if reference_logprobs is not None:
        reference_ratio = (reference_logprobs.detach() - target_logprobs.detach()).exp()
        limit = math.inf if c2 is None else c2
        clipped_c2 = reference_ratio > limit
        value = value * torch.clamp(reference_ratio, max=limit)
    return Weights(value=value, raw=raw, clipped=raw > c1, clipped_c2=clipped_c2)
