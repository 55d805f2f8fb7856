"""The trajectory bus: Redis Streams with a ledger that adds up."""

from jackpot.bus.bus import TrajectoryBus
from jackpot.bus.ledger import BusDepths, Delivery, GroupState, Ledger, PublishOutcome

__all__ = [
    "BusDepths",
    "Delivery",
    "GroupState",
    "Ledger",
    "PublishOutcome",
    "TrajectoryBus",
]
