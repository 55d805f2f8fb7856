"""The job file's ``algorithm`` section: corrections, advantages, distillation, the joint objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from jackpot.algorithm.advantages import ADVANTAGES, Advantage
from jackpot.algorithm.advantages.grpo import GrpoAdvantage
from jackpot.algorithm.corrections import CORRECTIONS, Correction
from jackpot.algorithm.corrections.jackpot import JackpotCorrection
from jackpot.algorithm.registry import union_by_name
from jackpot.section import NonNegativeFloat, Number, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:  # what a type checker sees of the unions, whose members only the packages know
    CorrectionConfig = Correction
    AdvantageConfig = Advantage
else:
    CorrectionConfig = union_by_name(CORRECTIONS, default="jackpot")
    AdvantageConfig = union_by_name(ADVANTAGES, default="grpo")

NAMED_SECTIONS = {"correction": frozenset(CORRECTIONS), "advantage": frozenset(ADVANTAGES)}
"""Settings that may be written as a name alone, and the names that there are."""


class KlPenaltyConfig(Section):
    """A penalty on KL(policy ‖ initial policy), against forgetting what the initial policy could do."""

    weight: NonNegativeFloat = 0.0
    """β. 0 is off, as in the paper, and then no copy of the initial policy is kept; GRPO used 0.04."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """How KL is estimated from the sampled token, with r = p_initial/p_new: ``k1`` is −log r, ``k2`` is ½ (log r)²,
    ``k3`` is r − 1 − log r: unbiased as k1 is, never negative, and GRPO's. That decides the value in the metrics alone.
    The gradient is k2's for all three, which is that of the KL on the policy's own samples; k1's own has mean zero, and
    k3's own is that of the KL the other way round."""
    applied_to: Literal["loss", "reward"] = "loss"
    """``loss`` adds β·KL to the policy's loss. ``reward`` takes β·Σ log(p_ref/p_initial) over a completion off its
    reward before advantages are made: then continuations count as well, and what ``advantage`` does to rewards (a
    baseline, a division by the deviation) it does to the penalty. ``filter_zero_variance`` looks at the task's rewards
    alone."""


class DistillationConfig(Section):
    """L_distill: forward KL from policy to actor at the trajectories' positions (paper eq. 7)."""

    weight: NonNegativeFloat = 1.0
    """λ_distill; with ``kl_target``, where it starts. 1 weighs a nat of KL like a unit of the actor's own loss."""
    kl_target: PositiveFloat | None = None
    """Set point of KL(policy ‖ actor), in nats per token, which λ_distill then follows; null keeps it constant. The KL
    cannot fall below what the actor's size and learning rate allow: choose it above what a constant 3 leads to. An
    actor within twice the set point learns the more slowly the nearer it is, and below it not at all, until the policy
    moves on."""
    weight_min: PositiveFloat = 0.1
    """Least λ_distill that ``kl_target`` may lead to. Below, distillation counts next to nothing beside the actor's own
    loss, and the way back would only be longer."""
    weight_max: PositiveFloat = 3.0
    """Greatest λ_distill that ``kl_target`` may lead to. Beyond, the actor's own loss hardly counts, AdamW takes no
    notice of the scale of what is left, and the gradient is clipped for its size: with 10 some runs ran away."""
    proportional_gain: NonNegativeFloat = 0.5
    """Change of log λ_distill per unit of log(KL / target): answers at once."""
    integral_gain: NonNegativeFloat = 0.1
    """The same, summed up over optimizer steps: takes away what the proportional part leaves. Ten steps at a KL too
    large by a factor e multiply λ_distill by e; faster would overtake the actor, which needs steps to follow."""
    kl_smoothing: Annotated[float, Field(ge=0, lt=1), Number] = 0.8
    """Weight of the past in the measured log KL. A batch's KL is off by 20 to 30 % in the demo, by which the actor's
    pace must not jump; five steps' delay do no harm."""
    chunk_tokens: PositiveInt = 512
    """Positions per slice of the full-vocabulary KL."""

    @model_validator(mode="after")
    def _start_within_bounds(self) -> DistillationConfig:
        if self.kl_target is not None and not self.weight_min <= self.weight <= self.weight_max:
            raise ValueError(
                f"weight = {self.weight:g} is where kl_target starts and must lie in [weight_min, weight_max] = "
                f"[{self.weight_min:g}, {self.weight_max:g}]. Move it or the bounds"
            )
        return self


class AlgorithmConfig(Section):
    """The joint objective."""

    correction: CorrectionConfig = Field(default_factory=JackpotCorrection)
    """How the mismatch between actor and policy is corrected: ``jackpot``, or a baseline."""
    denominator: Literal["accepted", "all"] = "accepted"
    """What the sum of token losses is divided by: the accepted tokens or all. At one position ``accepted`` estimates
    the expectation under the policy, and ``all`` Z times it. Over positions both weigh each by its own Z. The mean
    that counts positions alike is ``all`` with ``correction.normalizer: none``."""
    loss_normalization: Literal["token", "sequence", "constant"] = "token"
    """``token``: the mean over the batch's tokens, each counting the same (the paper, DAPO). ``sequence``: the mean
    over completions of each one's mean (GRPO), where tokens of long completions count less. ``constant``: the sum over
    a completion divided by ``loss_constant_length`` for all alike (Dr. GRPO), so that length carries no reward."""
    loss_constant_length: PositiveInt | None = None
    """The divisor of ``constant``; null is ``sampling.max_tokens``."""
    clip_low: PositiveFloat | None = 0.2
    """ε below: the ratio is clipped at 1 − ε. null removes the clip."""
    clip_high: PositiveFloat | None = 0.2
    """ε above: the ratio is clipped at 1 + ε. null removes the clip."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False), Number] | None = 1e4
    """c: a token with a negative advantage counts at most c·|A|; clip_low and clip_high leave it without a bound (Ye et
    al. 2020). 10,000 acts on nothing but a fault: in five runs on samples up to 127 versions old the largest ratio was
    476, while one token with p_ref = e⁻⁴⁰ counts 6.5e13. verl's 3 is a trust region. null removes the bound."""
    advantage: AdvantageConfig = Field(default_factory=GrpoAdvantage)
    """Advantage estimator."""
    kl_penalty: KlPenaltyConfig = KlPenaltyConfig()
    """Penalty on the distance from the initial policy."""
    actor_ppo: bool = True
    """Whether the actor also follows its own PPO loss (paper eq. 6)."""
    actor_cap: PositiveFloat = 2.0
    """Truncation of the actor's own correction p_ω,ref/p_inf, which is staleness and numerics only."""
    distillation: DistillationConfig = DistillationConfig()
    """Policy → actor distillation."""

    @model_validator(mode="after")
    def _kl_target_needs_something_to_weigh_against(self) -> AlgorithmConfig:
        if self.distillation.kl_target is not None and not self.actor_ppo:
            raise ValueError(
                "distillation.kl_target needs actor_ppo: AdamW takes no notice of the scale of a single loss, so that "
                "λ_distill alone moves nothing. Set actor_ppo to true, or steer with learner.actor_lr"
            )
        return self
