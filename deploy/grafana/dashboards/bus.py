"""The trajectory bus: what lies on it, for how long, and what it may still hold."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.panels import GREEN, JOB, ORANGE, RATE, RED, Query, Row, curves, dashboard

FLOW = Row(
    "Who holds up whom?",
    (
        curves(
            "Groups to be scored",
            "`waiting` is the scorers' lag. If it grows, add scorers.",
            Query(f'jackpot_bus_groups{{{JOB},stream="rollouts"}}', "{{job_id}} {{state}}"),
        ),
        curves(
            "Groups to be trained on",
            "`waiting` is the learner's lag; `pending` are in its hands until a checkpoint holds their effect.",
            Query(f'jackpot_bus_groups{{{JOB},stream="scored"}}', "{{job_id}} {{state}}"),
        ),
        curves(
            "Age of the oldest group",
            "By stream. Scored groups live from their batch to the next checkpoint.",
            Query(f"jackpot_bus_oldest_seconds{{{JOB}}}", "{{job_id}} {{stream}}"),
            unit="s",
        ),
        curves(
            "Groups trained per second",
            "Committed, once a checkpoint holds their effect: it comes in steps.",
            Query(f'sum by (job_id) (rate(jackpot_groups_total{{{JOB},state="trained"}}{RATE}))'),
        ),
        curves(
            "Dispatch held by the budget",
            "Share of time. Above 0 the learner or the scorers are slower than the rollouts.",
            Query(
                f'sum by (job_id) (rate(jackpot_activity_seconds_total{{{JOB},activity="wait_bus_budget"}}{RATE}))'
                f" or sum by (job_id) (jackpot_bus_budget_bytes{{{JOB}}}) * 0"
            ),
            unit="percentunit",
            high=1,
        ),
        curves("Groups open", "Dispatched and not ended.", Query(f'jackpot_ledger_groups{{{JOB},state="open"}}')),
    ),
)

SPACE = Row(
    "What can it still hold?",
    (
        curves(
            "Bytes of groups",
            "Reserved on the bus, and the job's budget (bus.max_bytes).",
            Query(f"jackpot_bus_used_bytes{{{JOB}}}", "{{job_id}} used"),
            Query(f"jackpot_bus_budget_bytes{{{JOB}}}", "{{job_id}} budget"),
            unit="bytes",
        ),
        curves(
            "Server's memory",
            "Its use, and its maxmemory or, without one, its machine's memory.",
            Query(f"jackpot_bus_server_used_bytes{{{JOB}}}", "{{job_id}} used"),
            Query(f"jackpot_bus_server_limit_bytes{{{JOB}}}", "{{job_id}} limit"),
            unit="bytes",
        ),
        curves(
            "Server's memory, of its limit",
            "At 1 the server refuses writes; nothing is evicted.",
            Query(f"jackpot_bus_server_used_bytes{{{JOB}}} / jackpot_bus_server_limit_bytes{{{JOB}}}"),
            unit="percentunit",
            thresholds=((None, GREEN), (0.7, ORANGE), (0.85, RED)),
        ),
    ),
)

LOSSES = Row(
    "What is lost?",
    (
        curves(
            "Groups dropped",
            "By reason, since the orchestrator started.",
            Query(f'sum by (job_id, reason) (jackpot_groups_total{{{JOB},state="dropped"}})', "{{job_id}} {{reason}}"),
            span=12,
        ),
        curves(
            "Ledger",
            "dispatched = trained + dropped + open, always.",
            Query(f"jackpot_ledger_groups{{{JOB}}}", "{{job_id}} {{state}}"),
            span=12,
        ),
    ),
)


def bus_dashboard() -> Dashboard:
    """The dashboard of the bus."""
    description = "The trajectory bus: lag, ages, budget, memory, losses."
    return dashboard("jackpot-bus", "Jackpot / Bus", description, (FLOW, SPACE, LOSSES), jobs="all")
