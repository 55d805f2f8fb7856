"""The columns of ``metrics.jsonl`` and the gauges that show them.

Columns have the names of verl's trackers where the meaning is the same. There are raw and clipped values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepColumn:
    """A column of ``metrics.jsonl`` and the gauge that shows its newest value.

    ``labels`` distinguish gauges of one name, e.g. the policy's and the actor's gradient norm.
    """

    gauge: str
    description: str
    labels: Mapping[str, str] | None = None


def _of(model: str) -> Mapping[str, str]:
    return {"model": model}


def _kl(obrs: str, method: str) -> Mapping[str, str]:
    return {"obrs": obrs, "method": method}


_TARGET_KL = "KL(p_target || sampled from) per token, before OBRS and of the tokens that it accepts"
_CANARY = "Difference of a token's log-probability from the engine to that of its version, passed again"
_LOSS = "Loss of the last optimizer step"
_GRAD_NORM = "Gradient norm before clipping"
_LR = "Learning rate"
_CLIPPED = "Fraction of tokens whose weight was clipped"
_PHASE = "Wall time of one phase of the last batch"

STEP_COLUMNS: Mapping[str, StepColumn] = {
    "reward/mean": StepColumn("jackpot_reward_mean", "Mean reward of the batch's trajectories"),
    "reward/std": StepColumn("jackpot_reward_std", "Standard deviation of the batch's rewards"),
    "policy/loss": StepColumn("jackpot_loss", _LOSS, {"loss": "policy"}),
    "policy/grad_norm": StepColumn("jackpot_grad_norm", _GRAD_NORM, _of("policy")),
    "policy/clip_fraction": StepColumn(
        "jackpot_policy_clip_ratio", "Fraction of tokens whose importance ratio was clipped"
    ),
    "policy/dual_clip_fraction": StepColumn(
        "jackpot_policy_dual_clip_ratio", "Fraction of tokens with a negative advantage whose loss was bounded"
    ),
    "policy/entropy": StepColumn("jackpot_policy_entropy_nats", "Mean entropy of the policy per token, in nats"),
    "policy/kl_initial": StepColumn(
        "jackpot_policy_initial_kl_nats", "KL(policy || initial policy) per token, estimated; only with a KL penalty"
    ),
    "policy/kl_initial_clipped_fraction": StepColumn(
        "jackpot_policy_initial_kl_clipped_ratio",
        "Fraction of tokens whose log-ratio to the initial policy was cut; with a KL penalty alone",
    ),
    "policy/lr": StepColumn("jackpot_learning_rate", _LR, _of("policy")),
    "actor/ppo_loss": StepColumn("jackpot_loss", _LOSS, {"loss": "actor_ppo"}),
    "actor/distill_loss": StepColumn("jackpot_loss", _LOSS, {"loss": "actor_distill"}),
    "actor/distill_weight": StepColumn("jackpot_distill_weight", "Weight of distillation in the actor's loss"),
    "actor/grad_norm": StepColumn("jackpot_grad_norm", _GRAD_NORM, _of("actor")),
    "actor/lr": StepColumn("jackpot_learning_rate", _LR, _of("actor")),
    "rollout/canary_max_difference": StepColumn(
        "jackpot_canary_difference_nats",
        _CANARY,
        {"statistic": "max"},
    ),
    "rollout/canary_rms_difference": StepColumn(
        "jackpot_canary_difference_nats",
        _CANARY,
        {"statistic": "rms"},
    ),
    "rollout/canary_tokens": StepColumn("jackpot_canary_tokens", "Tokens of the batch that were passed again"),
    "rollout_corr/kl": StepColumn(
        "jackpot_rollout_kl_nats", "E[log p_inf - log p_ref] at sampled tokens: drift of sampling from scoring"
    ),
    "rollout_corr/k3_kl": StepColumn("jackpot_rollout_k3_kl_nats", "The same KL by the k3 estimator: never negative"),
    "rollout_corr/rollout_is_eff_sample_size": StepColumn(
        "jackpot_effective_sample_ratio", "Effective sample size of the token weights, over their number"
    ),
    "rollout_corr/rollout_is_max": StepColumn("jackpot_importance_ratio_max", "Largest p_ref/p_inf, not clipped"),
    "rollout_corr/kl_before": StepColumn("jackpot_target_kl_nats", _TARGET_KL, _kl("before", "estimate")),
    "rollout_corr/kl_after": StepColumn("jackpot_target_kl_nats", _TARGET_KL, _kl("after", "estimate")),
    "rollout_corr/kl_before_exact": StepColumn("jackpot_target_kl_nats", _TARGET_KL, _kl("before", "exact")),
    "rollout_corr/kl_after_exact": StepColumn("jackpot_target_kl_nats", _TARGET_KL, _kl("after", "exact")),
    **{
        f"rollout_corr/target_ratio_{quantile}": StepColumn(
            "jackpot_target_ratio",
            "Quantile of p_target/p_inf over sampled tokens, not clipped",
            {"quantile": quantile},
        )
        for quantile in ("p01", "p10", "p50", "p90", "p99")
    },
    "rollout_corr/obrs_acceptance_rate": StepColumn(
        "jackpot_obrs_acceptance_ratio", "Mean acceptance probability a(x)"
    ),
    "rollout_corr/obrs_accepted_fraction": StepColumn(
        "jackpot_obrs_accepted_ratio", "Fraction of tokens whose draw was accepted"
    ),
    "rollout_corr/obrs_normalizer": StepColumn("jackpot_obrs_normalizer_mean", "Mean normalizer Z"),
    "rollout_corr/obrs_bias_correction": StepColumn(
        "jackpot_obrs_bias_correction", "Batch scalar that calibrates Z: kappa or tau"
    ),
    "rollout_corr/obrs_topk_mass": StepColumn(
        "jackpot_obrs_topk_mass_ratio", "Target probability covered by the ids looked at"
    ),
    "rollout_corr/obrs_lambda": StepColumn("jackpot_obrs_lambda", "OBRS's lambda of the batch"),
    "rollout_corr/obrs_lambda_next": StepColumn(
        "jackpot_obrs_lambda_next", "OBRS's lambda published with the weights of this step"
    ),
    "rollout_corr/weight_mean": StepColumn("jackpot_weight_mean", "Mean correction weight of a token, clipped"),
    "rollout_corr/weight_raw_max": StepColumn("jackpot_weight_raw_max", "Largest correction weight before clipping"),
    "rollout_corr/clipped_fraction_c1": StepColumn("jackpot_weight_clipped_ratio", _CLIPPED, {"clip": "c1"}),
    "rollout_corr/clipped_fraction_c2": StepColumn("jackpot_weight_clipped_ratio", _CLIPPED, {"clip": "c2"}),
    "rollout_corr/nonfinite": StepColumn("jackpot_nonfinite_tokens", "Tokens of the batch without a finite value"),
    "kl/policy_actor": StepColumn(
        "jackpot_policy_actor_kl_nats", "Exact KL(policy || actor) per token, from distillation"
    ),
    "staleness/mean": StepColumn("jackpot_staleness_mean_steps", "Mean optimizer steps from sampling to training"),
    "staleness/max": StepColumn("jackpot_staleness_max_steps", "Maximum optimizer steps from sampling to training"),
    "reference/age": StepColumn(
        "jackpot_reference_age_mean_steps",
        "Mean optimizer steps from the reference, the policy that scored, to training",
    ),
    "reference/age_max": StepColumn(
        "jackpot_reference_age_max_steps", "Maximum optimizer steps from the reference to training"
    ),
    "response/length_mean": StepColumn("jackpot_response_length_mean_tokens", "Mean completion length"),
    "response/truncated_fraction": StepColumn(
        "jackpot_response_truncated_ratio", "Fraction of completions cut off by the token limit"
    ),
    "response/cut_tokens": StepColumn(
        "jackpot_response_cut_tokens", "Tokens of the batch left out of the loss, beyond learner.max_sequence_tokens"
    ),
    "throughput/tokens_per_second": StepColumn(
        "jackpot_training_tokens_per_second", "Completion tokens trained per second of wall time"
    ),
    "time/wait_batch_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "wait_batch"}),
    "time/train_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "train"}),
    "time/publish_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "publish"}),
    "time/checkpoint_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "checkpoint"}),
    "time/step_seconds": StepColumn("jackpot_step_seconds", "Wall time of one optimizer step, including waiting"),
}
"""Every column of ``metrics.jsonl`` besides ``step`` and ``time``. A row lacks columns that do not apply to it."""
