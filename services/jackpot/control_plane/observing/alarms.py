"""Signs that a training run goes wrong, seen in its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLAT_STEPS = 10  # steps without any difference between rewards, before it is said
MAX_KL_NATS = 5.0
MIN_ACCEPTANCE = 0.05


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that wants looking at."""

    name: str
    step: int
    message: str


class AlarmWatch:
    """Looks at one row of ``metrics.jsonl`` after the other; tells each kind of trouble when it begins."""

    def __init__(self) -> None:
        self._flat = 0
        self._on: set[str] = set()

    def look(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that begin with this row."""
        step = int(row.get("step", 0))
        flat = row.get("reward/std") == 0
        self._flat = self._flat + 1 if flat else 0
        found: dict[str, str] = {}
        broken = sorted(name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value))
        if broken:
            found["not_finite"] = f"not a finite number: {', '.join(broken)}. Lower the learning rate."
        if row.get("rollout_corr/nonfinite"):
            found["nonfinite_tokens"] = "tokens without finite scores. Compare the engines' number formats."
        if self._flat >= FLAT_STEPS:
            found["no_reward_variance"] = (
                f"rewards have not differed for {self._flat} steps: nothing to learn from. "
                "The task is too easy or too hard, or the policy has collapsed."
            )
        divergence = row.get("kl/policy_actor")
        if isinstance(divergence, float) and divergence > MAX_KL_NATS:
            found["kl_too_large"] = (
                f"KL(policy‖actor) is {divergence:.2f} nats per token: the actor has been left behind. "
                "Raise learner.actor_lr or algorithm.distillation.weight."
            )
        acceptance = row.get("rollout_corr/obrs_acceptance_rate")
        if isinstance(acceptance, float) and acceptance < MIN_ACCEPTANCE:
            found["acceptance_too_low"] = (
                f"only {acceptance:.1%} of the actor's tokens are accepted. Lower obrs_lambda or distil more."
            )
        begun = [Alarm(name, step, message) for name, message in found.items() if name not in self._on]
        self._on = set(found)
        return begun
