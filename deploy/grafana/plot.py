"""Draws a row of a committed dashboard from a Prometheus, by the row's own queries, for where there is no Grafana.

``python deploy/grafana/plot.py --prometheus URL --job JOB --out FILE [--row TEXT] [--start UNIX] [--end UNIX]``
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

DASHBOARDS = Path(__file__).parents[2] / "helm" / "jackpot" / "dashboards"
COLUMNS = 3
POINTS = 160

Series = Mapping[str, Any]  # "metric": labels, "values": [[time, "value"], …]


def panels_of(dashboard: str, row: str) -> list[dict[str, Any]]:
    """The panels of the first row whose title contains a text."""
    found: list[dict[str, Any]] = []
    inside = False
    for panel in json.loads((DASHBOARDS / f"{dashboard}.json").read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            inside = not found and row in panel["title"]
            found += panel.get("panels", []) if inside else []
        elif inside:
            found.append(panel)
    return found


def ask(prometheus: str, expr: str, start: float, end: float) -> Sequence[Series]:
    """The series of an expression over a range."""
    step = max(1.0, (end - start) / POINTS)
    params = urllib.parse.urlencode({"query": expr, "start": start, "end": end, "step": step})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{params}", timeout=30) as response:
        series: Sequence[Series] = json.load(response)["data"]["result"]
    return series


def legend(template: str, labels: Mapping[str, str]) -> str:
    """A legend with its ``{{label}}`` filled in."""
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def draw(
    axes: Axes, panel: Mapping[str, Any], prometheus: str, job: str, start: float, end: float, window: str
) -> None:
    """One panel."""
    axes.set_title(panel["title"], fontsize=9)
    for target in panel["targets"]:
        expr = target["expr"].replace("$namespace", ".*").replace("$job", job).replace("$__rate_interval", window)
        series = ask(prometheus, expr, start, end)
        if panel["type"] == "heatmap":
            draw_heatmap(axes, series, start)
            continue
        for one in series:
            times = [float(t) - start for t, _ in one["values"]]
            values = [float(value) for _, value in one["values"]]
            axes.plot(times, values, lw=1.2, label=legend(target["legendFormat"], one["metric"]))
    if panel["type"] != "heatmap":
        defaults = panel["fieldConfig"]["defaults"]
        if defaults["unit"] == "percentunit":
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        if defaults.get("custom", {}).get("scaleDistribution", {}).get("type") == "log":
            axes.set_yscale("log")
        if "min" in defaults:
            axes.set_ylim(bottom=defaults["min"])
        axes.legend(fontsize=6, loc="best", frameon=False)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, lw=0.5)


def draw_heatmap(axes: Axes, series: Sequence[Series], start: float) -> None:
    """A histogram's buckets over time: each column is the share of the values that fell into each bucket."""
    ordered = sorted(series, key=lambda one: float(one["metric"]["le"]))
    times = sorted({float(t) for one in ordered for t, _ in one["values"]})
    at = {moment: column for column, moment in enumerate(times)}
    cumulative = np.full((len(ordered), len(times)), math.nan)
    for bucket, one in enumerate(ordered):
        for t, value in one["values"]:
            cumulative[bucket, at[float(t)]] = float(value)
    counts = np.diff(cumulative, axis=0, prepend=0.0)
    total = np.where(cumulative[-1] > 0, cumulative[-1], math.nan)
    axes.imshow(counts / total, aspect="auto", origin="lower", cmap="Oranges",
                extent=(times[0] - start, times[-1] - start, -0.5, len(ordered) - 0.5), vmin=0, vmax=1)  # fmt: skip
    labels = [f"≤ {one['metric']['le']}" for one in ordered]
    axes.set_yticks(range(len(ordered)), labels, fontsize=5)


def main() -> None:
    """Read the arguments, draw, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--dashboard", default="job")
    parser.add_argument("--row", default="(OBRS)", help="part of the row's title")
    parser.add_argument("--job", required=True)
    parser.add_argument("--start", type=float, default=time.time() - 3600)
    parser.add_argument("--end", type=float, default=time.time())
    parser.add_argument("--window", default="30s", help="stands for $__rate_interval")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    panels = panels_of(arguments.dashboard, arguments.row)
    if not panels:
        parser.error(f"no row of {arguments.dashboard} has {arguments.row!r} in its title")
    rows = math.ceil(len(panels) / COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.6 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        span = (arguments.start, arguments.end)
        draw(axes, panel, arguments.prometheus, arguments.job, *span, arguments.window)
    for axes in grid[-1]:
        axes.set_xlabel("seconds", fontsize=7)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
