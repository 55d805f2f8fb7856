"""What the bus reports about a job's groups: deliveries, terminal states, counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from jackpot.trajectory import Group, ScoredGroup

Value = TypeVar("Value", Group, ScoredGroup)
GroupState = Literal["dispatched", "published", "scored"]  # of a group that has not ended
PublishOutcome = Literal["published", "duplicate", "terminal"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delivery(Generic[Value]):
    """A group held by a consumer, leased until it is published, failed, dropped or committed."""

    group_id: str
    value: Value
    attempt: int  # from 1: how often the group has been taken, including this time
    entry_id: str
    payload: str = ""  # the payload's name in its store


@dataclass(frozen=True, slots=True)
class Ledger:
    """The job's counters. They add up: dispatched = trained + dropped (all reasons) + open."""

    dispatched: int
    trained: int
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason
    open: int = 0


@dataclass(frozen=True, slots=True)
class BusDepths:
    """What the bus holds now."""

    rollouts_waiting: int  # groups that no scorer has taken yet
    rollouts_pending: int  # groups held by scorers
    scored_waiting: int
    scored_pending: int
    bytes_used: int  # reserved or stored
    bytes_budget: int
