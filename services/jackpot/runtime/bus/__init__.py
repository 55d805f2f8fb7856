"""The trajectory bus: Redis Streams with a ledger that adds up."""

from jackpot.runtime.bus.bus import TrajectoryBus
from jackpot.runtime.bus.ledger import BusDepths, Delivery, GroupState, Ledger, PublishOutcome, TerminalRecord

__all__ = [
    "BusDepths",
    "Delivery",
    "GroupState",
    "Ledger",
    "PublishOutcome",
    "TerminalRecord",
    "TrajectoryBus",
]
