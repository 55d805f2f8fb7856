"""All metrics of a job: the names of its Prometheus series and of the columns of ``metrics.jsonl``."""

from prometheus_client import REGISTRY

from jackpot.telemetry.catalogue import ACTIVITIES, CATALOGUE, DROP_REASONS, LABELS, WORKERS, MetricSpec
from jackpot.telemetry.columns import STEP_COLUMNS, StepColumn
from jackpot.telemetry.gpu import GpuCollector
from jackpot.telemetry.recording import Depths, Metrics
from jackpot.telemetry.serving import reachable_host, serve_metrics

__all__ = [
    "ACTIVITIES",
    "CATALOGUE",
    "DROP_REASONS",
    "LABELS",
    "REGISTRY",
    "STEP_COLUMNS",
    "WORKERS",
    "Depths",
    "GpuCollector",
    "MetricSpec",
    "Metrics",
    "StepColumn",
    "reachable_host",
    "serve_metrics",
]
