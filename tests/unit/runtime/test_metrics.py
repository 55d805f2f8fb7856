import socket
import urllib.request
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from jackpot.errors import ConfigError
from jackpot.runtime.metrics import STEP_COLUMNS, Metrics, serve_metrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics("job-1", registry)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"job_id": "job-1", **labels})


def test_every_column_of_a_step_is_shown(registry: CollectorRegistry, metrics: Metrics) -> None:
    row = {name: float(index) for index, name in enumerate(STEP_COLUMNS, start=1)}
    metrics.observe_step({"step": 12, "time": 1.0, "some/other": 2.0, **row})
    assert value(registry, "jackpot_step") == 12
    for name, column in STEP_COLUMNS.items():
        assert value(registry, column.gauge, **(column.labels or {})) == row[name], name


def test_columns_of_one_gauge_agree_on_labels_and_description() -> None:
    for column in STEP_COLUMNS.values():
        for other in STEP_COLUMNS.values():
            if column.gauge == other.gauge and column is not other:
                assert column.description == other.description
                assert (column.labels or {}).keys() == (other.labels or {}).keys()
                assert column.labels != other.labels


def test_a_gauge_appears_only_with_its_first_value(registry: CollectorRegistry, metrics: Metrics) -> None:
    assert value(registry, "jackpot_policy_accuracy_ratio") is None
    assert value(registry, "jackpot_reward_mean") is None
    metrics.observe_evaluation(10, 0.625)
    metrics.observe_step({"reward/mean": 0.5})
    assert value(registry, "jackpot_policy_accuracy_ratio") == 0.625
    assert value(registry, "jackpot_evaluated_step") == 10
    assert value(registry, "jackpot_reward_mean") == 0.5
    assert value(registry, "jackpot_reward_std") is None


def test_counters_count(registry: CollectorRegistry, metrics: Metrics) -> None:
    assert value(registry, "jackpot_tokens_trained_total") == 0
    metrics.tokens_generated_total.inc(5)
    metrics.tokens_scored_total.inc(4)
    metrics.tokens_trained_total.inc(3)
    metrics.count_group("trained")
    metrics.count_group("dropped", "stale")
    metrics.count_group("dropped", "stale")
    metrics.count_restart("rollout-0")
    metrics.observe_in_flight(7)
    assert value(registry, "jackpot_tokens_generated_total") == 5
    assert value(registry, "jackpot_tokens_scored_total") == 4
    assert value(registry, "jackpot_tokens_trained_total") == 3
    assert value(registry, "jackpot_groups_total", state="trained", reason="") == 1
    assert value(registry, "jackpot_groups_total", state="dropped", reason="stale") == 2
    assert value(registry, "jackpot_process_restarts_total", process="rollout-0") == 1
    assert value(registry, "jackpot_groups_in_flight") == 7


def test_calls_are_counted_timed_and_seen_in_flight(registry: CollectorRegistry, metrics: Metrics) -> None:
    call = {"service": "jackpot.v1.ScoringService", "method": "Score"}
    metrics.rpc_started(**call)
    assert value(registry, "jackpot_rpc_in_flight", **call) == 1
    metrics.rpc_finished(**call, code="OK", seconds=0.25)
    assert value(registry, "jackpot_rpc_in_flight", **call) == 0
    assert value(registry, "jackpot_rpc_requests_total", **call, code="OK") == 1
    assert value(registry, "jackpot_rpc_duration_seconds_sum", **call) == 0.25


def test_weights_are_shown_per_role_and_replica(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.observe_weights("actor", "rollout-1", 8, load_seconds=0.3)
    assert value(registry, "jackpot_weight_version", role="actor", instance="rollout-1") == 8
    assert value(registry, "jackpot_weight_load_seconds_count", role="actor") == 1


@dataclass(frozen=True)
class Depths:
    rollouts_waiting: int = 1
    rollouts_pending: int = 2
    scored_waiting: int = 3
    scored_pending: int = 4
    bytes_used: int = 5
    bytes_budget: int = 6


def test_the_bus_shows_its_depths(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.observe_bus(Depths())
    groups = {
        (stream, state): value(registry, "jackpot_bus_groups", stream=stream, state=state)
        for stream in ("rollouts", "scored")
        for state in ("waiting", "pending")
    }
    assert groups == {
        ("rollouts", "waiting"): 1,
        ("rollouts", "pending"): 2,
        ("scored", "waiting"): 3,
        ("scored", "pending"): 4,
    }
    assert value(registry, "jackpot_bus_used_bytes") == 5
    assert value(registry, "jackpot_bus_budget_bytes") == 6


def test_the_endpoint_speaks_prometheus_with_our_names_and_label(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.observe_step({"step": 1, **dict.fromkeys(STEP_COLUMNS, 1.0)})
    metrics.observe_bus(Depths())
    port = serve_metrics("127.0.0.1:0", registry)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) > len(STEP_COLUMNS)
    for sample in samples:
        assert sample.name.startswith("jackpot_")
        assert sample.labels["job_id"] == "job-1"
        assert "job" not in sample.labels


@pytest.mark.parametrize("address", ["9100", "localhost:", "localhost:http", "127.0.0.1:70000"])
def test_an_address_that_cannot_be_served_is_refused(registry: CollectorRegistry, address: str) -> None:
    with pytest.raises(ConfigError, match="JACKPOT_METRICS_ADDRESS") as caught:
        serve_metrics(address, registry)
    assert address in str(caught.value)


def test_a_port_in_use_is_refused(registry: CollectorRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="cannot be bound"):
            serve_metrics(address, registry)
