"""A gRPC channel whose certificate may be renewed while in use; gRPC itself reads a client's files only once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from jackpot.errors import ConfigError
from jackpot.rpc.tls import stamp

LOG = logging.getLogger(__name__)

CLOSE_GRACE_SECONDS = 3600.0
"""Time for running calls to finish on the old connection; their own deadlines are shorter."""


class RenewingChannel(grpc.aio.Channel):
    """Checks the files of ``tls_dir`` before each unary call, and opens a new channel when they were replaced.

    Running calls finish on the old channel. Streaming calls stay on the channel that was open when they were created.

    Args:
        tls_dir: see :mod:`jackpot.rpc.tls`.
        connect: opens a channel with the current files.

    Raises:
        ConfigError: the files cannot be used.
    """

    def __init__(self, tls_dir: str, connect: Callable[[], grpc.aio.Channel]) -> None:
        self._tls_dir = tls_dir
        self._connect = connect
        self._seen = stamp(tls_dir)
        self._channel = connect()
        self._closing: set[asyncio.Task[None]] = set()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Part of gRPC's interface."""
        prepared: list[tuple[grpc.aio.Channel, Any]] = []

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            channel = self._current()
            if not prepared or prepared[0][0] is not channel:
                prepared[:] = [(channel, channel.unary_unary(method, *args, **kwargs))]
            return prepared[0][1](*call_args, **call_kwargs)

        return call

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """Part of gRPC's interface."""
        return self._current().unary_stream(*args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """Part of gRPC's interface."""
        return self._current().stream_unary(*args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """Part of gRPC's interface."""
        return self._current().stream_stream(*args, **kwargs)

    async def close(self, grace: float | None = None) -> None:
        """Close this channel, and those that it has replaced."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Part of gRPC's interface."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Part of gRPC's interface."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Part of gRPC's interface."""
        await self._current().channel_ready()

    async def __aenter__(self) -> RenewingChannel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _current(self) -> grpc.aio.Channel:
        current = stamp(self._tls_dir)
        if current in ((), self._seen):
            return self._channel
        try:
            renewed = self._connect()
        except ConfigError as error:
            # Half replaced: the next call checks again.
            LOG.warning("the old certificate stays in use: %s", error)
            return self._channel
        self._seen, old, self._channel = current, self._channel, renewed
        LOG.info("calling with a new certificate", extra={"tls_dir": self._tls_dir})
        task = asyncio.get_running_loop().create_task(old.close(CLOSE_GRACE_SECONDS))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return self._channel
