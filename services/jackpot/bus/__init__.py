"""The trajectory bus: Redis Streams with a ledger that adds up."""

from jackpot.bus.bus import TrajectoryBus
from jackpot.bus.ledger import BusDepths, Delivery, GroupState, Ledger, PublishOutcome
from jackpot.bus.readings import BusReadings

__all__ = [
    "BusDepths",
    "BusReadings",
    "Delivery",
    "GroupState",
    "Ledger",
    "PublishOutcome",
    "TrajectoryBus",
]
