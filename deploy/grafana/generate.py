"""Writes the dashboards' JSON: ``python deploy/grafana/generate.py [directory]``.

Without a directory the committed files in ``helm/jackpot/dashboards`` are written anew. A test holds them against this.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dashboards.bus import bus_dashboard
from dashboards.job import job_dashboard
from dashboards.overview import overview_dashboard
from dashboards.services import services_dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

COMMITTED = Path(__file__).parents[2] / "helm" / "jackpot" / "dashboards"


def write(directory: Path) -> None:
    """Write ``overview.json``, ``job.json``, ``services.json`` and ``bus.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    made = {
        "overview": overview_dashboard(),
        "job": job_dashboard(),
        "services": services_dashboard(),
        "bus": bus_dashboard(),
    }
    for name, dashboard in made.items():
        text = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(dashboard)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED)
