"""All jobs side by side, and the control plane that runs them."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.job import ACCEPTANCE
from dashboards.panels import GREEN, JOB, NAMESPACE, ORANGE, RATE, RED, Query, Row, curves, dashboard, figure

HEAD = Row(
    "How are the jobs?",
    (
        figure(
            "Lowest acceptance rate",
            "Of all jobs shown. A job near 0 throws away nearly all that it samples.",
            Query(f"min(jackpot_obrs_acceptance_ratio{{{JOB}}})", "lowest"),
            unit="percentunit",
            decimals=1,
            thresholds=ACCEPTANCE,
        ),
        figure(
            "Jobs running",
            "Jobs that train now.",
            Query(f"count(jackpot_planned_steps{{{JOB}}})", "running"),
        ),
        figure(
            "Jobs by state",
            "As the control plane's store has them.",
            Query(f"sum by (state) (jackpot_jobs{{{NAMESPACE}}})", "{{state}}"),
            span=8,
        ),
        figure(
            "Alerts firing",
            "Of the rules that come with Jackpot.",
            Query(f'count(ALERTS{{{NAMESPACE},alertname=~"Jackpot.*",alertstate="firing"}}) or vector(0)', "alerts"),
            thresholds=((None, GREEN), (1, RED)),
        ),
        figure(
            "Alarms",
            "Signs of collapse that last, by the bounds of the job files.",
            Query(f"sum(jackpot_alarm_active{{{JOB}}})", "alarms"),
            thresholds=((None, GREEN), (1, RED)),
        ),
    ),
)

JOBS = Row(
    "Which job needs attention?",
    (
        curves(
            "Acceptance rate",
            "Mean acceptance probability of the last batch, by job.",
            Query(f"jackpot_obrs_acceptance_ratio{{{JOB}}}"),
            unit="percentunit",
            high=1,
            thresholds=ACCEPTANCE,
        ),
        curves(
            "Policy accuracy",
            "On held-out prompts, from the policy's own samples.",
            Query(f"jackpot_policy_accuracy_ratio{{{JOB}}}"),
            unit="percentunit",
        ),
        curves("Mean reward", "Of the actor's trajectories.", Query(f"jackpot_reward_mean{{{JOB}}}"), low=None),
        curves(
            "Progress",
            "Optimizer steps made, of those planned.",
            Query(f"jackpot_step{{{JOB}}} / jackpot_planned_steps{{{JOB}}}"),
            unit="percentunit",
            high=1,
        ),
        curves(
            "Time since the last step",
            "A job far above its usual step time is stuck.",
            Query(f"time() - jackpot_last_step_timestamp_seconds{{{JOB}}}"),
            unit="s",
        ),
        curves(
            "KL(p_target || sampled from)",
            "Per token, before OBRS: how far actor and policy are apart.",
            Query(f'jackpot_target_kl_nats{{{JOB},obrs="before",method="estimate"}}'),
            low=None,
        ),
        curves(
            "Tokens trained per second",
            "By job.",
            Query(f"sum by (job_id) (rate(jackpot_tokens_trained_total{{{JOB}}}{RATE}))"),
        ),
        curves(
            "Learner's time spent waiting",
            "Share of time in which no batch is there. Near 1, learners idle: add rollout replicas or scorers.",
            Query(
                f'sum by (job_id) (rate(jackpot_activity_seconds_total{{{JOB},service="learner",'
                f'activity="wait_groups"}}{RATE}))'
            ),
            unit="percentunit",
            high=1,
            thresholds=((None, GREEN), (0.5, ORANGE)),
        ),
        curves(
            "Groups lost per second",
            "Groups that ended as an error, by job.",
            Query(
                f"sum by (job_id) (rate(jackpot_groups_total{{{JOB},"
                f'reason=~"rollout_failed|reward_failed|corrupt_payload|scoring_failed|lost"}}{RATE}))'
            ),
        ),
    ),
)

SPACE = Row(
    "What runs out?",
    (
        curves(
            "Bus server's memory",
            "Of what it may use; at 1 it refuses writes.",
            Query(f"jackpot_bus_server_used_bytes{{{JOB}}} / jackpot_bus_server_limit_bytes{{{JOB}}}"),
            unit="percentunit",
            thresholds=((None, GREEN), (0.85, RED)),
        ),
        curves(
            "Free space of the run volume",
            "Where weights, checkpoints and logs go.",
            Query(f"jackpot_run_volume_free_bytes{{{JOB}}} / jackpot_run_volume_size_bytes{{{JOB}}}"),
            unit="percentunit",
            high=1,
            thresholds=((None, RED), (0.1, GREEN)),
        ),
        curves(
            "GPUs' busy fraction",
            "Mean over each service's GPUs.",
            Query(f"avg by (job_id, service) (jackpot_gpu_busy_ratio{{{JOB}}})", "{{job_id}} {{service}}"),
            unit="percentunit",
            high=1,
        ),
    ),
)


def overview_dashboard() -> Dashboard:
    """The dashboard of all jobs."""
    description = "All training jobs side by side: which one needs attention, and what runs out."
    return dashboard("jackpot-overview", "Jackpot / Overview", description, (HEAD, JOBS, SPACE), jobs="all")
