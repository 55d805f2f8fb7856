"""gRPC servers and channels as every service uses them.

Servers: health under ``liveness``, ``readiness`` and each service's name, reflection, a deadline required on every
call, Jackpot's errors as status codes, counted and timed. Channels: keepalive, fast reconnection, status codes as
Jackpot's errors. Messages up to 256 MiB. Plaintext only on unix sockets and loopback; elsewhere mutual TLS, with health
alone on a plaintext port of its own for probes that speak no TLS.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from jackpot.errors import (
    ConfigError,
    DeadlineError,
    EngineError,
    JackpotError,
    QueueFullError,
    RequestRefusedError,
    WeightMissingError,
)
from jackpot.rpc.interceptor import RETRY_AFTER, CallInterceptor
from jackpot.rpc.renewing_channel import RenewingChannel
from jackpot.rpc.tls import channel_credentials, server_credentials
from jackpot.telemetry import Metrics

LOG = logging.getLogger(__name__)
Request = TypeVar("Request")
Response = TypeVar("Response")

LIVENESS = "liveness"
READINESS = "readiness"
MAX_MESSAGE_BYTES = 256 << 20

_MESSAGES: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
_SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *_MESSAGES,
    ("grpc.so_reuseport", 0),  # two servers on one port are a mistake, not load balancing
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    *_MESSAGES,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A replica that was restarted is found again within seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.lb_policy_name", "round_robin"),  # over all addresses of a headless service's name
)
_MAX_UNIX_PATH_BYTES = 107
_POLL_SECONDS = 0.05
_CHECK_TIMEOUT_SECONDS = 2.0


class HealthReporter:
    """What health checks are told. ``liveness`` holds from the start, ``readiness`` once :meth:`set_ready` says so."""

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
        address: where clients find it, with the real port if port 0 was asked for.
        health: what its health checks are told.
        health_address: where health alone is answered in plaintext, with the real port; empty if nowhere.
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
        """Serve: alive, but not ready until ``health.set_ready(True)``."""
        await self.health.set_live()
        await self.health.set_ready(False)
        for server in self._servers:
            await server.start()
        LOG.info("serving", extra={"address": self.address, "health_address": self.health_address})

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Report not ready, let calls under way finish for ``grace_seconds``, then cancel them."""
        await self.health.set_ready(False)
        # The probes' port last: until the calls under way are done, the process is alive.
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
        tls_peer_name: the name that a client's certificate must carry to call ``service_names``; empty takes every
            certificate of the authority.
        health_listen: ``host:port`` that answers health checks in plaintext, and nothing else; empty is none.

    Raises:
        ConfigError: an address cannot be bound, or would serve plaintext beyond this machine.
    """
    _check_address(address, tls_dir, "JACKPOT_LISTEN")
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
    _check_address(health_listen, "", "JACKPOT_HEALTH_LISTEN", serving=False)
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


# Channels do not tell where they lead; errors have to.
_ADDRESSES: weakref.WeakKeyDictionary[grpc.aio.Channel, str] = weakref.WeakKeyDictionary()


def open_channel(address: str, *, tls_dir: str = "", tls_peer_name: str = "") -> grpc.aio.Channel:
    """A channel to ``unix:/path`` or ``host:port``; connects on the first call. To be closed.

    Args:
        address: of the server; several processes may answer to its name.
        tls_dir: directory with ``tls.crt``, ``tls.key`` and ``ca.crt``; empty is plaintext.
        tls_peer_name: the name that the server's certificate must carry, in place of the address's host.

    Raises:
        ConfigError: the address has neither form, or the TLS files cannot be read.
    """
    _check_address(address, tls_dir, "address", serving=False)
    if tls_dir:
        options = list(_CHANNEL_OPTIONS)
        if tls_peer_name:
            options.append(("grpc.ssl_target_name_override", tls_peer_name))

        def connect() -> grpc.aio.Channel:
            return grpc.aio.secure_channel(address, channel_credentials(tls_dir), options=options)

        channel: grpc.aio.Channel = RenewingChannel(tls_dir, connect)
    else:
        channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    _ADDRESSES[channel] = address
    return channel


async def wait_ready(channel: grpc.aio.Channel, service: str, timeout_seconds: float) -> None:
    """Return once the server behind ``channel`` reports ``service`` as serving.

    Args:
        channel: from :func:`open_channel`.
        service: ``readiness``, ``liveness`` or a service's full name.
        timeout_seconds: how long to wait.

    Raises:
        DeadlineError: it did not; names service, address and the last answer.
    """
    stub = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + timeout_seconds
    answer = "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            response = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=min(remaining, _CHECK_TIMEOUT_SECONDS)
            )
        except grpc.aio.AioRpcError as error:
            answer = f"{error.code().name}: {error.details()}"
        else:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return
            answer = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        await asyncio.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    address = _ADDRESSES.get(channel, "the server")
    raise DeadlineError(f"{service} of {address} (last: {answer})", timeout_seconds, "Look at that server's log.")


async def call(
    method: Callable[..., Awaitable[Response]], request: Any, timeout_seconds: float, *, awaited: str
) -> Response:
    """Make a unary call with a deadline; a failure is one of Jackpot's errors.

    Args:
        method: a stub's method, e.g. ``stub.Generate``.
        request: its request message.
        timeout_seconds: the deadline that the server sees, too.
        awaited: what is asked of whom, for errors: ``"Generate on unix:/…"``.

    Raises:
        QueueFullError: try again after its ``retry_after_seconds``.
        DeadlineError: no answer in time.
        WeightMissingError: the server lacks the weight version that was asked for.
        RequestRefusedError: the request can never work.
        EngineError: anything else; the request may be retried elsewhere.
    """
    try:
        return await method(request, timeout=timeout_seconds)
    except grpc.aio.AioRpcError as error:
        raise _from_status(error, timeout_seconds, awaited) from None


def _from_status(error: grpc.aio.AioRpcError, timeout_seconds: float, awaited: str) -> JackpotError:
    code = error.code()
    message = f"{awaited}: {error.details() or code.name}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        for key, value in error.trailing_metadata() or ():
            if key == RETRY_AFTER:
                return QueueFullError(int(value) / 1000)
        # Without the hint it is gRPC's own refusal of a message that is too large, which waiting does not cure.
        return RequestRefusedError(message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(awaited, timeout_seconds)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return WeightMissingError(message)
    if code in _REFUSALS:
        return RequestRefusedError(message)
    return EngineError(message)


_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)


def _check_address(address: str, tls_dir: str, field: str, *, serving: bool = True) -> None:
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
