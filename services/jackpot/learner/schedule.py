"""Learning-rate schedules, as a pure function of the optimizer step."""

from __future__ import annotations

import math

from jackpot.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by in optimizer step ``step`` (0-based) of ``total_steps``.

    The warm-up rises linearly and already moves in step 0; the last step of ``linear`` and ``cosine`` is at
    ``final_fraction``.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    remaining = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / remaining)
    shape = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * shape
