"""Where the processes of a job serve /metrics, in Prometheus's own format for service discovery.

Each process writes one file once it has its port (:func:`jackpot.telemetry.announce_metrics`): no port is picked
for it that somebody else may take meanwhile.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jackpot.telemetry import ADDRESSES


def forget_targets(run_dir: Path) -> None:
    """Remove what processes of an earlier session have written."""
    shutil.rmtree(run_dir / ADDRESSES, ignore_errors=True)


def forget_target(run_dir: Path, instance: str) -> None:
    """Remove what one process has written, ``rollout-3`` for example: it is not coming back."""
    (run_dir / ADDRESSES / f"{instance}.json").unlink(missing_ok=True)


def read_targets(run_dir: Path) -> Sequence[dict[str, Any]]:
    """One group per process: ``{"targets": ["host:port"], "labels": {…}}``; none of those that are not up yet."""
    groups: list[dict[str, Any]] = []
    for path in sorted((run_dir / ADDRESSES).glob("[!.]*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # removed just now
        groups += content if isinstance(content, list) else []
    return groups
