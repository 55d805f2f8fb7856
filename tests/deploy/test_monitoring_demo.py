"""A real Prometheus scrapes a real job, found through the control plane, and fills every panel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MakeModel
from monitoring_world import Prometheus, is_filled, prometheus, queries
from patience import TEST_SECONDS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from server_world import running_server, tiny_job

from jackpot.control_plane.service_metrics import CATALOGUE as CONTROL_PLANE
from jackpot.telemetry import ACTIVITIES, CATALOGUE, GpuCollector, serve_metrics
from jackpot.telemetry.catalogue import MetricSpec

WINDOW = "20s"

pytestmark = pytest.mark.timeout(TEST_SECONDS)

ROWS_OF_GPUS = ("Are the GPUs busy?", "Is vLLM well used?")
PANELS_OF_GPUS = ("GPUs' busy fraction",)
MAX_SERIES = 150  # of one metric in a job of six processes


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Iterator[tuple[Prometheus, str, float]]:
    """A Prometheus that has scraped a job from its start, the job's id, and a moment at which it ran."""
    directory = tmp_path_factory.mktemp("monitored")
    with running_server(directory / "data") as server:
        plane = server.url.removeprefix("http://")
        scrape = [
            {
                "job_name": "control-plane",
                "static_configs": [{"targets": [plane], "labels": {"service": "control-plane"}}],
            },
            {
                "job_name": "jobs",
                "honor_labels": True,
                "http_sd_configs": [{"url": f"{server.url}/v1/metrics-targets", "refresh_interval": "1s"}],
            },
        ]
        with prometheus(directory / "prometheus", scrape) as watcher, server.client() as client:
            job = tiny_job(directory, make_model, scorer=True, steps=5000, checkpoint_every=2)
            job["evaluation"] = {"every": 2, "prompts": 4}
            job["algorithm"] = job.get("algorithm", {}) | {"kl_penalty": {"weight": 0.01}}
            job_id = client.submit(job).id
            ready = (
                f'jackpot_evaluated_step{{job_id="{job_id}"}} > 0',
                f'jackpot_groups_total{{job_id="{job_id}",state="trained"}} > 6',
                f'jackpot_weight_version{{job_id="{job_id}",service="evaluator"}} > 0',
                f'rate(jackpot_activity_seconds_total{{job_id="{job_id}",service="orchestrator"}}[{WINDOW}]) > 0',
            )
            for expr in ready:
                watcher.wait_for(expr)
            # Two more looks at everything, so that each rate has its points.
            step = watcher.query(f'jackpot_step{{job_id="{job_id}"}}')[0][1]
            watcher.wait_for(f'jackpot_step{{job_id="{job_id}"}} > {step + 2}')
            own = f'job_id="{job_id}"'
            for series in (
                f"jackpot_tokens_trained_total{{{own}}}",
                f"jackpot_token_acceptance_ratio_bucket{{{own}}}",
                f'jackpot_activity_seconds_total{{{own},service="learner",activity="wait_groups"}}',
            ):
                watcher.wait_for(f"rate({series}[{WINDOW}])")
            moment = time.time()
            client.cancel(job_id)
            yield watcher, job_id, moment


def test_every_panel_is_filled(scraped: tuple[Prometheus, str, float]) -> None:
    watcher, job_id, moment = scraped
    empty = [
        f"{query}: {query.expanded(job_id, WINDOW)}"
        for query in queries()
        if query.row not in ROWS_OF_GPUS
        and query.panel not in PANELS_OF_GPUS
        and not is_filled(watcher.query(query.expanded(job_id, WINDOW), moment))
    ]
    assert not empty, "\n".join(empty)


def test_what_is_served_is_what_the_table_says(scraped: tuple[Prometheus, str, float]) -> None:
    watcher, job_id, moment = scraped
    specs = {name: spec for spec in (*CATALOGUE.values(), *CONTROL_PLANE.values()) for name in _exposed(spec)}
    found = watcher.query(f'{{__name__=~"jackpot_.+",job_id="{job_id}"}}', moment)
    series: dict[str, int] = {}
    for labels, _ in found:
        name = labels["__name__"]
        series[name] = series.get(name, 0) + 1
        spec = specs[name]
        added = {"__name__", "job", "job_id", "service", "instance"} | ({"le"} if spec.kind == "histogram" else set())
        # Prometheus leaves out a label whose value is empty, such as the reason of a group that was trained.
        assert set(labels) - added in (set(spec.labels), set(spec.labels) - {"reason"}), labels
        service = "rollout" if labels["service"] == "evaluator" else labels["service"]
        assert service in spec.services, labels
        if name == "jackpot_activity_seconds_total":
            assert labels["activity"] in ACTIVITIES[service], labels
    assert max(series.values()) <= MAX_SERIES, series
    # Whatever the catalogue has, somebody serves; but for GPUs, refusals, and what this job's settings do without.
    absent = {spec.name for spec in CATALOGUE.values()} - {specs[name].name for name in series if name in specs}
    assert absent <= {
        "jackpot_gpu_busy_ratio",
        "jackpot_gpu_memory_used_bytes",
        "jackpot_gpu_memory_size_bytes",
        "jackpot_weights_broadcast",
        "jackpot_weights_refused",
        "jackpot_object_store_calls",
        "jackpot_object_store_call_seconds",
    }, absent


def _exposed(spec: MetricSpec) -> set[str]:
    if spec.kind == "histogram":
        return {spec.name + ending for ending in ("_bucket", "_sum", "_count")}
    return {spec.exposed_name}


def serve_as_a_gpu_would(registry: CollectorRegistry) -> Callable[[], None]:
    """Serve the names of vLLM 0.32 and of NVML's collector; the function that lets counters grow."""
    labels, values = ("model_name", "engine"), ("policy", "0")
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        Gauge(f"vllm:{name}", name, labels, registry=registry).labels(*values).set(0.5)
    for name in GpuCollector.NAMES:
        Gauge(name, name, ("job_id", "gpu"), registry=registry).labels("with-gpu", "0").set(0.5)
    names = ("prompt_tokens", "generation_tokens", "prefix_cache_hits", "prefix_cache_queries", "num_preemptions")
    counters = [Counter(f"vllm:{name}", name, labels, registry=registry).labels(*values) for name in names]
    latency = Histogram("vllm:inter_token_latency_seconds", "latency", labels, registry=registry).labels(*values)

    def grow() -> None:
        latency.observe(0.02)
        for counter in counters:
            counter.inc()

    return grow


def test_panels_about_gpus_are_filled_where_there_are_gpus(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    grow = serve_as_a_gpu_would(registry)
    port = serve_metrics("127.0.0.1:0", registry)
    labels = {"job_id": "with-gpu", "service": "rollout", "instance": "rollout-0"}
    scrape = [{"job_name": "jobs", "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": labels}]}]
    asked = [query for query in queries() if query.row in ROWS_OF_GPUS or query.panel in PANELS_OF_GPUS]
    assert len(asked) >= 10
    with prometheus(tmp_path, scrape) as watcher:
        watcher.wait_for(f"rate(vllm:generation_tokens_total[{WINDOW}]) > 0", meanwhile=grow)
        for query in asked:
            assert is_filled(watcher.query(query.expanded("with-gpu", WINDOW))), str(query)
