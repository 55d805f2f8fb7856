"""One job: is the actor's text usable, does the policy learn, what holds it up, does every group arrive?"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.panels import GREEN, JOB, ORANGE, RED, Query, Row, curves, dashboard, distribution, figure, gauge
from dashboards.pipeline import LEDGER, PIPELINE

ACCEPTANCE = ((None, RED), (0.3, ORANGE), (0.6, GREEN))


HEAD = Row(
    "How is it going?",
    (
        figure(
            "Acceptance rate",
            "Mean probability with which a token of the actor is kept. The less, the more is sampled in vain.",
            gauge("jackpot_obrs_acceptance_ratio", "acceptance"),
            unit="percentunit",
            decimals=1,
            thresholds=ACCEPTANCE,
        ),
        figure(
            "Policy accuracy",
            "On held-out prompts, from the policy's own samples: what training is for.",
            gauge("jackpot_policy_accuracy_ratio", "accuracy"),
            unit="percentunit",
            decimals=1,
        ),
        figure(
            "Progress",
            "Optimizer steps made, of those planned.",
            Query(f"jackpot_step{{{JOB}}} / jackpot_planned_steps{{{JOB}}}", "done"),
            unit="percentunit",
            decimals=0,
        ),
        figure(
            "Optimizer steps",
            "Steps per hour, from the last step's wall time.",
            Query(f"3600 / jackpot_step_seconds{{{JOB}}}", "per hour"),
        ),
        figure(
            "Alarms",
            "Signs of collapse that last, by the bounds of the job file (section alarms).",
            Query(f"sum(jackpot_alarm_active{{{JOB}}})", "alarms"),
            thresholds=((None, GREEN), (1, RED)),
        ),
        figure(
            "Groups lost",
            "Groups that ended as an error, in the last hour.",
            Query(
                f"sum(increase(jackpot_groups_total{{{JOB},"
                'reason=~"rollout_failed|reward_failed|corrupt_payload|scoring_failed|lost"}[1h]))',
                "groups",
            ),
            decimals=0,
            thresholds=((None, GREEN), (1, ORANGE)),
        ),
    ),
)

OBRS = Row(
    "Is the actor's text usable? (OBRS)",
    (
        curves(
            "Acceptance rate",
            "Mean acceptance probability a(x) of a batch, and the fraction of its tokens whose draw was accepted.",
            gauge("jackpot_obrs_acceptance_ratio", "probability"),
            gauge("jackpot_obrs_accepted_ratio", "accepted"),
            unit="percentunit",
            high=1,
            thresholds=ACCEPTANCE,
        ),
        distribution(
            "Acceptance probability of tokens",
            "A second peak near 0 is text that the target would not write.",
            "jackpot_token_acceptance_ratio",
        ),
        distribution(
            "Target ratio p_target / p_inf of tokens",
            "1 where the models agree. Rejection brings the tail below 1 to the target; the tail above 1 is beyond it, "
            "and is weighted.",
            "jackpot_token_target_ratio",
        ),
        distribution(
            "Normalizer Z of tokens", "The share of the actor's mass that is kept.", "jackpot_token_normalizer"
        ),
        curves(
            "KL to the target, before and after",
            "KL(p_target || what is trained on) per token: OBRS must bring it down. `exact` sums over the vocabulary "
            "where that is small enough.",
            gauge("jackpot_target_kl_nats", "{{obrs}}, {{method}}"),
            unit="short",
            low=None,
        ),
        curves(
            "Effective sample size",
            "Of the tokens' weights after rejection, over their number: how much of a batch counts.",
            gauge("jackpot_effective_sample_ratio", "effective"),
            unit="percentunit",
            high=1,
            thresholds=((None, RED), (0.1, ORANGE), (0.3, GREEN)),
        ),
        curves(
            "Budget λ and bias correction κ/τ",
            "λ divides the target ratio before it is capped; κ or τ calibrates Z so that weights average to one.",
            gauge("jackpot_obrs_lambda", "λ"),
            gauge("jackpot_obrs_bias_correction", "κ/τ"),
            gauge("jackpot_obrs_normalizer_mean", "mean Z"),
        ),
        curves(
            "Weights",
            "Mean weight of a token, and the largest before clipping.",
            gauge("jackpot_weight_mean", "mean"),
            gauge("jackpot_weight_raw_max", "largest, raw"),
            low=None,
            logarithmic=True,
        ),
        curves(
            "What estimates leave out",
            "Weights that were clipped, and target probability outside the ids looked at.",
            gauge("jackpot_weight_clipped_ratio", "clipped at {{clip}}"),
            Query(f"1 - jackpot_obrs_topk_mass_ratio{{{JOB}}}", "outside top-k"),
            unit="percentunit",
        ),
    ),
)

LEARNING = Row(
    "Is it learning?",
    (
        curves(
            "Policy accuracy",
            "Held-out accuracy of the policy on its own samples. It must rise with the reward: if it falls while the "
            "reward rises, the policy learns from text that it would not write.",
            gauge("jackpot_policy_accuracy_ratio", "accuracy"),
            gauge("jackpot_reward_mean", "actor's mean reward"),
            low=None,
        ),
        curves(
            "Spread of rewards",
            "Standard deviation within a batch. At 0 every advantage is 0 and nothing is learned.",
            gauge("jackpot_reward_std", "standard deviation"),
            thresholds=((None, RED), (0.02, GREEN)),
        ),
        curves(
            "Entropy of the policy",
            "Nats per token. A fall to 0 is a policy that no longer explores.",
            gauge("jackpot_policy_entropy_nats", "entropy"),
        ),
        curves(
            "Losses",
            "Of the last optimizer step.",
            gauge("jackpot_loss", "{{loss}}"),
            low=None,
        ),
        curves("Gradient norms", "Before clipping.", gauge("jackpot_grad_norm", "{{model}}")),
        curves("Learning rates", "As scheduled.", gauge("jackpot_learning_rate", "{{model}}")),
        curves(
            "Policy's clipped tokens, truncated completions",
            "Tokens whose importance ratio was clipped, on one side or by the bound for negative advantages, or whose "
            "log-ratio to the initial policy was cut; completions that the token limit ended.",
            gauge("jackpot_policy_clip_ratio", "clipped"),
            gauge("jackpot_policy_dual_clip_ratio", "bounded, negative advantage"),
            gauge("jackpot_policy_initial_kl_clipped_ratio", "cut in the KL penalty"),
            gauge("jackpot_response_truncated_ratio", "truncated"),
            unit="percentunit",
        ),
        curves("Completion length", "Tokens.", gauge("jackpot_response_length_mean_tokens", "mean")),
    ),
)

DRIFT = Row(
    "Is the actor drifting?",
    (
        curves(
            "KL(policy || actor)",
            "Exact, per token, from distillation: how far the actor has been left behind.",
            gauge("jackpot_policy_actor_kl_nats", "exact"),
            thresholds=((None, GREEN), (1, ORANGE), (5, RED)),
        ),
        curves(
            "KL of sampling from scoring",
            "At sampled tokens. k3 is never negative; the plain mean may be, by chance.",
            gauge("jackpot_rollout_kl_nats", "mean"),
            gauge("jackpot_rollout_k3_kl_nats", "k3"),
            low=None,
        ),
        curves(
            "Canary",
            "A few tokens of each weight version, passed again through that version: how far the engine's "
            "log-probabilities are from it. A rise is a replica that samples with other weights than it says.",
            gauge("jackpot_canary_difference_nats", "{{statistic}}"),
            gauge("jackpot_canary_tokens", "tokens looked at"),
            logarithmic=True,
        ),
        curves(
            "Quantiles of the target ratio",
            "p_target / p_inf over the batch's tokens.",
            gauge("jackpot_target_ratio", "{{quantile}}"),
            low=None,
            logarithmic=True,
        ),
        curves(
            "Distillation",
            "Its loss, and its weight in the actor's loss.",
            gauge("jackpot_loss", "loss", ',loss="actor_distill"'),
            gauge("jackpot_distill_weight", "weight"),
        ),
        curves(
            "Staleness",
            "Optimizer steps from sampling to training, and what the job's settings allow for.",
            gauge("jackpot_staleness_mean_steps", "mean"),
            gauge("jackpot_staleness_max_steps", "most"),
            gauge("jackpot_staleness_limit_steps", "allowed"),
            gauge("jackpot_reference_age_mean_steps", "reference, mean"),
            gauge("jackpot_reference_age_max_steps", "reference, most"),
        ),
        curves(
            "Tokens without a finite number",
            "Of a batch. Anything but 0 is broken arithmetic.",
            gauge("jackpot_nonfinite_tokens", "tokens"),
            thresholds=((None, GREEN), (1, RED)),
        ),
    ),
)


def job_dashboard() -> Dashboard:
    """The dashboard of one job."""
    description = "One training job: acceptance first, then learning, drift, bottleneck and ledger."
    rows = (HEAD, OBRS, LEARNING, DRIFT, PIPELINE, LEDGER)
    return dashboard("jackpot-job", "Jackpot / Job", description, rows, jobs="one")
