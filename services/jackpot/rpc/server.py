"""gRPC servers as every service uses them.

Health under ``liveness``, ``readiness`` and each service's name, reflection, a deadline required on every call,
Jackpot's errors as status codes, counted and timed. Messages up to 256 MiB. Plaintext only on unix sockets and
loopback; elsewhere mutual TLS, with only health checks on a separate plaintext port for probes without TLS.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from jackpot.errors import ConfigError
from jackpot.rpc.address import LIVENESS, MESSAGE_OPTIONS, READINESS, check_address
from jackpot.rpc.interceptor import CallInterceptor
from jackpot.rpc.tls import server_credentials
from jackpot.telemetry import Metrics

LOG = logging.getLogger(__name__)

_SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # two servers on one port are a mistake, not load balancing
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class HealthReporter:
    """The answers to health checks. ``liveness`` holds from the start, ``readiness`` once :meth:`set_ready` sets it."""

    def __init__(self, servicer: health_aio.HealthServicer, service_names: Sequence[str]) -> None:
        self._servicer = servicer
        self._names = ("", READINESS, *service_names)

    async def set_ready(self, ready: bool) -> None:
        """Report ``readiness``, the overall status and each service as serving, or as not serving."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._servicer.set(name, status)

    async def set_live(self) -> None:
        """Report ``liveness``."""
        await self._servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)


class RpcServer:
    """A server made by :func:`create_server`.

    Attributes:
        address: its address for clients, with the real port if port 0 was requested.
        health: the answers to its health checks.
        health_address: plaintext address for health checks only, with the real port; empty without one.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        address: str,
        health: HealthReporter,
        probed: grpc.aio.Server | None = None,
        health_address: str = "",
    ) -> None:
        self.address = address
        self.health = health
        self.health_address = health_address
        self._servers = (server,) if probed is None else (server, probed)

    async def start(self) -> None:
        """Start serving: alive, but not ready until ``health.set_ready(True)``."""
        await self.health.set_live()
        await self.health.set_ready(False)
        for server in self._servers:
            await server.start()
        LOG.info("serving", extra={"address": self.address, "health_address": self.health_address})

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Report not ready, let running calls finish for ``grace_seconds``, then cancel them."""
        await self.health.set_ready(False)
        # The probes' port is closed last: the process is alive until its calls are done.
        for server in self._servers:
            await server.stop(grace_seconds if server is self._servers[0] else 0)


def create_server(
    address: str,
    register: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    *,
    metrics: Metrics | None = None,
    tls_dir: str = "",
    tls_peer_name: str = "",
    health_listen: str = "",
) -> RpcServer:
    """A server bound to ``address`` but not started. Needs a running event loop.

    Args:
        address: ``unix:/path`` or ``host:port``.
        register: adds the servicers.
        service_names: full names of the services that ``register`` adds, e.g. ``jackpot.v1.RolloutService``.
        metrics: where calls are counted and timed.
        tls_dir: directory with ``tls.crt``, ``tls.key`` and ``ca.crt``; empty is plaintext.
        tls_peer_name: the name that a client's certificate must carry to call ``service_names``; empty accepts every
            certificate of the authority.
        health_listen: ``host:port`` that answers health checks in plaintext, and nothing else; empty is none.

    Raises:
        ConfigError: an address cannot be bound, or would serve plaintext beyond this machine.
    """
    check_address(address, tls_dir, "JACKPOT_LISTEN")
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics, tls_peer_name)], options=_SERVER_OPTIONS)
    servicer = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    register(server)
    reflected = (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(reflected, server)
    credentials = server_credentials(tls_dir) if tls_dir else None
    bound = _bind(server, address, credentials, "JACKPOT_LISTEN")
    reporter = HealthReporter(servicer, service_names)
    if not health_listen:
        return RpcServer(server, bound, reporter)
    check_address(health_listen, "", "JACKPOT_HEALTH_LISTEN", serving=False)
    probed = grpc.aio.server(options=_SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, probed)
    return RpcServer(server, bound, reporter, probed, _bind(probed, health_listen, None, "JACKPOT_HEALTH_LISTEN"))


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, field: str) -> str:
    """Bind the server; its address with the real port."""
    try:
        if credentials is not None:
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(field, address, f"cannot be bound ({error})", "Use a free address.") from None
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
