"""gRPC channels as every service uses them: keepalive, fast reconnection, status codes as Jackpot's errors."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jackpot.errors import (
    DeadlineError,
    EngineError,
    JackpotError,
    QueueFullError,
    RequestRefusedError,
    WeightMissingError,
)
from jackpot.rpc.address import MESSAGE_OPTIONS, check_address
from jackpot.rpc.interceptor import RETRY_AFTER
from jackpot.rpc.renewing_channel import RenewingChannel
from jackpot.rpc.tls import channel_credentials

Response = TypeVar("Response")

_CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    *MESSAGE_OPTIONS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted replica is found again within seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.lb_policy_name", "round_robin"),  # over all addresses of a headless service's name
)
_POLL_SECONDS = 0.05
_CHECK_TIMEOUT_SECONDS = 2.0

# Channels do not expose their address, which errors must name.
_ADDRESSES: weakref.WeakKeyDictionary[grpc.aio.Channel, str] = weakref.WeakKeyDictionary()


def open_channel(address: str, *, tls_dir: str = "", tls_peer_name: str = "") -> grpc.aio.Channel:
    """A channel to ``unix:/path`` or ``host:port``; connects on the first call. Close it after use.

    Args:
        address: of the server; its name may resolve to several processes.
        tls_dir: directory with ``tls.crt``, ``tls.key`` and ``ca.crt``; empty is plaintext.
        tls_peer_name: the name that the server's certificate must carry, instead of the address's host.

    Raises:
        ConfigError: the address has neither form, or the TLS files cannot be read.
    """
    check_address(address, tls_dir, "address", serving=False)
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
        DeadlineError: it did not in time; names service, address and the last answer.
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
        timeout_seconds: the deadline, which the server receives, too.
        awaited: the call and its server, for errors: ``"Generate on unix:/…"``.

    Raises:
        QueueFullError: try again after its ``retry_after_seconds``.
        DeadlineError: no answer in time.
        WeightMissingError: the server lacks the requested weight version.
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
    if code is grpc.StatusCode.CANCELLED:
        # Not by this side, which would see asyncio's own error.
        message = (
            f"{awaited}: cancelled by the server or on the way ({error.details() or 'no details'}). Send it again."
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        for key, value in error.trailing_metadata() or ():
            if key == RETRY_AFTER:
                return QueueFullError(int(value) / 1000)
        # Without the hint gRPC itself refused a message that is too large, and waiting does not help.
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
