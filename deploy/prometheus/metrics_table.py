"""Writes ``docs/metrics.md`` from the catalogues in the code: ``python deploy/prometheus/metrics_table.py [file]``.

A test holds the committed file against this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jackpot.control_plane.service_metrics import CATALOGUE as CONTROL_PLANE
from jackpot.telemetry import CATALOGUE, LABELS, STEP_COLUMNS, MetricSpec

COMMITTED = Path(__file__).parents[2] / "docs" / "metrics.md"

INTRODUCTION = """# Metrics

<!-- Written by deploy/prometheus/metrics_table.py from services/jackpot/telemetry/catalogue.py. -->

What every process serves on `/metrics`. How to scrape it, and what to look at: [monitoring.md](monitoring.md). Names
end with their base unit; counters also with `_total`, and a histogram has the three series `_bucket`, `_sum` and
`_count`. Every metric of a job's process has the label `job_id`. The scraper adds `service` (`orchestrator`,
`rollout`, `evaluator`, `scorer`, `learner` or `control-plane`) and `instance`. The evaluator is a rollout service on
the policy's weights and serves what `rollout` serves. A series appears with its first value: a service that never
evaluates has no accuracy. Every process also serves the Python client's own `process_*` metrics (processor time,
memory, file descriptors, start time), and workers its `python_*` ones; a rollout service on vLLM adds vLLM's own
`vllm:*`.

"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def metric_rows(specs: Iterable[MetricSpec]) -> Iterable[Sequence[str]]:
    """One row per metric."""
    for spec in specs:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        yield f"`{spec.exposed_name}`", spec.kind, spec.unit, labels, f"{spec.description}.", ", ".join(spec.services)


def render() -> str:
    """The whole page."""
    header = ("name", "type", "unit", "further labels", "meaning", "service")
    columns = (
        (
            f"`{name}`",
            "`"
            + column.gauge
            + ("{" + ",".join(f'{k}="{v}"' for k, v in column.labels.items()) + "}" if column.labels else "")
            + "`",
        )
        for name, column in STEP_COLUMNS.items()
    )
    buckets = ((f"`{s.name}`", ", ".join(f"{b:g}" for b in s.buckets)) for s in all_specs() if s.kind == "histogram")
    labels = ((f"`{label}`", meaning) for label, meaning in LABELS.items())
    return (
        INTRODUCTION
        + "## Of a job's processes\n\n"
        + table(header, metric_rows(CATALOGUE.values()))
        + "\n## Of the control plane\n\nThey are about no job in particular: none has the label `job_id`.\n\n"
        + table(header, metric_rows(CONTROL_PLANE.values()))
        + "\n## Labels\n\nEach has a bounded set of values, whatever clients send and however long a job runs.\n\n"
        + table(("label", "values"), labels)
        + "\n## Buckets\n\n"
        + table(("histogram", "upper bounds"), buckets)
        + "\n## Columns of `metrics.jsonl`\n\nThe gauges that show the newest value of each.\n\n"
        + table(("column", "gauge"), columns)
    )


def all_specs() -> Iterable[MetricSpec]:
    """Every metric there is."""
    return (*CATALOGUE.values(), *CONTROL_PLANE.values())


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED).write_text(render(), encoding="utf-8")
