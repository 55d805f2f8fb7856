import json
import math
import shutil
import socket
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE_SECONDS
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from jackpot.errors import ConfigError
from jackpot.telemetry import (
    CATALOGUE,
    DROP_REASONS,
    STEP_COLUMNS,
    Metrics,
    reachable_host,
    serve_metrics,
)
from jackpot.telemetry.gpu import GpuCollector, visible_gpus
from jackpot.telemetry.scrape_targets import announce_target, forget_target, forget_targets, read_targets


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
    assert value(registry, "jackpot_tokens_trained_total") is None
    metrics.expect_groups()
    for reason in DROP_REASONS:
        assert value(registry, "jackpot_groups_total", state="dropped", reason=reason) == 0
    metrics.tokens_generated_total.inc(5)
    metrics.tokens_scored_total.inc(4)
    metrics.tokens_trained_total.inc(3)
    metrics.count_group("trained")
    metrics.count_group("dropped", "stale")
    metrics.count_group("dropped", "stale")
    metrics.observe_in_flight(7)
    assert value(registry, "jackpot_tokens_generated_total") == 5
    assert value(registry, "jackpot_tokens_scored_total") == 4
    assert value(registry, "jackpot_tokens_trained_total") == 3
    assert value(registry, "jackpot_groups_total", state="trained", reason="") == 1
    assert value(registry, "jackpot_groups_total", state="dropped", reason="stale") == 2
    assert value(registry, "jackpot_groups_in_flight") == 7


def test_calls_are_counted_timed_and_seen_in_flight(registry: CollectorRegistry, metrics: Metrics) -> None:
    call = {"grpc_service": "jackpot.v1.ScoringService", "grpc_method": "Score"}
    metrics.rpc_started(*call.values())
    assert value(registry, "jackpot_rpc_in_flight", **call) == 1
    metrics.rpc_finished(*call.values(), code="OK", seconds=0.25)
    assert value(registry, "jackpot_rpc_in_flight", **call) == 0
    assert value(registry, "jackpot_rpc_requests_total", **call, grpc_code="OK") == 1
    assert value(registry, "jackpot_rpc_duration_seconds_sum", **call) == 0.25


def test_weights_are_shown_per_role_and_replica(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.observe_weights("actor", 8, load_seconds=0.3)
    assert value(registry, "jackpot_weight_version", role="actor") == 8
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
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) > len(STEP_COLUMNS)
    for sample in samples:
        assert sample.name.startswith("jackpot_")
        assert sample.labels["job_id"] == "job-1"
        assert "job" not in sample.labels


def test_names_are_the_same_whoever_asks(registry: CollectorRegistry) -> None:
    """Prometheus 2 asks for OpenMetrics, and must get vLLM's names with their colon."""
    Counter("vllm:generation_tokens", "as vLLM names it", registry=registry).inc(3)
    port = serve_metrics("127.0.0.1:0", registry)
    for accept in ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "*/*"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        assert lines == ["vllm:generation_tokens_total 3.0"]


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


def test_histograms_take_a_batch_at_once_as_prometheus_counts(registry: CollectorRegistry, metrics: Metrics) -> None:
    acceptance = [0.005, 0.05, 0.06, 1.0, 1.0]
    metrics.observe_tokens(acceptance, [2.0, 5000.0, math.nan, math.inf, -math.inf], [1.0] * 5)
    metrics.observe_tokens([0.05], [2.0], [0.3])
    buckets = {
        le: value(registry, "jackpot_token_acceptance_ratio_bucket", le=le)
        for le in ("0.01", "0.05", "0.1", "1.0", "+Inf")
    }
    assert buckets == {"0.01": 1, "0.05": 3, "0.1": 4, "1.0": 6, "+Inf": 6}
    assert value(registry, "jackpot_token_acceptance_ratio_count") == 6
    assert value(registry, "jackpot_token_acceptance_ratio_sum") == pytest.approx(sum(acceptance) + 0.05)
    assert value(registry, "jackpot_token_target_ratio_count") == 3
    assert value(registry, "jackpot_token_target_ratio_bucket", le="1000.0") == 2
    assert value(registry, "jackpot_token_normalizer_bucket", le="0.3") == 1


