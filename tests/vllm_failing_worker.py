"""A worker extension that fails in the middle of an update when told to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from jackpot.rollout.vllm.worker import WeightReading


class FailingWeightReading(WeightReading):
    """Ours, with faults to inject."""

    def fail_next_update(self) -> None:
        """Have the next update break off after three tensors."""
        model: Any = self.weight_transfer_engine.model
        original = model.load_weights

        def load_weights(tensors: Iterator[tuple[str, Tensor]]) -> Any:
            model.load_weights = original

            def cut() -> Iterator[tuple[str, Tensor]]:
                for number, pair in enumerate(tensors):
                    if number == 3:
                        raise RuntimeError("out of luck")
                    yield pair

            return original(cut())

        model.load_weights = load_weights

    def spoil_next_roll_back(self) -> None:
        """Have the next rollback leave one tensor wrong, without an error."""
        engine: Any = self.weight_transfer_engine
        original = engine.roll_back

        def roll_back() -> None:
            engine.roll_back = original
            original()
            with torch.no_grad():
                next(iter(engine.model.parameters())).mul_(-1)

        engine.roll_back = roll_back
