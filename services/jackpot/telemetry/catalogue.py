"""The table of a job's Prometheus metrics: every name, type, label and meaning. ``docs/metrics.md`` comes from it.

Names are ``jackpot_*`` and end with their base unit. Every metric has the label ``job_id``; the scraper adds
``service`` and ``instance`` to each target, so no metric has a label of those names (it would come out as
``exported_…``), nor of the scraper's own ``job``. Every other label has a bounded set of values, see :data:`LABELS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jackpot.telemetry.columns import STEP_COLUMNS

Kind = Literal["counter", "gauge", "histogram", "info"]

LEARNER, SCORER, ROLLOUT, ORCHESTRATOR = "learner", "scorer", "rollout", "orchestrator"
WORKERS = (ORCHESTRATOR, ROLLOUT, SCORER, LEARNER)

UNITS: Mapping[str, str] = {
    "seconds": "seconds",
    "bytes": "bytes",
    "ratio": "ratio",
    "nats": "nats",
    "tokens": "tokens",
    "steps": "steps",
    "per_second": "per second",
}
"""Endings of names (before ``_total``) and their units; a name with none of them counts things or has no unit."""

LABELS: Mapping[str, str] = {
    "job_id": "the job; one per process",
    "activity": "what the time was spent on, see the metric",
    "alarm": "an alarm of the section `alarms` of the job file",
    "clip": "`c1` or `c2`",
    "gpu": "index of a GPU that the process sees",
    "grpc_code": "a gRPC status, such as `OK`",
    "grpc_method": "a method of our services, such as `Generate`",
    "grpc_service": "`jackpot.v1.RolloutService` or `jackpot.v1.ScoringService`",
    "le": "upper bound of a histogram's bucket",
    "loss": "`policy`, `actor_ppo` or `actor_distill`",
    "method": "`estimate` or `exact`; of a request: the HTTP method",
    "model": "`policy` or `actor`",
    "obrs": "`before` or `after` rejection",
    "operation": "`list`, `read`, `write` or `delete`",
    "outcome": "outcome of a broadcast: `sent`, `failed` or `skipped`; of a reward: `failed` or `unreadable`",
    "phase": "a phase of the learner's batch",
    "python": "version of Python; one per process",
    "quantile": "`p01`, `p10`, `p50`, `p90` or `p99`",
    "reason": "why a group was dropped; empty otherwise",
    "result": "`done`, or `failed`: refused or out of reach",
    "role": "whose weights: `policy` or `actor`",
    "route": "a route's pattern, such as `/v1/jobs/{job_id}`; never a requested path",
    "state": "see the metric",
    "statistic": "`max`, or `rms`: the root mean square",
    "status": "an HTTP status",
    "stream": "`rollouts` (to be scored) or `scored` (to be trained on)",
    "version": "version of Jackpot; one per process",
}
"""Every label and the bounded set of its values."""

DROP_REASONS = (
    "rollout_failed",
    "reward_failed",
    "prompt_unusable",
    "zero_variance",
    "corrupt_payload",
    "scoring_failed",
    "stale",
    "lost",
    "unused",
)
ACTIVITIES: Mapping[str, Sequence[str]] = {
    ORCHESTRATOR: ("reward", "wait_bus_budget", "wait_rollouts", "wait_weights"),
    ROLLOUT: ("generate", "wait_weights"),
    SCORER: ("load_weights", "score", "wait_groups", "wait_weights"),
    LEARNER: ("checkpoint", "publish", "snapshot", "train", "wait_groups", "wait_publication"),
}
"""What each service spends its time on, see :mod:`jackpot.telemetry.activity`."""

RPC_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
LOAD_BUCKETS = (0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
ACCEPTANCE_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
TARGET_RATIO_BUCKETS = (0.001, 0.01, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0, 1.05, 1.25, 2.0, 4.0, 10.0, 100.0, 1000.0)
NORMALIZER_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1.05, 1.25, 2.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: without the endings that the client library adds (``_total``, ``_bucket``, ``_info``).
        kind: its type.
        description: what it means.
        labels: in addition to ``job_id``.
        services: the services that export it.
        buckets: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    services: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exposed_name(self) -> str:
        """The name in queries; for a histogram the common part of its three series."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")

    @property
    def unit(self) -> str:
        """The base unit that the name ends with; empty for counts."""
        return next((unit for ending, unit in UNITS.items() if self.name.endswith(f"_{ending}")), "")