def test_time_adds_up_by_activity(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.count_activity("train", 1.5)
    metrics.count_activity("train", 0.5)
    assert value(registry, "jackpot_activity_seconds_total", activity="train") == 2


def test_alarms_last_and_are_counted_from_zero(registry: CollectorRegistry, metrics: Metrics) -> None:
    metrics.observe_alarms({"kl_too_large": True, "low_acceptance": False})
    metrics.count_alarm("kl_too_large")
    assert value(registry, "jackpot_alarm_active", alarm="kl_too_large") == 1
    assert value(registry, "jackpot_alarm_active", alarm="low_acceptance") == 0
    assert value(registry, "jackpot_alarms_total", alarm="kl_too_large") == 1
    assert value(registry, "jackpot_alarms_total", alarm="low_acceptance") == 0


def test_every_metric_of_the_catalogue_is_there_and_no_other(registry: CollectorRegistry, metrics: Metrics) -> None:
    GpuCollector("job-1", registry)
    described = {(metric.name, metric.type): metric.documentation for metric in registry.collect()}
    assert described == {(spec.name, spec.kind): spec.description for spec in CATALOGUE.values()}


def test_a_process_says_where_its_endpoint_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    announce_target(tmp_path, "job-1", "rollout", "rollout-0", "127.0.0.1:9101")
    announce_target(tmp_path, "job-1", "learner", "learner-0", "node-1:9090")
    labels = {"job_id": "job-1", "service": "rollout", "instance": "rollout-0"}
    rollout = [{"targets": ["127.0.0.1:9101"], "labels": labels}]
    assert json.loads((tmp_path / "metrics" / "rollout-0.json").read_text()) == rollout
    assert len(list((tmp_path / "metrics").iterdir())) == 2  # nothing half-written is left
    learner, first = read_targets(tmp_path)
    assert [first] == rollout and learner["targets"] == ["node-1:9090"]
    (tmp_path / "metrics" / "learner-0.json").write_text("[{")
    assert read_targets(tmp_path) == rollout
    assert "metrics/learner-0.json is damaged" in caplog.text
    forget_target(tmp_path, "rollout-0")
    assert read_targets(tmp_path) == []
    forget_targets(tmp_path)
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize(
    ("address", "name", "host"),
    [
        ("127.0.0.1:0", "", "127.0.0.1"),
        ("0.0.0.0:9090", "", socket.gethostname()),
        ("[::]:9090", "", socket.gethostname()),
        ("0.0.0.0:0", "platform", "platform"),
    ],
)
def test_a_process_is_found_under_the_name_that_others_can_use(address: str, name: str, host: str) -> None:
    assert reachable_host(address, name) == host


@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        ("GPU-3f,1", ["GPU-3f", "1"]),
        ("", []),
        ("0,7,1", ["0"]),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_sees(variable: str | None, visible: list[str]) -> None:
    assert visible_gpus(variable, 2) == visible


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver")
def test_gpus_are_shown_as_nvml_sees_them(registry: CollectorRegistry) -> None:
    pytest.importorskip("pynvml")
    GpuCollector("job-1", registry)
    busy = value(registry, "jackpot_gpu_busy_ratio", gpu="0")
    used, size = (value(registry, f"jackpot_gpu_memory_{what}_bytes", gpu="0") for what in ("used", "size"))
    assert busy is not None and 0 <= busy <= 1
    assert used is not None and size is not None and 0 < used < size


def test_without_a_gpu_there_are_no_figures_about_gpus(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    GpuCollector("job-1", registry)
    assert value(registry, "jackpot_gpu_busy_ratio", gpu="0") is None


def test_recording_costs_next_to_nothing(metrics: Metrics) -> None:
    """What stands in a decode loop and around an RPC: microseconds. The bound is ten times what one core takes."""
    count = 2000
    started = time.perf_counter()
    for _ in range(count):
        metrics.tokens_generated_total.inc(8)
        metrics.rpc_started("s", "m")
        metrics.rpc_finished("s", "m", "OK", 0.1)
    assert (time.perf_counter() - started) / count < 200e-6
    tokens = np.random.default_rng(0).random(16384).astype(np.float32)
    started = time.perf_counter()
    metrics.observe_tokens(tokens, tokens, tokens)
    assert time.perf_counter() - started < 0.1
