"""The connection to the bus's server: keys, scripts, and Redis errors translated into bus errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff

from jackpot.bus.coalesce import Coalescer
from jackpot.errors import BusError, BusLostError, ConfigError

SOCKET_TIMEOUT_SECONDS = 10.0
CONNECT_TIMEOUT_SECONDS = 5.0
CALL_TIMEOUT_SECONDS = 30.0  # one call with all its retries; a restarting server is back well before
MIN_VERSION = 7  # of Redis; every Valkey implements at least 7.2
RETRIES = 10  # about six seconds with the back-off below, if the server refuses connections immediately
BACKOFF_SECONDS = (0.05, 1.0)  # first, maximum
MAX_BLOCK_SECONDS = 2.0  # well below the socket timeout, else a blocked read would look like a dead server

# Scripts that free memory run even when the server has none left.
_ALLOWED_WITHOUT_MEMORY = ("finish", "release", "hold")
_SCRIPTS = ("open", "reserve", "publish", "scored", "acquire", "hold", "release", "finish", "set_value")

_ScriptCall = tuple[str, Sequence[str], Sequence[Any]]  # name, keys and arguments


class JobKeys:
    """The keys of one job. The hash tag keeps them on one node of a cluster, as the scripts require."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self._prefix = f"jackpot:{{{job_id}}}:"
        self.incarnation = self._prefix + "incarnation"
        self.open = self._prefix + "open"
        self.terminal = self._prefix + "terminal"
        self.counters = self._prefix + "counters"
        self.values = self._prefix + "values"
        self.rollouts = self._prefix + "rollouts"
        self.scored = self._prefix + "scored"
        self.ledger = self._prefix + "ledger"
        self.payloads = self._prefix + "payloads"
        # In the order of scripts/keys.lua.
        self.for_scripts = (
            self.incarnation,
            self.open,
            self.terminal,
            self.counters,
            self._prefix + "bytes",
            self._prefix + "attempts",
            self._prefix + "entries",
            self.payloads,
            self.rollouts,
            self.scored,
            self.ledger,
            self.values,
        )

    def payload(self, group_id: str) -> str:
        """The hash that holds a group's payloads, by payload name."""
        return f"{self._prefix}payload:{group_id}"


