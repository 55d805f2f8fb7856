"""Rows of a job's dashboard about its services together: the bottleneck, and the ledger."""

from __future__ import annotations

from dashboards.panels import JOB, RATE, Query, Row, curves, gauge


def activities(service: str) -> Query:
    """What a service spends its time on: a mean over its replicas."""
    labels = f'{JOB},service="{service}"'
    return Query(f"avg by (activity) (rate(jackpot_activity_seconds_total{{{labels}}}{RATE}))", "{{activity}}")


PIPELINE = Row(
    "What is the bottleneck?",
    (
        curves(
            "What the learner spends its time on",
            "Mostly `wait_groups`: rollouts or scoring hold the job up. Mostly `train`: the learner does. "
            "Activities may overlap, so that they do not add up to 1.",
            activities("learner"),
            unit="percentunit",
        ),
        curves(
            "What scorers spend their time on",
            "Mean over scorers. Mostly `score` while groups wait to be scored: add a scorer.",
            activities("scorer"),
            unit="percentunit",
        ),
        curves(
            "What rollout replicas spend their time on",
            "Mean over replicas. `generate` near 1 while the learner waits: add a replica. `wait_weights`: a request "
            "wants a newer version than is loaded.",
            activities("rollout"),
            unit="percentunit",
        ),
        curves(
            "What dispatch waits for",
            "`wait_rollouts`: all groups in flight are being sampled. `wait_weights`: pacing waits for the next "
            "version. `wait_bus_budget`: learner or scorers are slower than the rollouts.",
            activities("orchestrator"),
            unit="percentunit",
        ),
        curves(
            "Tokens per second",
            "Sampled, scored and trained; in a steady state all three are equal, up to what is dropped or evaluated.",
            Query(f"sum(rate(jackpot_tokens_generated_total{{{JOB}}}{RATE}))", "sampled"),
            Query(f"sum(rate(jackpot_tokens_scored_total{{{JOB}}}{RATE}))", "scored"),
            Query(f"sum(rate(jackpot_tokens_trained_total{{{JOB}}}{RATE}))", "trained"),
        ),
        curves(
            "Step time",
            "Wall time of one optimizer step, waiting included, and the phases of the last batch.",
            gauge("jackpot_step_seconds", "step"),
            gauge("jackpot_phase_seconds", "{{phase}}"),
            unit="s",
        ),
        curves(
            "Weight versions behind the newest",
            "Optimizer steps, per replica; growing without end is a replica that no longer loads. The evaluator, which "
            "takes up only what it evaluates, is left out.",
            Query(
                f"max by (namespace, job_id, role) (jackpot_newest_weight_version{{{JOB}}})"
                f' - on (namespace, job_id, role) group_right () jackpot_weight_version{{{JOB},service!="evaluator"}}',
                "{{service}} {{instance}}",
            ),
        ),
        curves(
            "Rollout replicas",
            "Wanted by the job, and ready.",
            gauge("jackpot_rollout_replicas", "{{state}}"),
        ),
        curves(
            "Groups in work",
            "Being sampled or judged, and on the bus.",
            gauge("jackpot_groups_in_flight", "in flight"),
            Query(f"sum by (stream, state) (jackpot_bus_groups{{{JOB}}})", "{{stream}} {{state}}"),
        ),
    ),
)

LEDGER = Row(
    "Does every group arrive?",
    (
        curves(
            "Ledger",
            "dispatched = trained + dropped + open, always.",
            gauge("jackpot_ledger_groups", "{{state}}"),
        ),
        curves(
            "Groups dropped",
            "Per reason. `zero_variance` and `unused` are no errors.",
            Query(f'sum by (reason) (increase(jackpot_groups_total{{{JOB},state="dropped"}}{RATE}))', "{{reason}}"),
        ),
        curves(
            "Completions without a reward",
            "`failed`: the reward raised, hung or ended its process; `unreadable`: its grader could not read the "
            "answer, which counts as wrong.",
            Query(f"sum by (outcome) (increase(jackpot_reward_failures_total{{{JOB}}}{RATE}))", "{{outcome}}"),
        ),
        curves(
            "Groups trained per second",
            "Ended as trained, once a checkpoint holds their effect: it comes in steps.",
            Query(f'sum(rate(jackpot_groups_total{{{JOB},state="trained"}}{RATE}))', "trained"),
        ),
    ),
)
