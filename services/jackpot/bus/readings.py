"""Queries of a job's bus that change nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import cast

from jackpot.bus.client import BusClient
from jackpot.bus.ledger import BusDepths, GroupState, Ledger
from jackpot.config import BusConfig
from jackpot.errors import BusError, ConfigError
from jackpot.storage.run_records import TerminalRecord


class BusReadings:
    """The read-only side of one job's bus: all that an observer needs. A process that also takes or publishes groups
    uses :attr:`TrajectoryBus.readings`.

    Queries raise BusError and BusLostError like all methods of the bus.

    Args:
        client: an open client.
        bytes_budget: the job's ``bus.max_bytes``.
    """

    def __init__(self, client: BusClient, bytes_budget: int) -> None:
        self._client = client
        self._bytes_budget = bytes_budget

    @classmethod
    async def connect(cls, url: str, job_id: str, settings: BusConfig) -> BusReadings:
        """Connect to a bus that another process has opened. Creates nothing.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.
            job_id: the job.
            settings: the job's ``bus`` section.

        Raises:
            BusError: the server does not answer, or no process has opened the job's bus yet.
            ConfigError: the server is too old, or evicts keys when it is full.
        """
        client = BusClient(url, job_id)
        try:
            await client.check_server()
            await client.join()
        except (BusError, ConfigError):
            await client.close()
            raise
        return cls(client, settings.max_bytes)

    async def close(self) -> None:
        """Close the connections that :meth:`connect` opened."""
        await self._client.close()

    async def dispatched(self) -> dict[str, GroupState]:
        """All groups that have not ended, with their states."""
        (states,) = await self._client.read(("HGETALL", self._client.keys.open))
        return cast("dict[str, GroupState]", states)

    async def ledger(self) -> Ledger:
        """The counters, all from the same moment."""
        keys = self._client.keys
        counters, still_open = await self._client.read(("HGETALL", keys.counters), ("HLEN", keys.open))
        counts = {name: int(value) for name, value in counters.items()}
        dropped = {name.removeprefix("dropped:"): n for name, n in counts.items() if name.startswith("dropped:")}
        return Ledger(counts.get("dispatched", 0), counts.get("trained", 0), dropped, still_open)

    async def terminal_states(self, group_ids: Sequence[str]) -> dict[str, str]:
        """``trained`` or ``dropped:<reason>`` for each of these groups that has ended."""
        if not group_ids:
            return {}
        (states,) = await self._client.read(("HMGET", self._client.keys.terminal, *group_ids))
        return {group_id: state for group_id, state in zip(group_ids, states, strict=True) if state}

    async def read_terminal(self, after: str, count: int) -> list[tuple[str, TerminalRecord]]:
        """Terminal states in the order in which they were recorded, with their positions.

        Args:
            after: the position of the last record known; empty for the start.
            count: the most records to return.
        """
        start = f"({after}" if after else "-"
        (rows,) = await self._client.read(("XRANGE", self._client.keys.ledger, start, "+", "COUNT", count))
        return [(position, _record(fields)) for position, fields in rows]

    async def depths(self) -> BusDepths:
        """What the bus holds now."""
        keys = self._client.keys
        rollouts, with_scorers, scored, with_learner, used = await self._client.read(
            ("XLEN", keys.rollouts),
            ("XPENDING", keys.rollouts, "scorers"),
            ("XLEN", keys.scored),
            ("XPENDING", keys.scored, "learner"),
            ("HGET", keys.counters, "bytes"),
        )
        return BusDepths(
            rollouts_waiting=rollouts - with_scorers["pending"],
            rollouts_pending=with_scorers["pending"],
            scored_waiting=scored - with_learner["pending"],
            scored_pending=with_learner["pending"],
            bytes_used=int(used or 0),
            bytes_budget=self._bytes_budget,
        )

    async def oldest_seconds(self) -> dict[str, float]:
        """How long the oldest group of each stream has been there, by this machine's clock; 0 for an empty stream."""
        keys = self._client.keys
        streams = {"rollouts": keys.rollouts, "scored": keys.scored}
        firsts = await self._client.read(*(("XRANGE", key, "-", "+", "COUNT", 1) for key in streams.values()))
        now = time.time()
        # An entry's id begins with the server's clock in milliseconds.
        ages = (max(0.0, now - int(rows[0][0].partition("-")[0]) / 1000) if rows else 0.0 for rows in firsts)
        return dict(zip(streams, ages, strict=True))

    async def server_memory(self) -> tuple[int, int] | None:
        """Bytes that the server uses and may use; None where its access list forbids the query."""
        return await self._client.server_memory()

    async def get_value(self, name: str) -> str | None:
        """A value that ``set_value`` stored."""
        (value,) = await self._client.read(("HGET", self._client.keys.values, name))
        return cast("str | None", value)


def _record(fields: Mapping[str, str]) -> TerminalRecord:
    return TerminalRecord(
        group_id=fields["group"],
        state="trained" if fields["state"] == "trained" else "dropped",
        reason=fields["reason"],
        step=int(fields["step"]),
        detail=fields["detail"],
    )