class BusClient:
    """One job's keys on one server.

    A command is sent again when its reply is lost, so it may reach the server twice. Every command sent from here is
    therefore safe to repeat.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        job_id: the job whose keys these are.
    """

    def __init__(self, url: str, job_id: str) -> None:
        parts = urlsplit(url)
        self.address = f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
        self.keys = JobKeys(job_id)
        self.incarnation = ""  # identifies the job's state; empty until the bus is open
        first, greatest = BACKOFF_SECONDS
        self._redis: Any = Redis.from_url(  # its commands are typed as both sync and async
            url,
            socket_timeout=SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            retry=Retry(EqualJitterBackoff(cap=greatest, base=first), RETRIES),
        )
        self._scripts = {name: self._redis.register_script(_source(name)) for name in _SCRIPTS}
        self._run_together = Coalescer(self._run_all)

    async def check_server(self) -> None:
        """Check that the server answers and is suitable.

        Raises:
            BusError: it does not answer.
            ConfigError: it is too old, or evicts keys when it is full.
        """
        async with self._translated():
            try:
                info = await self._redis.info()
            except exceptions.NoPermissionError:
                return  # the access list forbids INFO: its author is responsible for the server's configuration
        version, policy = str(info["redis_version"]), str(info.get("maxmemory_policy", "noeviction"))
        if int(version.partition(".")[0]) < MIN_VERSION:
            raise ConfigError("bus.url", self.address, f"its server speaks Redis {version}", "Use Redis 7.0 or Valkey.")
        if policy.startswith("allkeys-"):
            raise ConfigError(
                "bus.url",
                self.address,
                f"its server deletes keys when it is full (maxmemory-policy {policy})",
                "Set maxmemory-policy to noeviction.",
            )

    async def server_memory(self) -> tuple[int, int] | None:
        """Bytes that the server uses, and its maxmemory, or its machine's memory where none is set.

        Returns:
            None where the server's access list forbids INFO.

        Raises:
            BusError: the server does not answer.
        """
        async with self._translated():
            try:
                info = await self._redis.info("memory")
            except exceptions.NoPermissionError:
                return None
        return int(info["used_memory"]), int(info.get("maxmemory") or info.get("total_system_memory") or 0)

    async def join(self) -> None:
        """Adopt the incarnation that another process has opened.

        Raises:
            BusError: no process has opened one, or the server does not answer.
        """
        incarnation = await self.call("GET", self.keys.incarnation)
        if incarnation is None:
            raise BusError(f"the bus of job {self.keys.job_id} holds no state")
        self.incarnation = incarnation.decode()

    async def close(self) -> None:
        """Close all connections. Running scripts are abandoned: a retry would open another connection."""
        await self._run_together.close()
        await self._redis.aclose()

    async def run(self, script: str, args: Sequence[Any], extra_keys: Sequence[str] = ()) -> Any:
        """Run a script from ``scripts/``; ``args`` follow the incarnation.

        Raises:
            BusLostError: the server no longer holds the state that this client opened.
            BusError: the server cannot be reached, or refuses.
        """
        self._require_open()
        return await self.run_unfenced(script, [self.incarnation, *args], extra_keys)

    async def run_unfenced(self, script: str, args: Sequence[Any], extra_keys: Sequence[str] = ()) -> Any:
        """Run a script without an incarnation (only ``open``). Errors as in :meth:`run`."""
        async with self._translated():
            return _text(await self._run_together((script, [*self.keys.for_scripts, *extra_keys], args)))

    async def read(self, *commands: tuple[Any, ...]) -> Sequence[Any]:
        """The replies to several reads, all from the same moment. Errors as in :meth:`run`."""
        self._require_open()
        async with self._translated():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.get(self.keys.incarnation)
            for command in commands:
                pipeline.execute_command(*command)
            incarnation, *replies = _text(await pipeline.execute())
        if incarnation != self.incarnation:
            raise BusLostError(_LOST)
        return tuple(replies)

    async def call(self, *command: Any) -> Any:
        """The raw reply to one command that is safe to send twice. Errors as in :meth:`run`."""
        async with self._translated():
            return await self._redis.execute_command(*command)

    async def _run_all(self, calls: Sequence[_ScriptCall]) -> list[Any]:
        """Run scripts that were called at the same time in one exchange with the server; their replies or errors."""
        if len(calls) == 1:
            script, keys, args = calls[0]
            return [await self._scripts[script](keys, args)]
        pipeline = self._redis.pipeline(transaction=False)
        for script, keys, args in calls:
            pipeline.evalsha(self._scripts[script].sha, len(keys), *keys, *args)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        # The server does not know the script yet: send its source.
        for place, (script, keys, args) in enumerate(calls):
            if isinstance(replies[place], exceptions.NoScriptError):
                try:
                    replies[place] = await self._scripts[script](keys, args)
                except exceptions.ResponseError as error:
                    replies[place] = error
        return replies

    def _require_open(self) -> None:
        if not self.incarnation:
            raise BusError("the bus has not been opened; call open() first")

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                yield
        except exceptions.ResponseError as error:
            if any(mark in str(error) for mark in ("BUSLOST", "NOGROUP")):
                raise BusLostError(_LOST) from None
            raise BusError(f"the bus at {self.address} refused a command: {error}") from error
        except (exceptions.RedisError, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise BusError(f"the bus at {self.address} does not answer ({reason}). Is its server running?") from error
        finally:
            # redis-py sends each command under asyncio.wait_for, which may swallow a cancellation before Python 3.12. A
            # service that was asked to stop would then continue. Ending the call here is safe: it may be repeated.
            if task and task.cancelling() > cancellations:
                raise asyncio.CancelledError


_LOST = (
    "the bus's server lost the state of this job (FLUSHALL, an empty replica or a new data directory). "
    "Open the bus again; groups that were on it must be dispatched again"
)


def _source(name: str) -> str:
    folder = resources.files("jackpot.bus") / "scripts"
    parts = ("keys", name) if name == "open" else ("keys", "fence", name)
    flags = " flags=allow-oom" if name in _ALLOWED_WITHOUT_MEMORY else ""
    return f"#!lua{flags}\n" + "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in parts)


def _text(reply: Any) -> Any:
    """A reply with its byte strings decoded. Payloads never pass through here."""
    if isinstance(reply, bytes):
        return reply.decode()
    if isinstance(reply, list | tuple):
        return [_text(item) for item in reply]
    if isinstance(reply, dict):
        return {_text(key): _text(value) for key, value in reply.items()}
    return reply
