"""The metrics' table against the code, and the rules that names and labels follow."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from monitoring_world import ROOT

from jackpot.control_plane.service_metrics import CATALOGUE as CONTROL_PLANE
from jackpot.telemetry import CATALOGUE, LABELS, MetricSpec

SPECS = (*CATALOGUE.values(), *CONTROL_PLANE.values())
# Words that say another unit than the base unit, or what the client library says by itself.
FORBIDDEN = {"milliseconds", "ms", "minutes", "hours", "kilobytes", "megabytes", "mb", "gb", "percent"}
FORBIDDEN |= {"total", "count", "sum", "bucket", "info", "counter", "gauge"}
RESERVED = {"job", "service", "instance", "namespace", "pod", "le", "quantile"}  # the scraper's, and the format's own


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("metrics_table", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_about_metrics_is_what_the_code_says() -> None:
    written = script("deploy/prometheus/metrics_table.py").render()
    committed = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert committed == written, "run: python deploy/prometheus/metrics_table.py"
    for spec in SPECS:
        assert f"| `{spec.exposed_name}` | {spec.kind} |" in committed


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_names_say_their_unit_once_and_at_the_end(spec: MetricSpec) -> None:
    assert re.fullmatch(r"jackpot(_[a-z0-9]+)+", spec.name), "prefix, snake case"
    words = spec.name.split("_")
    assert not set(words) & FORBIDDEN
    for unit in ("seconds", "bytes", "ratio", "nats"):
        said = [index for index, word in enumerate(words) if word == unit]
        rate = words[-2:] == ["per", "second"]
        # A ratio's extreme or kind may follow its name.
        assert not said or said[-1] >= len(words) - 2 or rate, "the unit stands at the end"
    assert spec.description and not spec.description.endswith(".") and spec.services
    assert bool(spec.buckets) == (spec.kind == "histogram") and list(spec.buckets) == sorted(set(spec.buckets))


def test_every_label_has_a_bounded_set_of_values_that_is_written_down() -> None:
    used = {label for spec in SPECS for label in spec.labels}
    assert used <= LABELS.keys()
    assert LABELS.keys() - used == {"job_id", "le"}  # the one on all, and the histograms'
    assert not used & (RESERVED - {"quantile"})
    assert all(LABELS.values())


def test_names_are_unique_also_with_their_endings() -> None:
    endings = {"counter": ("_total", "_created"), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    names = [spec.name + ending for spec in SPECS for ending in endings.get(spec.kind, ("",))]
    names += [spec.name for spec in SPECS if spec.kind in endings]
    assert len(names) == len(set(names))
