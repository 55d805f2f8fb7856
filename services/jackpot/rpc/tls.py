"""Mutual TLS between the services: one directory of PEM files per process, laid out as in a Kubernetes TLS secret.

``ca.crt`` (authorities that both sides trust), ``tls.crt`` and ``tls.key`` (this process's certificate). To renew
them, replace the files; the next handshake uses the new ones, without a restart.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from jackpot.errors import ConfigError

LOG = logging.getLogger(__name__)

AUTHORITY, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
_REMEDY = f"It must hold {CERTIFICATE}, {KEY} and {AUTHORITY}."

# Inode, size and modification time of each file: enough to see any replacement.
Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one process, as last read."""

    authority: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def read(cls, tls_dir: str) -> TlsFiles:
        """Read and check the files of a directory.

        Raises:
            ConfigError: a file is missing or not PEM, or the key does not belong to the certificate.
        """
        directory = Path(tls_dir)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_verify_locations(directory / AUTHORITY)
            context.load_cert_chain(directory / CERTIFICATE, directory / KEY, password=_no_password)
            parts = [(directory / name).read_bytes() for name in (AUTHORITY, CERTIFICATE, KEY)]
        except ssl.SSLError as error:
            raise ConfigError("JACKPOT_TLS_DIR", tls_dir, f"holds files that do not match ({error})", _REMEDY) from None
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            missing = ", ".join(n for n in (CERTIFICATE, KEY, AUTHORITY) if not (directory / n).is_file()) or problem
            raise ConfigError("JACKPOT_TLS_DIR", tls_dir, f"cannot be read ({missing})", _REMEDY) from None
        return cls(*parts)


def stamp(tls_dir: str) -> Stamp:
    """A value that changes when a file of the directory is replaced; empty while one is missing."""
    try:
        states = [(Path(tls_dir) / name).stat() for name in (AUTHORITY, CERTIFICATE, KEY)]
    except OSError:
        return ()
    return tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)


class _Renewal:
    """gRPC's callback before each handshake: a new configuration, or None to keep the current one."""

    def __init__(self, tls_dir: str) -> None:
        self._tls_dir = tls_dir
        self._lock = threading.Lock()  # gRPC calls this from its own threads
        self._seen = stamp(tls_dir)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            current = stamp(self._tls_dir)
            if current in ((), self._seen):
                return None
            try:
                files = TlsFiles.read(self._tls_dir)
            except ConfigError as error:
                # Half replaced: the next handshake checks again.
                LOG.warning("the old certificate stays in use: %s", error)
                return None
            self._seen = current
        LOG.info("serving with a new certificate", extra={"tls_dir": self._tls_dir})
        return _configuration(files)


def server_credentials(tls_dir: str) -> grpc.ServerCredentials:
    """Credentials of a server that requires from every client a certificate of its authority, and reloads files.

    Raises:
        ConfigError: the files cannot be used.
    """
    renewal = _Renewal(tls_dir)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(TlsFiles.read(tls_dir)),
        renewal,  # type: ignore[arg-type]  # gRPC documents that None is a valid answer
        require_client_authentication=True,
    )


def channel_credentials(tls_dir: str) -> grpc.ChannelCredentials:
    """Credentials of a client that presents its certificate and verifies the server's.

    Raises:
        ConfigError: the files cannot be used.
    """
    files = TlsFiles.read(tls_dir)
    return grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)


def peer_names(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """The names that a peer's verified certificate was issued for (subject alternative names); none without TLS."""
    return frozenset(name.decode(errors="replace") for name in auth_context.get("x509_subject_alternative_name", ()))


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.authority)


def _no_password() -> str:
    """Without it OpenSSL would prompt on the terminal for an encrypted key's password."""
    return ""
