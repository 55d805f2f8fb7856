"""Records the metrics of a job's processes."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Protocol

from numpy.typing import ArrayLike
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info

from jackpot.telemetry.catalogue import CATALOGUE, DROP_REASONS
from jackpot.telemetry.columns import STEP_COLUMNS
from jackpot.telemetry.histograms import BatchHistogram


class Depths(Protocol):
    """The bus's own figures: groups waiting and pending per stream, bytes used and allowed."""

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
    """The metrics of one process of one job. Create one per registry.

    Attributes ending in ``_total`` count (``.inc(n)``); everything else goes through a method. A series is exported
    only once it has a value, so that a process that never evaluates does not report an accuracy of 0. Recording one
    value takes about a microsecond; nothing here blocks.
    """

    def __init__(self, job_id: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._job_id = job_id
        self._registry = registry
        # GPU metrics are not recorded but read at each scrape: gpu.py.
        gauges = [spec for spec in CATALOGUE.values() if spec.kind == "gauge" and "gpu" not in spec.labels]
        counters = [spec for spec in CATALOGUE.values() if spec.kind == "counter"]
        self._gauges = {
            spec.name: Gauge(spec.name, spec.description, ("job_id", *spec.labels), registry=registry)
            for spec in gauges
        }
        self._counters = {
            spec.name: Counter(spec.name, spec.description, ("job_id", *spec.labels), registry=registry)
            for spec in counters
        }
        self._rpc_seconds = self._histogram("jackpot_rpc_duration_seconds")
        self._weight_load = self._histogram("jackpot_weight_load_seconds")
        self._object_seconds = self._histogram("jackpot_object_store_call_seconds")
        self._acceptance, self._target_ratio, self._normalizer = (
            BatchHistogram(CATALOGUE[name], job_id, registry)
            for name in ("jackpot_token_acceptance_ratio", "jackpot_token_target_ratio", "jackpot_token_normalizer")
        )
        build = CATALOGUE["jackpot_build"]
        Info(build.name, build.description, ("job_id",), registry=registry).labels(job_id).info(
            {"version": version("jackpot"), "python": platform.python_version()}
        )

    # --- tokens ---

    @cached_property
    def tokens_generated_total(self) -> Counter:
        """Tokens sampled."""
        return self._counter("jackpot_tokens_generated")

    @cached_property
    def tokens_scored_total(self) -> Counter:
        """Tokens scored."""
        return self._counter("jackpot_tokens_scored")

    @cached_property
    def tokens_trained_total(self) -> Counter:
        """Tokens trained on."""
        return self._counter("jackpot_tokens_trained")

    # --- learner ---

    def observe_plan(self, planned_steps: int, staleness_limit: int) -> None:
        """Export the job's total steps and start the clock of the stuck-step alert."""
        self._set("jackpot_planned_steps", planned_steps)
        self._set("jackpot_staleness_limit_steps", staleness_limit)
        self._set("jackpot_last_step_timestamp_seconds", time.time())

    def observe_step(self, row: Mapping[str, float]) -> None:
        """Export one optimizer step's row of ``metrics.jsonl``; columns without a gauge are skipped."""
        for name, value in row.items():
            if name == "step":
                self._set("jackpot_step", value)
                self._set("jackpot_last_step_timestamp_seconds", time.time())
            elif (column := STEP_COLUMNS.get(name)) is not None:
                self._set(column.gauge, value, *(column.labels or {}).values())

    def observe_tokens(self, acceptance: ArrayLike, target_ratio: ArrayLike, normalizer: ArrayLike) -> None:
        """Add a step's tokens to the histograms: acceptance probability, p_target/p_inf and Z, [n] each."""
        self._acceptance.observe(acceptance)
        self._target_ratio.observe(target_ratio)
        self._normalizer.observe(normalizer)

    def count_alarm(self, alarm: str) -> None:
        """Count the start of an alarm."""
        self._counter("jackpot_alarms", alarm).inc()

    def observe_alarms(self, active: Mapping[str, bool]) -> None:
        """Export which alarms are active."""
        for alarm, on in active.items():
            self._counter("jackpot_alarms", alarm)  # at 0 from the start: Prometheus misses an increase from no value
            self._set("jackpot_alarm_active", float(on), alarm)

    # --- activities ---

    def count_activity(self, activity: str, seconds: float) -> None:
        """Count time spent on an activity; its rate is the fraction of the wall time."""
        self._counter("jackpot_activity_seconds", activity).inc(seconds)

    # --- orchestrator ---

    def observe_bus(self, depths: Depths) -> None:
        """Export how full the bus is."""
        for stream, waiting, pending in (
            ("rollouts", depths.rollouts_waiting, depths.rollouts_pending),
            ("scored", depths.scored_waiting, depths.scored_pending),
        ):
            self._set("jackpot_bus_groups", waiting, stream, "waiting")
            self._set("jackpot_bus_groups", pending, stream, "pending")
        self._set("jackpot_bus_used_bytes", depths.bytes_used)
        self._set("jackpot_bus_budget_bytes", depths.bytes_budget)

    def observe_bus_ages(self, seconds_by_stream: Mapping[str, float]) -> None:
        """Export the age of the oldest group of each stream."""
        for stream, seconds in seconds_by_stream.items():
            self._set("jackpot_bus_oldest_seconds", seconds, stream)

    def observe_bus_server(self, used_bytes: int, limit_bytes: int) -> None:
        """Export the memory of the bus's server."""
        self._set("jackpot_bus_server_used_bytes", used_bytes)
        self._set("jackpot_bus_server_limit_bytes", limit_bytes)

    def observe_ledger(self, counts: Mapping[str, int]) -> None:
        """Export the job's ledger by state."""
        for state, count in counts.items():
            self._set("jackpot_ledger_groups", count, state)

    def observe_run_volume(self, free_bytes: int, size_bytes: int) -> None:
        """Export the disk space of the run directory's volume."""
        self._set("jackpot_run_volume_free_bytes", free_bytes)
        self._set("jackpot_run_volume_size_bytes", size_bytes)

    def observe_newest_weights(self, version_by_role: Mapping[str, int]) -> None:
        """Export the newest version published of each role."""
        for role, newest in version_by_role.items():
            self._set("jackpot_newest_weight_version", newest, role)

    def observe_replicas(self, ready: int, wanted: int) -> None:
        """Export the number of rollout replicas."""
        self._set("jackpot_rollout_replicas", ready, "ready")
        self._set("jackpot_rollout_replicas", wanted, "wanted")

    def observe_evaluation(self, step: int, accuracy: float) -> None:
        """Export an evaluation of weight version ``step``."""
        self._set("jackpot_evaluated_step", step)
        self._set("jackpot_policy_accuracy_ratio", accuracy)

    def expect_rewards(self) -> None:
        """Start the counters of failed rewards at 0, for the reason that `expect_groups` gives."""
        for outcome in ("failed", "unreadable"):
            self._counter("jackpot_reward_failures", outcome)

    def count_reward_failure(self, outcome: str) -> None:
        """Count a completion whose reward ``failed``, or that is ``unreadable`` to its grader."""
        self._counter("jackpot_reward_failures", outcome).inc()

    def observe_in_flight(self, num_groups: int) -> None:
        """Export how many groups are being generated."""
        self._set("jackpot_groups_in_flight", num_groups)

    def expect_groups(self) -> None:
        """Start the counters of ended groups at 0: Prometheus misses an increase from no value."""
        self._counter("jackpot_groups", "trained", "")
        for reason in DROP_REASONS:
            self._counter("jackpot_groups", "dropped", reason)

    def count_group(self, state: str, reason: str = "") -> None:
        """Count a group that ended: ``trained``, or ``dropped`` with a reason."""
        self._counter("jackpot_groups", state, reason).inc()

    # --- weights ---

    def observe_weights(self, role: str, held_version: int, load_seconds: float) -> None:
        """Export the weight version that this replica now holds, and how long the swap took."""
        self._set("jackpot_weight_version", held_version, role)
        self._weight_load.labels(self._job_id, role).observe(load_seconds)

    def count_weights_refused(self, role: str) -> None:
        """Count a weight version that this replica refused."""
        self._counter("jackpot_weights_refused", role).inc()

    def count_weights_broadcast(self, outcome: str) -> None:
        """Count a weight version that the learner had to broadcast: ``sent``, ``failed`` or ``skipped``."""
        self._counter("jackpot_weights_broadcast", outcome).inc()

    def observe_object_call(self, operation: str, result: str, seconds: float) -> None:
        """Record a call to an object store; see :func:`jackpot.storage.objects.observe_calls`."""
        self._counter("jackpot_object_store_calls", operation, result).inc()
        if result == "done":
            self._object_seconds.labels(self._job_id, operation).observe(seconds)

    # --- RPC ---

    def rpc_started(self, service: str, method: str) -> None:
        """Count the start of an RPC; follow with :meth:`rpc_finished`."""
        self._gauges["jackpot_rpc_in_flight"].labels(self._job_id, service, method).inc()

    def rpc_finished(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count an RPC answered with a status code's name, such as ``OK``."""
        self._gauges["jackpot_rpc_in_flight"].labels(self._job_id, service, method).dec()
        self._counter("jackpot_rpc_requests", service, method, code).inc()
        self._rpc_seconds.labels(self._job_id, service, method).observe(seconds)

    # --- the parts ---

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._gauges[name].labels(self._job_id, *labels).set(value)

    def _counter(self, name: str, *labels: str) -> Counter:
        return self._counters[name].labels(self._job_id, *labels)

    def _histogram(self, name: str) -> Histogram:
        spec = CATALOGUE[name]
        labels = ("job_id", *spec.labels)
        return Histogram(name, spec.description, labels, buckets=spec.buckets, registry=self._registry)
