"""The job file's ``algorithm`` section: corrections, advantages, distillation, the joint objective."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from jackpot.config.section import NonNegativeFloat, Number, PositiveFloat, PositiveInt, Section


class NoCorrection(Section):
    """F(s) = 1: train as if the trajectories were the policy's own."""

    name: Literal["none"] = "none"


Level = Literal["token", "sequence"]


class IsCorrection(Section):
    """Importance sampling without a bound: F(s) = s (AReaL). Unbiased, and its variance has no limit."""

    name: Literal["is"] = "is"
    level: Level = "token"
    """``token`` takes s = p_ref/p_inf of each token; ``sequence`` the product of s over the completion at each of its
    tokens, which is unbiased for the whole completion but as good as useless beyond short ones."""


class TisCorrection(Section):
    """Truncated importance sampling: F(s) = min(s, C) (Flash-RL, LlamaRL)."""

    name: Literal["tis"] = "tis"
    cap: PositiveFloat = 2.0
    """C. 2 is Flash-RL's value and verl's ``rollout_is_threshold``; TRL calls it the importance sampling cap."""
    level: Level = "token"
    """``token`` truncates s of each token; ``sequence`` the product of s over the completion."""


class IcepopCorrection(Section):
    """IcePop: F(s) = s where s lies in [low, high], else 0. Tokens outside carry no gradient but stay in the mean."""

    name: Literal["icepop"] = "icepop"
    low: NonNegativeFloat = 0.5
    """α. 0.5 is IcePop's published value. 0 leaves only the upper bound (TRL's ``token_mask``)."""
    high: PositiveFloat = 5.0
    """β. 5 is IcePop's published value."""

    @model_validator(mode="before")
    @classmethod
    def _low_and_high_in_one(cls, data: Any) -> Any:
        """``threshold: "0.5_5.0"``, as verl writes it, is short for low and high."""
        if not isinstance(data, dict) or "threshold" not in data:
            return data
        low, underscore, high = str(data["threshold"]).partition("_")
        if not underscore or "low" in data or "high" in data:
            raise ValueError(
                f"threshold = {data['threshold']!r} is not of the form low_high, or stands beside low or high. "
                "Write threshold: '0.5_5.0', or low and high"
            )
        rest = {key: value for key, value in data.items() if key != "threshold"}
        try:
            return rest | {"low": float(low), "high": float(high)}
        except ValueError:
            raise ValueError(f"threshold = {data['threshold']!r} is not two numbers. Write e.g. '0.5_5.0'") from None

    @model_validator(mode="after")
    def _ordered(self) -> IcepopCorrection:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}. Write the smaller one as low")
        return self


class MisCorrection(Section):
    """Masked importance sampling of whole completions: F = Π s where Π s ≤ C, else 0 (TRL's ``sequence_mask``)."""

    name: Literal["mis"] = "mis"
    cap: PositiveFloat = 2.0
    """C. 2, as for ``tis``, so that the two differ in one thing."""
    low: NonNegativeFloat = 0.0
    """Completions whose Π s is smaller count nothing either. 0 keeps them: they are bounded as they are."""

    @model_validator(mode="after")
    def _ordered(self) -> MisCorrection:
        if self.low >= self.cap:
            raise ValueError(f"low = {self.low:g} is not below cap = {self.cap:g}. Lower low")
        return self


