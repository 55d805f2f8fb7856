"""Addresses of servers, ``unix:/path`` or ``host:port``, and the settings that both ends of a connection share."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from jackpot.errors import ConfigError

LIVENESS = "liveness"
READINESS = "readiness"

MAX_MESSAGE_BYTES = 256 << 20
MESSAGE_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

_MAX_UNIX_PATH_BYTES = 107


def check_address(address: str, tls_dir: str, field: str, *, serving: bool = True) -> None:
    """Refuse an address of neither form, and serving plaintext beyond this machine.

    Args:
        address: of a server.
        tls_dir: directory of its certificates; empty is plaintext.
        field: the setting that holds the address.
        serving: whether this process serves there. Otherwise it connects to it, or serves health checks only.

    Raises:
        ConfigError: names the field, the address and the remedy.
    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if len(path.encode()) > _MAX_UNIX_PATH_BYTES:
            problem = f"is longer than the {_MAX_UNIX_PATH_BYTES} bytes that a unix socket's path may have"
            raise ConfigError(field, address, problem, "Use a shorter directory, e.g. under /tmp.")
        if path:
            return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(field, address, "is neither unix:/path nor host:port", "Write e.g. 127.0.0.1:50051.")
    if serving and not tls_dir and not _is_loopback(host):
        raise ConfigError(
            field,
            address,
            "would serve plaintext beyond this machine",
            "Listen on unix:/path or 127.0.0.1, or set JACKPOT_TLS_DIR.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
