"""The interceptor of every unary call on a server: checks the caller's name, requires a deadline, turns errors into
status codes, counts and times."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from jackpot.errors import (
    BusError,
    ConfigError,
    DeadlineError,
    EngineError,
    JackpotError,
    PayloadError,
    QueueFullError,
    RequestRefusedError,
    UnsupportedSamplingError,
    WeightError,
)
from jackpot.rpc.tls import peer_names
from jackpot.telemetry import Metrics

LOG = logging.getLogger(__name__)

RETRY_AFTER = "retry-after-ms"

# The first match wins, so that subclasses precede their bases.
_STATUS: tuple[tuple[type[JackpotError], grpc.StatusCode], ...] = (
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnsupportedSamplingError, grpc.StatusCode.INVALID_ARGUMENT),
    (PayloadError, grpc.StatusCode.INVALID_ARGUMENT),
    (RequestRefusedError, grpc.StatusCode.INVALID_ARGUMENT),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (WeightError, grpc.StatusCode.FAILED_PRECONDITION),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (EngineError, grpc.StatusCode.UNAVAILABLE),
    (BusError, grpc.StatusCode.UNAVAILABLE),
)
_NO_DEADLINE_SECONDS = 10 * 365 * 24 * 3600.0

Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]


def status_of(error: JackpotError) -> grpc.StatusCode:
    """The status code of an error."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the unary calls of Jackpot's own services; health and reflection pass untouched.

    Args:
        metrics: where calls are counted and timed.
        peer_name: the name that a caller's certificate must carry; empty requires none.
    """

    def __init__(self, metrics: Metrics | None, peer_name: str = "") -> None:
        self._metrics = metrics
        self._peer_name = peer_name

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Part of gRPC's interceptor interface."""
        handler = await continuation(handler_call_details)
        full_method = handler_call_details.method
        if handler is None or handler.unary_unary is None or full_method.startswith("/grpc."):
            return handler
        _, service, method = full_method.split("/", 2)
        return grpc.unary_unary_rpc_method_handler(
            self._around(handler.unary_unary, service, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _around(self, inner: Any, service: str, method: str) -> Any:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.monotonic()
            code = grpc.StatusCode.CANCELLED  # unless set below
            if self._metrics:
                self._metrics.rpc_started(service, method)
            try:
                await self._require_peer(context, method)
                await _require_deadline(context, method)
                response = await inner(request, context)
                code = grpc.StatusCode.OK
                return response
            except grpc.aio.AbortError:
                code = _code_of(context)
                raise
            except JackpotError as error:
                code = status_of(error)
                await _abort(context, code, error)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                code = grpc.StatusCode.UNAVAILABLE
                LOG.warning("%s/%s was cancelled from inside", service, method)
                await context.abort(code, f"{method} was cancelled inside the server. Send the request again.")
            except Exception as error:
                code = grpc.StatusCode.INTERNAL
                LOG.exception("%s/%s failed", service, method)
                await context.abort(code, f"{type(error).__name__} in {method}; the traceback is in the server's log")
            finally:
                if self._metrics:
                    self._metrics.rpc_finished(service, method, code.name, time.monotonic() - started)

        return answer

    async def _require_peer(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        if self._peer_name and self._peer_name not in (names := peer_names(context.auth_context())):
            shown = ", ".join(sorted(names)) or "no name"
            LOG.warning("refused %s to a client whose certificate carries %s", method, shown)
            problem = f"only certificates that carry {self._peer_name} may call; yours carries {shown}"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)


def _is_cancelled() -> bool:
    """Whether gRPC cancels this call: its caller is gone, or the server stops. Otherwise something that the handler
    awaits was cancelled, and gRPC would let the caller wait until its deadline."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _require_deadline(context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
    remaining = context.time_remaining()
    if remaining is None or remaining > _NO_DEADLINE_SECONDS:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"{method} was called without a deadline. Pass timeout=<seconds>."
        )


async def _abort(context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, error: JackpotError) -> None:
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, QueueFullError):
        metadata = ((RETRY_AFTER, str(round(error.retry_after_seconds * 1000))),)
    if code is grpc.StatusCode.INTERNAL:
        LOG.error("%s", error, exc_info=True)
    await context.abort(code, str(error), metadata)


def _code_of(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    code = context.code()
    return next((status for status in grpc.StatusCode if code in (status, status.value[0])), grpc.StatusCode.UNKNOWN)
