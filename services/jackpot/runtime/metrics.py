"""The one home of every metric: Prometheus names, and the names of the columns of ``metrics.jsonl``.

Prometheus: ``jackpot_*``, always with the label ``job_id`` (a label ``job`` would collide with the scraper's own),
base units. ``metrics.jsonl``: the names of verl's trackers where the meaning is the same; raw and clipped values both.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from jackpot.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepColumn:
    """A column of ``metrics.jsonl`` and the gauge that shows its newest value.

    ``labels`` tell gauges of one name apart, e.g. the policy's and the actor's gradient norm.
    """

    gauge: str
    description: str
    labels: Mapping[str, str] | None = None


def _of(model: str) -> Mapping[str, str]:
    return {"model": model}


def _kl(obrs: str, method: str) -> Mapping[str, str]:
    return {"obrs": obrs, "method": method}


_TARGET_KL = "KL(p_target || sampled from) per token, before OBRS and of the tokens that it accepts"
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
    "policy/entropy": StepColumn("jackpot_policy_entropy_nats", "Mean entropy of the policy per token, in nats"),
    "policy/kl_initial": StepColumn(
        "jackpot_policy_initial_kl_nats", "KL(policy || initial policy) per token, estimated; with a KL penalty alone"
    ),
    "policy/lr": StepColumn("jackpot_learning_rate", _LR, _of("policy")),
    "actor/ppo_loss": StepColumn("jackpot_loss", _LOSS, {"loss": "actor_ppo"}),
    "actor/distill_loss": StepColumn("jackpot_loss", _LOSS, {"loss": "actor_distill"}),
    "actor/distill_weight": StepColumn("jackpot_distill_weight", "Weight of distillation in the actor's loss"),
    "actor/grad_norm": StepColumn("jackpot_grad_norm", _GRAD_NORM, _of("actor")),
    "actor/lr": StepColumn("jackpot_learning_rate", _LR, _of("actor")),
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
        "jackpot_obrs_lambda_next", "OBRS's lambda that goes out with the weights of this step"
    ),
    "rollout_corr/weight_mean": StepColumn("jackpot_weight_mean", "Mean correction weight of a token, clipped"),
    "rollout_corr/weight_raw_max": StepColumn("jackpot_weight_raw_max", "Largest correction weight before clipping"),
    "rollout_corr/clipped_fraction_c1": StepColumn("jackpot_weight_clipped_ratio", _CLIPPED, {"clip": "c1"}),
    "rollout_corr/clipped_fraction_c2": StepColumn("jackpot_weight_clipped_ratio", _CLIPPED, {"clip": "c2"}),
    "rollout_corr/nonfinite": StepColumn("jackpot_nonfinite_tokens", "Tokens of the batch that gave no finite number"),
    "kl/policy_actor": StepColumn(
        "jackpot_policy_actor_kl_nats", "Exact KL(policy || actor) per token, from distillation"
    ),
    "staleness/mean": StepColumn("jackpot_staleness_mean_steps", "Mean optimizer steps from sampling to training"),
    "staleness/max": StepColumn("jackpot_staleness_max_steps", "Most optimizer steps from sampling to training"),
    "response/length_mean": StepColumn("jackpot_response_length_mean_tokens", "Mean completion length"),
    "response/truncated_fraction": StepColumn(
        "jackpot_response_truncated_ratio", "Fraction of completions that the token limit ended"
    ),
    "throughput/tokens_per_second": StepColumn(
        "jackpot_training_tokens_per_second", "Completion tokens trained per second of wall time"
    ),
    "time/wait_batch_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "wait_batch"}),
    "time/train_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "train"}),
    "time/publish_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "publish"}),
    "time/checkpoint_seconds": StepColumn("jackpot_phase_seconds", _PHASE, {"phase": "checkpoint"}),
    "time/step_seconds": StepColumn("jackpot_step_seconds", "Wall time of one optimizer step, waiting included"),
}
"""Every column of ``metrics.jsonl`` beside ``step`` and ``time``. A row may lack columns that do not apply to it."""

RPC_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
LOAD_BUCKETS = (0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Depths(Protocol):
    """What the bus tells about itself: groups waiting and pending per stream, bytes used and allowed."""

    @property
    def rollouts_waiting(self) -> int: ...
    @property
    def rollouts_pending(self) -> int: ...
    @property
    def scored_waiting(self) -> int: ...
    @property
    def scored_pending(self) -> int: ...
    @property
    def bytes_used(self) -> int: ...
    @property
    def bytes_budget(self) -> int: ...


class Metrics:
    """The metrics of one process of one job. Make one per registry.

    Attributes ending in ``_total`` count (``.inc(n)``); everything else goes through a method. A gauge is exported
    only once it has a value, so that a process that never evaluates does not report an accuracy of 0.
    """

    def __init__(self, job_id: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._job_id = job_id
        self._registry = registry
        self._step = self._gauge("jackpot_step", "Last optimizer step")
        self._policy_accuracy = self._gauge(
            "jackpot_policy_accuracy_ratio", "Held-out accuracy of the policy on its own samples"
        )
        self._evaluated_step = self._gauge("jackpot_evaluated_step", "Weight version of the last evaluation")
        self._groups_in_flight = self._gauge("jackpot_groups_in_flight", "Generate calls under way")
        self.tokens_generated_total = self._counter("jackpot_tokens_generated", "Tokens sampled").labels(job_id)
        self.tokens_scored_total = self._counter("jackpot_tokens_scored", "Tokens scored").labels(job_id)
        self.tokens_trained_total = self._counter("jackpot_tokens_trained", "Tokens trained on").labels(job_id)
        self._groups = self._counter("jackpot_groups", "Groups by terminal state", "state", "reason")
        self._rpc_requests = self._counter("jackpot_rpc_requests", "RPCs answered", "service", "method", "code")
        self._rpc_seconds = Histogram(
            "jackpot_rpc_duration_seconds",
            "Time to answer an RPC",
            ("job_id", "service", "method"),
            buckets=RPC_BUCKETS,
            registry=registry,
        )
        self._rpc_in_flight = self._gauge("jackpot_rpc_in_flight", "RPCs being answered", "service", "method")
        self._bus_groups = self._gauge("jackpot_bus_groups", "Groups on the bus", "stream", "state")
        self._bus_bytes = self._gauge("jackpot_bus_used_bytes", "Bytes reserved on the bus")
        self._bus_budget = self._gauge("jackpot_bus_budget_bytes", "Bytes that the bus may hold")
        self._weight_version = self._gauge("jackpot_weight_version", "Weight version held", "role", "instance")
        self._weight_load = Histogram(
            "jackpot_weight_load_seconds",
            "Time to verify and load a weight version",
            ("job_id", "role"),
            buckets=LOAD_BUCKETS,
            registry=registry,
        )
        self._weights_refused = self._counter(
            "jackpot_weights_refused", "Weight versions refused as damaged or not fitting", "role"
        )
        self._alarms = self._counter("jackpot_alarms", "Alarms raised by the learner", "alarm")
        self._activity = self._counter(
            "jackpot_activity_seconds", "Seconds spent on work of a kind, or waiting for something", "activity"
        )
        self._restarts = self._counter("jackpot_process_restarts", "Restarts of a process by the launcher", "process")
        build = Info("jackpot_build", "What is running", ("job_id",), registry=registry)
        build.labels(job_id).info({"version": version("jackpot"), "python": platform.python_version()})
        self._columns = {
            column.gauge: self._gauge(column.gauge, column.description, *(column.labels or ()))
            for column in {column.gauge: column for column in STEP_COLUMNS.values()}.values()
        }

    def observe_step(self, row: Mapping[str, float]) -> None:
        """Show one optimizer step's row of ``metrics.jsonl``; columns that Prometheus does not know are skipped."""
        for name, value in row.items():
            if name == "step":
                self._step.labels(self._job_id).set(value)
            elif (column := STEP_COLUMNS.get(name)) is not None:
                labels = column.labels or {}
                self._columns[column.gauge].labels(self._job_id, *labels.values()).set(value)

    def observe_bus(self, depths: Depths) -> None:
        """Show how full the bus is."""
        for stream, waiting, pending in (
            ("rollouts", depths.rollouts_waiting, depths.rollouts_pending),
            ("scored", depths.scored_waiting, depths.scored_pending),
        ):
            self._bus_groups.labels(self._job_id, stream, "waiting").set(waiting)
            self._bus_groups.labels(self._job_id, stream, "pending").set(pending)
        self._bus_bytes.labels(self._job_id).set(depths.bytes_used)
        self._bus_budget.labels(self._job_id).set(depths.bytes_budget)

    def observe_evaluation(self, step: int, accuracy: float) -> None:
        """Show an evaluation of weight version ``step``."""
        self._evaluated_step.labels(self._job_id).set(step)
        self._policy_accuracy.labels(self._job_id).set(accuracy)

    def observe_in_flight(self, num_groups: int) -> None:
        """Show how many Generate calls are under way."""
        self._groups_in_flight.labels(self._job_id).set(num_groups)

    def count_group(self, state: str, reason: str = "") -> None:
        """Count a group that reached its end: ``trained``, or ``dropped`` with a reason."""
        self._groups.labels(self._job_id, state, reason).inc()

    def count_alarm(self, alarm: str) -> None:
        """Count an alarm."""
        self._alarms.labels(self._job_id, alarm).inc()

    def count_restart(self, process: str) -> None:
        """Count a restart of a process."""
        self._restarts.labels(self._job_id, process).inc()

    def count_activity(self, activity: str, seconds: float) -> None:
        """Count time spent on an activity; its rate is the fraction of the wall time."""
        self._activity.labels(self._job_id, activity).inc(seconds)

    def observe_weights(self, role: str, instance: str, version: int, load_seconds: float) -> None:
        """Show that a replica now holds a weight version, and how long the swap took."""
        self._weight_version.labels(self._job_id, role, instance).set(version)
        self._weight_load.labels(self._job_id, role).observe(load_seconds)

    def count_weights_refused(self, role: str) -> None:
        """Count a weight version that a replica refused."""
        self._weights_refused.labels(self._job_id, role).inc()

    def rpc_started(self, service: str, method: str) -> None:
        """An RPC is being answered; follow with :meth:`rpc_finished`."""
        self._rpc_in_flight.labels(self._job_id, service, method).inc()

    def rpc_finished(self, service: str, method: str, code: str, seconds: float) -> None:
        """An RPC was answered with a status code's name, such as ``OK``."""
        self._rpc_in_flight.labels(self._job_id, service, method).dec()
        self._rpc_requests.labels(self._job_id, service, method, code).inc()
        self._rpc_seconds.labels(self._job_id, service, method).observe(seconds)

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(name, description, ("job_id", *labels), registry=self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(name, description, ("job_id", *labels), registry=self._registry)


def serve_metrics(address: str, registry: CollectorRegistry = REGISTRY) -> int:
    """Serve ``/metrics`` on ``host:port`` in a background thread until the process ends.

    Returns:
        The port; port 0 takes a free one.

    Raises:
        ConfigError: the address is not of that form or cannot be bound.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ConfigError("JACKPOT_METRICS_ADDRESS", address, "is not host:port", "Write e.g. 127.0.0.1:9100.")
    try:
        server, _ = start_http_server(int(port), host.strip("[]") or "127.0.0.1", registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "JACKPOT_METRICS_ADDRESS", address, f"cannot be bound ({error})", "Use a free port."
        ) from None
    return int(server.server_port)
