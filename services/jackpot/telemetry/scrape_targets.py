"""The addresses at which a job's processes serve /metrics, in Prometheus's own service discovery format.

Each process writes one file once it has bound its port: a port chosen in advance could be taken meanwhile.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jackpot.storage.json_files import replace_json, warn_once
from jackpot.storage.run_directory import RunFiles


def announce_target(run_dir: Path, job_id: str, service: str, instance: str, address: str) -> None:
    """Record the address at which this process serves ``/metrics``.

    Args:
        run_dir: of the job.
        job_id: a label of the target, as are ``service`` and ``instance``.
        service: ``learner``, ``rollout``, …
        instance: this process's name among the job's.
        address: ``host:port`` at which a Prometheus reaches it.

    Raises:
        OSError: the file cannot be written.
    """
    directory = RunFiles(run_dir).metrics_addresses
    directory.mkdir(exist_ok=True)
    labels = {"job_id": job_id, "service": service, "instance": instance}
    replace_json(directory / f"{instance}.json", [{"targets": [address], "labels": labels}])


def forget_targets(run_dir: Path) -> None:
    """Remove the files of an earlier session's processes."""
    shutil.rmtree(RunFiles(run_dir).metrics_addresses, ignore_errors=True)


def forget_target(run_dir: Path, instance: str) -> None:
    """Remove the file of a process that will not return, such as ``rollout-3``."""
    (RunFiles(run_dir).metrics_addresses / f"{instance}.json").unlink(missing_ok=True)


def read_targets(run_dir: Path) -> Sequence[dict[str, Any]]:
    """One group per process: ``{"targets": ["host:port"], "labels": {…}}``; without processes that are not up yet."""
    groups: list[dict[str, Any]] = []
    for path in sorted(RunFiles(run_dir).metrics_addresses.glob("[!.]*.json")):
        try:
            content = json.loads(path.read_bytes())
        except OSError:
            continue  # just removed
        except ValueError as error:
            warn_once(f"{path} is damaged ({error}) and is left out")
            continue
        groups += content if isinstance(content, list) else []
    return groups