def _step_gauges() -> list[MetricSpec]:
    columns = {column.gauge: column for column in STEP_COLUMNS.values()}
    return [
        MetricSpec(name, "gauge", column.description, tuple(column.labels or ()), (LEARNER,))
        for name, column in columns.items()
    ]


_RPC = ("grpc_service", "grpc_method")
_OBRS = "over all tokens trained on; ordinary importance weights (no OBRS) show as acceptance 1 and Z 1"

_SPECS = (
    MetricSpec("jackpot_build", "info", "What is running; always 1", ("python", "version"), WORKERS),
    # --- progress ---
    MetricSpec("jackpot_step", "gauge", "Last optimizer step", (), (LEARNER,)),
    MetricSpec("jackpot_planned_steps", "gauge", "Optimizer steps of the whole job", (), (LEARNER,)),
    MetricSpec(
        "jackpot_last_step_timestamp_seconds",
        "gauge",
        "Unix time when the last batch was trained; before the first, when the learner was ready",
        (),
        (LEARNER,),
    ),
    MetricSpec(
        "jackpot_policy_accuracy_ratio",
        "gauge",
        "Held-out accuracy of the policy on its own samples",
        (),
        (ORCHESTRATOR,),
    ),
    MetricSpec("jackpot_evaluated_step", "gauge", "Weight version of the last evaluation", (), (ORCHESTRATOR,)),
    MetricSpec(
        "jackpot_reward_failures",
        "counter",
        "Completions without a reward of their own: `failed` (the reward raised, hung or ended its process), or "
        "`unreadable` to its grader, which makes them wrong answers",
        ("outcome",),
        (ORCHESTRATOR,),
    ),
    MetricSpec("jackpot_tokens_generated", "counter", "Tokens sampled", (), (ROLLOUT,)),
    MetricSpec("jackpot_tokens_scored", "counter", "Tokens scored", (), (SCORER,)),
    MetricSpec("jackpot_tokens_trained", "counter", "Tokens trained on", (), (LEARNER,)),
    # --- learning and mismatch ---
    *_step_gauges(),
    MetricSpec(
        "jackpot_token_acceptance_ratio",
        "histogram",
        f"Acceptance probability a(x), {_OBRS}",
        (),
        (LEARNER,),
        ACCEPTANCE_BUCKETS,
    ),
    MetricSpec(
        "jackpot_token_target_ratio",
        "histogram",
        f"Target ratio p_target/p_inf, {_OBRS}",
        (),
        (LEARNER,),
        TARGET_RATIO_BUCKETS,
    ),
    MetricSpec("jackpot_token_normalizer", "histogram", f"Normalizer Z, {_OBRS}", (), (LEARNER,), NORMALIZER_BUCKETS),
    MetricSpec(
        "jackpot_staleness_limit_steps",
        "gauge",
        "The most staleness that the job's settings allow for: max_staleness + updates_per_batch - 1",
        (),
        (LEARNER,),
    ),
    MetricSpec("jackpot_alarms", "counter", "Alarms that began, by the bounds of the job file", ("alarm",), (LEARNER,)),
    MetricSpec("jackpot_alarm_active", "gauge", "1 while an alarm is active, else 0", ("alarm",), (LEARNER,)),
    # --- pipeline ---
    MetricSpec(
        "jackpot_activity_seconds",
        "counter",
        "Time in which an activity was running: its rate is the fraction of the wall time. "
        + "; ".join(f"{service}: {', '.join(names)}" for service, names in ACTIVITIES.items()),
        ("activity",),
        WORKERS,
    ),
    MetricSpec("jackpot_groups_in_flight", "gauge", "Groups being generated and rewarded", (), (ORCHESTRATOR,)),
    MetricSpec(
        "jackpot_rollout_replicas",
        "gauge",
        "Rollout replicas of the actor: `wanted` by the job, `ready` by their health checks",
        ("state",),
        (ORCHESTRATOR,),
    ),
    MetricSpec("jackpot_weight_version", "gauge", "Weight version held", ("role",), (ROLLOUT, SCORER)),
    MetricSpec("jackpot_newest_weight_version", "gauge", "Newest weight version published", ("role",), (ORCHESTRATOR,)),
    MetricSpec(
        "jackpot_weight_load_seconds",
        "histogram",
        "Time to verify and load a weight version",
        ("role",),
        (ROLLOUT, SCORER),
        LOAD_BUCKETS,
    ),
    MetricSpec(
        "jackpot_weights_refused",
        "counter",
        "Weight versions refused: damaged, not fitting, or not giving their probe",
        ("role",),
        (ROLLOUT, SCORER),
    ),
    MetricSpec(
        "jackpot_weights_broadcast",
        "counter",
        "Weight versions by the outcome of their broadcast to the replicas: `sent`, `failed`, `skipped`",
        ("outcome",),
        (LEARNER,),
    ),
    # --- object store ---
    MetricSpec(
        "jackpot_object_store_calls",
        "counter",
        "Calls to the object store of `weights.store`, including those that were retried",
        ("operation", "result"),
        WORKERS,
    ),
    MetricSpec(
        "jackpot_object_store_call_seconds",
        "histogram",
        "Time of an answered call to the object store; a read or write covers a whole object",
        ("operation",),
        WORKERS,
        LOAD_BUCKETS,
    ),
    # --- ledger and bus ---
    MetricSpec(
        "jackpot_groups",
        "counter",
        "Groups that ended, by `state` (`trained`, `dropped`) and reason, since this process started",
        ("state", "reason"),
        (ORCHESTRATOR,),
    ),
    MetricSpec(
        "jackpot_ledger_groups",
        "gauge",
        "The job's ledger, over restarts: `dispatched` = `trained` + `dropped` + `open`",
        ("state",),
        (ORCHESTRATOR,),
    ),
    MetricSpec(
        "jackpot_bus_groups",
        "gauge",
        "Groups on the bus: `waiting` for a consumer (its lag), or `pending` with one",
        ("stream", "state"),
        (ORCHESTRATOR,),
    ),
    MetricSpec(
        "jackpot_bus_oldest_seconds",
        "gauge",
        "Age of the oldest group on a stream, waiting or pending; 0 for an empty one. The server's clock and the "
        "orchestrator's are compared",
        ("stream",),
        (ORCHESTRATOR,),
    ),
    MetricSpec("jackpot_bus_used_bytes", "gauge", "Bytes of groups reserved on the bus", (), (ORCHESTRATOR,)),
    MetricSpec("jackpot_bus_budget_bytes", "gauge", "Bytes of groups that the bus may hold", (), (ORCHESTRATOR,)),
    MetricSpec(
        "jackpot_bus_server_used_bytes",
        "gauge",
        "Memory that the bus's server uses; absent where its access list forbids INFO",
        (),
        (ORCHESTRATOR,),
    ),
    MetricSpec(
        "jackpot_bus_server_limit_bytes",
        "gauge",
        "Memory that the bus's server may use: its maxmemory, or its machine's memory if it has none",
        (),
        (ORCHESTRATOR,),
    ),
    MetricSpec("jackpot_run_volume_free_bytes", "gauge", "Free on the run directory's volume", (), (ORCHESTRATOR,)),
    MetricSpec("jackpot_run_volume_size_bytes", "gauge", "Size of the run directory's volume", (), (ORCHESTRATOR,)),
    # --- RPC ---
    MetricSpec("jackpot_rpc_requests", "counter", "RPCs answered", (*_RPC, "grpc_code"), (ROLLOUT, SCORER)),
    MetricSpec(
        "jackpot_rpc_duration_seconds", "histogram", "Time to answer an RPC", _RPC, (ROLLOUT, SCORER), RPC_BUCKETS
    ),
    MetricSpec("jackpot_rpc_in_flight", "gauge", "RPCs being answered", _RPC, (ROLLOUT, SCORER)),
    # --- GPU ---
    MetricSpec(
        "jackpot_gpu_busy_ratio",
        "gauge",
        "Fraction of NVML's last sample period (1/6 to 1 s) in which a kernel ran; absent without GPU or NVML",
        ("gpu",),
        (ROLLOUT, SCORER, LEARNER),
    ),
    MetricSpec("jackpot_gpu_memory_used_bytes", "gauge", "GPU memory in use", ("gpu",), (ROLLOUT, SCORER, LEARNER)),
    MetricSpec("jackpot_gpu_memory_size_bytes", "gauge", "GPU memory", ("gpu",), (ROLLOUT, SCORER, LEARNER)),
)

CATALOGUE: Mapping[str, MetricSpec] = {spec.name: spec for spec in _SPECS}
"""Every metric of a job's processes, by name."""
