"""A service process's settings from its launcher: one frozen object, read once from the environment.

A launcher (local processes, Kubernetes) sets these variables; nothing else in a service reads ``os.environ``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jackpot.errors import ConfigError
from jackpot.trajectory import Role

PREFIX = "JACKPOT_"
_START_WITH = "The launcher sets it; start services with `jackpot run`."


def redis_url_over_tls(url: str, tls_dir: str) -> str:
    """A rediss:// address with the PEM files of a directory, unless it names its own; other addresses are unchanged.

    Args:
        url: of a Redis.
        tls_dir: holds ``ca.crt`` and, for servers that require client certificates, ``tls.crt`` and ``tls.key``.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss" or not tls_dir:
        return url
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    directory = Path(tls_dir)
    files = {"ssl_ca_certs": directory / "ca.crt"}
    if "ssl_certfile" not in query and (directory / "tls.crt").is_file():
        files |= {"ssl_certfile": directory / "tls.crt", "ssl_keyfile": directory / "tls.key"}
    added = {name: str(path) for name, path in files.items() if name not in query}
    return urlunsplit(parts._replace(query=urlencode(query | added)))


class ServiceEnvironment(BaseModel):
    """Addresses and paths of one service process. Variable names are the field names in capitals after JACKPOT_."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_dir: Path
    """The job's directory (shared by all its processes): see :mod:`jackpot.storage.run_directory`."""
    job_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """The job's id: Redis keys and metric labels carry it."""
    instance: str = "0"
    """Which replica of its service this is; also its consumer name on the bus, stable over restarts."""
    redis_url: str = ""
    """The bus's server. For rediss:// the files of ``tls_dir`` serve as authority and certificate, unless the URL names
    its own (``?ssl_ca_certs=…&ssl_certfile=…&ssl_keyfile=…``)."""
    listen: str = ""
    """gRPC address to serve on: ``unix:/path`` or ``host:port``."""
    advertise_address: str = ""
    """Rollout service only: the gRPC address that a replica which joins a running job announces in the run directory.
    Empty for the job's initial replicas, whose addresses the orchestrator has."""
    tls_dir: str = ""
    """Directory with ``tls.crt``, ``tls.key`` and ``ca.crt`` for mutual TLS between the services; empty is plaintext,
    which is refused on anything but unix sockets and loopback."""
    tls_peer_name: str = ""
    """Name that every service's certificate carries (a DNS subject alternative name). Clients check it instead of
    the address's host, whose name a scheduler chooses, and servers refuse callers without it. Empty: clients check the
    host, and servers accept every certificate of the authority."""
    health_listen: str = ""
    """``host:port`` for plaintext gRPC health checks only, since probes do not use TLS. Empty serves none."""
    role: Role = "actor"
    """Rollout service only: whose weights it samples with. ``policy`` makes it the evaluator."""
    rollout_addresses: tuple[str, ...] = ()
    """Orchestrator, and a learner that broadcasts weights: gRPC addresses of the rollout replicas, comma-separated."""
    evaluator_address: str = ""
    """Orchestrator only: a rollout server on the policy's weights."""
    metrics_address: str = ""
    """``host:port`` for /metrics; port 0 takes a free one, empty serves none. The actual port is written to
    ``metrics/`` in the run directory."""
    metrics_host: str = ""
    """Name by which Prometheus reaches the address above; empty: its own host, or this machine's name if that is
    0.0.0.0."""
    threads: int = 0
    """Threads for torch; 0 keeps torch's default."""
    scratch_dir: str = ""
    """Directory on a local disk for copies of objects in an object store (``weights.store``); may be lost at any
    time. Empty: ``scratch/`` in the run directory."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ServiceEnvironment:
        """Parse the JACKPOT_* variables.

        Raises:
            ConfigError: naming the variable that is missing or malformed.
        """
        variables = os.environ if environ is None else environ
        values: dict[str, object] = {}
        for name in cls.model_fields:
            variable = PREFIX + name.upper()
            if variable in variables:
                text = variables[variable]
                values[name] = tuple(filter(None, text.split(","))) if name == "rollout_addresses" else text
        values["redis_url"] = redis_url_over_tls(str(values.get("redis_url", "")), str(values.get("tls_dir", "")))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            detail = error.errors()[0]
            variable = PREFIX + str(detail["loc"][0]).upper()
            # A missing variable's input would be the whole environment, passwords and all.
            value, problem = (
                (None, "is not set") if detail["type"] == "missing" else (detail["input"], detail["msg"].lower())
            )
            raise ConfigError(variable, value, problem, _START_WITH) from None

    def to_env(self) -> dict[str, str]:
        """The variables that :meth:`from_env` reads back."""
        values = {PREFIX + name.upper(): getattr(self, name) for name in type(self).model_fields}
        return {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in values.items()}