class JackpotCorrection(Section):
    """Optimal budgeted rejection sampling (paper §3 and §4)."""

    name: Literal["jackpot"] = "jackpot"
    obrs_lambda: PositiveFloat | None = 1.0
    """λ: larger rejects more and aligns more. At 1 a token is rejected just as far as the actor over-represents it.
    null with ``acceptance_rate``."""
    acceptance_rate: Annotated[float, Field(gt=0, le=1), Number] | None = None
    """Instead of λ: the share of tokens to accept. λ is then found for it on every batch, from 1 as a start, and
    published with the weights. 0.9 spends a tenth of the tokens on alignment."""
    lambda_smoothing: Annotated[float, Field(ge=0, lt=1), Number] = 0.5
    """Weight of the past in log λ while ``acceptance_rate`` steers it: a batch's λ is noisy, and the mismatch drifts
    within a few steps."""
    lambda_min: PositiveFloat = 1e-3
    """Least λ that ``acceptance_rate`` may lead to: practically, everything is accepted."""
    lambda_max: PositiveFloat = 1e3
    """Greatest λ that ``acceptance_rate`` may lead to."""
    c1: PositiveFloat = 3.0
    """Upper clip of the weight Z·max(λ, p_t/p_inf). 3 cuts one or two tokens in a thousand in our studies, whose
    accuracies do not separate it from 1 or from none (docs/experiments)."""
    c2: PositiveFloat = 3.0
    """Upper clip of p_ref/p_t; only used with target = policy."""
    target: Literal["reference", "policy"] = "reference"
    """What OBRS aligns to. ``policy`` is for many optimizer steps per rollout batch; it keeps top-k on the bus."""
    mask: Literal["bernoulli", "expected"] = "bernoulli"
    """``bernoulli`` draws acceptance; ``expected`` multiplies by its probability: same mean, less noise. The default
    is the paper's: 32 pairs of runs do not separate the two, though they lean to the other (docs/experiments)."""
    normalizer: Literal["tail", "union_tail", "union_kappa", "full"] = "tail"
    """Estimator of Z. ``tail`` needs nothing but the actor's returned top-k. The other three run the actor's forward
    pass in the scorer; ``full`` looks at the whole vocabulary (tests, small models)."""
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

    @property
    def initial_lambda(self) -> float:
        """λ of the first batch."""
        return 1.0 if self.obrs_lambda is None else self.obrs_lambda

    @model_validator(mode="after")
    def _target_policy_has_no_actor_forward(self) -> JackpotCorrection:
        if self.target == "policy" and self.normalizer in ("union_tail", "full"):
            raise ValueError(
                f"normalizer = {self.normalizer!r} needs the actor's forward pass beside the target's, which "
                "target = 'policy' does not have. Use normalizer 'tail' or 'union_kappa', or target 'reference'"
            )
        return self


def _name_alone(value: Any) -> Any:
    """``correction: tis`` is short for ``correction: {name: tis}``; without a name it is the default, jackpot."""
    if isinstance(value, str):
        return {"name": value}
    return {"name": "jackpot", **value} if isinstance(value, dict) else value


CorrectionName = Literal["none", "is", "tis", "icepop", "mis", "jackpot"]
CORRECTION_NAMES: tuple[str, ...] = get_args(CorrectionName)
_Corrections = Annotated[
    NoCorrection | IsCorrection | TisCorrection | IcepopCorrection | MisCorrection | JackpotCorrection,
    Field(discriminator="name"),
]
CorrectionConfig = Annotated[
    _Corrections,
    BeforeValidator(_name_alone, json_schema_input_type=CorrectionName | _Corrections),
]


class AdvantageConfig(Section):
    """Advantages: how much better a completion was than could be expected."""

    name: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = "grpo"
    """``grpo``: (reward − group mean) / group standard deviation, the paper's. ``dr_grpo``: reward − group mean.
    ``rloo``: reward − mean of the group's other rewards. ``reinforce_plus_plus``: rewards whitened over the batch's
    tokens, without groups. ``reinforce_plus_plus_baseline``: reward − group mean, whitened likewise."""
    normalize_std: bool = True
    """Only for ``grpo``: false leaves the differences as they are, which is ``dr_grpo``."""
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal before scoring (DAPO's dynamic sampling); they are counted as
    ``zero_variance`` and their slots go to the next prompts. Off, because such groups do distil the actor, and because
    a task that is solved, or hopeless, has no others: the run would wait for its batch in vain."""

    @model_validator(mode="after")
    def _std_is_grpos(self) -> AdvantageConfig:
        if self.name != "grpo" and not self.normalize_std:
            raise ValueError(
                f"normalize_std = false means nothing to {self.name!r}. Leave it out, or use the name 'dr_grpo'"
            )
        return self


class KlPenaltyConfig(Section):
    """A penalty on KL(policy ‖ initial policy), against forgetting what the initial policy could do."""

    weight: NonNegativeFloat = 0.0
    """β. 0 is off, as in the paper, and then no copy of the initial policy is kept; GRPO used 0.04."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """How KL is estimated from the sampled token, with r = p_initial/p_new: ``k1`` is −log r, ``k2`` is ½ (log r)²,
    ``k3`` is r − 1 − log r: unbiased as k1 is, never negative, and GRPO's. The gradient of k1 itself has mean zero, so
    k1 takes that of k2, which is the gradient of KL on the policy's own samples."""


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
    """How the mismatch between actor and policy is corrected: ``jackpot``, or a baseline: ``none``, ``is``, ``tis``,
    ``icepop``, ``mis``."""
    denominator: Literal["accepted", "all"] = "accepted"
    """What the sum of token losses is divided by: accepted tokens estimate the expectation under the policy;
    all tokens shrink it by Z."""
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
    advantage: AdvantageConfig = AdvantageConfig()
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
