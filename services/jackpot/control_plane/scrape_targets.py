"""Where the processes of a job serve /metrics, in Prometheus's own format for service discovery."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FILE = "prometheus_targets.json"


def write_targets(run_dir: Path, job_id: str, processes: Iterable[tuple[str, str, str]]) -> None:
    """Write the file that Prometheus's ``file_sd_configs`` can read.

    Args:
        run_dir: of the job.
        job_id: the job's id; a label of every target, as are ``service`` and ``instance``.
        processes: service, name and metrics address of each.
    """
    groups = [
        {"targets": [address], "labels": {"job_id": job_id, "service": service, "instance": name}}
        for service, name, address in processes
    ]
    aside = run_dir / f".{FILE}"
    aside.write_text(json.dumps(groups, indent=2), encoding="utf-8")
    aside.replace(run_dir / FILE)


def read_targets(run_dir: Path) -> Sequence[dict[str, Any]]:
    """The groups of :func:`write_targets`; none while the job has no processes that this machine can reach."""
    try:
        groups = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return groups if isinstance(groups, list) else ()
