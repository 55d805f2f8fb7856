"""The endpoint ``/metrics`` of a process, and the files by which processes on one machine tell where theirs is."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from jackpot.errors import ConfigError

ADDRESSES = "metrics"
_EVERYWHERE = ("0.0.0.0", "::")


def serve_metrics(address: str, registry: CollectorRegistry = REGISTRY) -> int:
    """Serve ``/metrics`` on ``host:port`` in a background thread until the process ends.

    Returns:
        The port; port 0 takes a free one.

    Raises:
        ConfigError: the address is not of that form or cannot be bound.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ConfigError("JACKPOT_METRICS_ADDRESS", address, "is not host:port", "Write e.g. 127.0.0.1:9100.")
    try:
        server, _ = start_http_server(int(port), host.strip("[]") or "127.0.0.1", registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "JACKPOT_METRICS_ADDRESS", address, f"cannot be bound ({error})", "Use a free port."
        ) from None
    return int(server.server_port)


def reachable_host(address: str, name: str = "") -> str:
    """The host under which ``host:port`` is reached.

    Args:
        address: where a process listens.
        name: what others call this machine; empty: a process that listens everywhere is found under its host's name.
    """
    host = address.rpartition(":")[0]
    return name or (socket.gethostname() if host.strip("[]") in _EVERYWHERE else host)


def announce_metrics(run_dir: Path, job_id: str, service: str, instance: str, address: str) -> None:
    """Write down where this process serves ``/metrics``, as Prometheus's service discovery reads it.

    Args:
        run_dir: of the job; the file is ``metrics/<instance>.json`` in it.
        job_id: a label of the target, as are ``service`` and ``instance``.
        service: ``learner``, ``rollout``, …
        instance: this process's name among the job's.
        address: ``host:port`` under which a Prometheus reaches it.
    """
    labels = {"job_id": job_id, "service": service, "instance": instance}
    directory = run_dir / ADDRESSES
    directory.mkdir(exist_ok=True)
    aside = directory / f".{instance}.{os.getpid()}"
    aside.write_text(json.dumps([{"targets": [address], "labels": labels}]), encoding="utf-8")
    aside.replace(directory / f"{instance}.json")
