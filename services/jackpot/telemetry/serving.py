"""The endpoint ``/metrics`` of a process."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from jackpot.errors import ConfigError

IDLE_SECONDS = 60.0  # a connection that is silent for longer is closed
_EVERYWHERE = ("0.0.0.0", "::")


class _Handler(BaseHTTPRequestHandler):
    """Answers every GET with the metrics, in Prometheus's own text format whatever the request accepts.

    To a Prometheus that accepts OpenMetrics, the client library's server would write vLLM's names with ``_`` in place
    of ``:``, so that names would depend on the client.
    """

    registry: CollectorRegistry
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """Part of the standard library's interface."""
        body = generate_latest(self.registry)
        with contextlib.suppress(ConnectionError):  # the client has not waited for the answer
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not logged."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without the standard library's look-up of this machine's full name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Server6(_Server):
    address_family = socket.AF_INET6


def serve_metrics(address: str, registry: CollectorRegistry = REGISTRY) -> int:
    """Serve ``/metrics`` on ``host:port`` in a background thread until the process ends.

    Returns:
        The port; port 0 takes a free one.

    Raises:
        ConfigError: the address does not have that form, or cannot be bound.
    """
    host, colon, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not colon or not port.isdecimal():
        raise ConfigError("JACKPOT_METRICS_ADDRESS", address, "is not host:port", "Write e.g. 127.0.0.1:9100.")
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody asks for
    handler = type("Handler", (_Handler,), {"registry": registry})
    try:
        server = (_Server6 if ":" in host else _Server)((host, int(port)), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "JACKPOT_METRICS_ADDRESS", address, f"cannot be bound ({error})", "Use a free port."
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port


def reachable_host(address: str, name: str = "") -> str:
    """The host at which ``host:port`` is reached.

    Args:
        address: where a process listens.
        name: other hosts' name for this machine; if empty, a process that listens everywhere uses its host name.
    """
    host = address.rpartition(":")[0]
    return name or (socket.gethostname() if host.strip("[]") in _EVERYWHERE else host)
