"""A server's settings, fixed before it starts."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jackpot.control_plane.jobs.admission import Admission
from jackpot.control_plane.jobs.scheduler import SchedulingPolicy
from jackpot.control_plane.launch.launcher_choice import LauncherChoice
from jackpot.errors import ConfigError

MAX_BODY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Settings of `jackpot serve`."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8700
    store_url: str | None = None  # None embeds a server
    token_required: bool = False
    token_file: Path | None = None  # None is tokens.json in the data directory
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_elsewhere: bool = False  # a proxy in front speaks TLS
    allowed_hosts: tuple[str, ...] = ()  # names of the server, besides its own address
    admission: Admission = field(default_factory=Admission)
    policy: SchedulingPolicy = field(default_factory=SchedulingPolicy)
    launcher_choice: LauncherChoice = field(default_factory=LauncherChoice)  # where jobs run
    max_body_bytes: int = MAX_BODY_BYTES
    requests_per_second: float = 100.0  # of one client; 0 is no limit
    burst: int = 300

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def tokens(self) -> Path:
        """Where the hashes of the tokens lie."""
        return self.token_file or self.data_dir / "tokens.json"

    @property
    def tls(self) -> bool:
        """Whether the server itself speaks TLS."""
        return self.tls_certificate is not None

    @property
    def url(self) -> str:
        """Where the server is."""
        host = f"[{self.host}]" if ":" in self.host.strip("[]") else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    def with_roots(self, roots: Sequence[Path] | None) -> ServeSettings:
        """The same settings with the directories in which models and data may lie. Without any, a server that others
        can reach accepts built-in models only, and a local one any path."""
        chosen = tuple(path.expanduser().resolve() for path in roots) if roots else None if self.loopback else ()
        return replace(self, admission=replace(self.admission, roots=chosen))

    def check(self) -> None:
        """Refuse to be reachable from other hosts without tokens and TLS.

        Raises:
            ConfigError: naming what is missing.
        """
        self.launcher_choice.check()
        if self.launcher_choice.jobs_outlive_sessions and self.store_url is None:
            remedy = "Give the URL of the Redis that the cluster's jobs use, or of another one that lasts."
            raise ConfigError("--store", None, "must be a server of its own when jobs run on a cluster", remedy)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert", None, "needs --tls-key, and the other way round", "Give both.")
        for option, path in (("--tls-cert", self.tls_certificate), ("--tls-key", self.tls_key)):
            if path is not None and not path.is_file():
                raise ConfigError(option, str(path), "is not a file", "Give a PEM file.")
        if self.tls_certificate is not None and self.tls_key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_certificate, self.tls_key)
            except (OSError, ssl.SSLError) as error:
                problem = f"cannot be served ({error})"
                raise ConfigError(
                    "--tls-cert", str(self.tls_certificate), problem, "Give a certificate and its own key, in PEM."
                ) from None
        if self.loopback:
            return
        if not self.token_required:
            remedy = "Make a token first (`jackpot token create`), or stay on 127.0.0.1."
            raise ConfigError("--host", self.host, "would let anybody start jobs on this machine", remedy)
        if not self.tls and not self.tls_elsewhere:
            remedy = "Give --tls-cert and --tls-key, or --tls-elsewhere if a proxy in front of it speaks TLS."
            raise ConfigError("--host", self.host, "would send tokens in the clear", remedy)
