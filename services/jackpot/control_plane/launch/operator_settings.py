"""What the operator of a machine decides for all local jobs, in variables of the server's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from jackpot.config.environment import redis_url_over_tls
from jackpot.errors import ConfigError

VARIABLES = ("JACKPOT_BUS_URL", "JACKPOT_METRICS_HOST", "JACKPOT_STORE_URL")
"""Variables that jobs' processes do not inherit: they may hold other roles' passwords."""


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Where local jobs find their bus, and where Prometheus finds them."""

    bus_url: str | None = None
    """Redis server for jobs that name no bus; None embeds one for each job. ``{role}`` in it stands for the role of the
    process that connects: ``orchestrator``, ``scorer``, ``learner``, or ``control-plane`` for the launcher itself."""
    metrics_host: str = ""
    """Name under which Prometheus reaches this machine: metrics are then served on all interfaces. Empty: loopback."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> OperatorSettings:
        """Read ``JACKPOT_BUS_URL`` and ``JACKPOT_METRICS_HOST``; ``JACKPOT_TLS_DIR`` holds the files for rediss://.

        Raises:
            ConfigError: the host is not a host name.
        """
        variables = os.environ if environ is None else environ
        host = variables.get("JACKPOT_METRICS_HOST", "")
        if any(character in host for character in ":/ "):
            raise ConfigError("JACKPOT_METRICS_HOST", host, "is not a host name", "Write it without port and scheme.")
        url = variables.get("JACKPOT_BUS_URL") or None
        return cls(url and redis_url_over_tls(url, variables.get("JACKPOT_TLS_DIR", "")), host)

    def bus_url_of(self, role: str) -> str | None:
        """The bus's address for one role."""
        return self.bus_url and self.bus_url.replace("{role}", role)
