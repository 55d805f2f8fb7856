"""Signs of collapse in the figures of training steps and evaluations. Pure: rows in, alarms out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jackpot.config import AlarmsConfig

EQUAL_REWARDS = "equal_rewards"
ZERO_GRADIENT = "zero_gradient"
KL_TOO_LARGE = "kl_too_large"
ACCURACY_FALLS = "accuracy_falls"
LOW_ACCEPTANCE = "low_acceptance"
NOT_FINITE = "not_finite"
CANARY = "canary"
ALARM_NAMES = (EQUAL_REWARDS, ZERO_GRADIENT, KL_TOO_LARGE, ACCURACY_FALLS, LOW_ACCEPTANCE, NOT_FINITE, CANARY)

_EVALUATIONS_IN_A_ROW = 2
EXACT_CANARY_BOUND = 1e-3
"""Nats between two computations of one model in float32, at most. Rounding makes up to 1e-4 of a log-probability of
−30; other weights differ by more at the first update."""
CANARY_GROWTH = 3.0
"""How far the canary's root mean square may grow where engine and learner compute in different formats."""
_CANARY_BATCHES = 3  # that tell what is usual
_REWARD_MEMORY = 0.9  # weight of the past in the smoothed reward


@dataclass(frozen=True, slots=True)
class Alarm:
    """A sign of collapse."""

    name: str
    step: int
    message: str


class AlarmWatch:
    """Checks steps and evaluations in order. An alarm is raised when it begins, and again only after it has ended.

    Args:
        config: what counts as an alarm.
        exact: whether engine and learner both compute in float32, so that the canary's difference is rounding alone.
    """

    def __init__(self, config: AlarmsConfig, *, exact: bool = True) -> None:
        self._config = config
        self._exact = exact
        self._canary_usual: list[float] = []  # root mean squares of the first batches
        self._active: set[str] = set()
        self._equal_steps = 0
        self._zero_steps = 0
        self._reward: float | None = None  # smoothed
        self._best: tuple[float, float] | None = None  # best accuracy, and the smoothed reward at that time
        self._bad_evaluations = 0

    @property
    def active(self) -> Mapping[str, bool]:
        """Every alarm, and whether it is active."""
        return {name: name in self._active for name in ALARM_NAMES}

    def observe_step(self, row: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin with this row of ``metrics.jsonl``."""
        step = int(row["step"])
        self._equal_steps = self._equal_steps + 1 if row.get("reward/std") == 0 else 0
        self._zero_steps = self._zero_steps + 1 if row.get("policy/grad_norm") == 0 else 0
        reward = row.get("reward/mean", math.nan)
        if math.isfinite(reward):
            past = reward if self._reward is None else self._reward
            self._reward = _REWARD_MEMORY * past + (1 - _REWARD_MEMORY) * reward
        alarms = [
            *self._collapses(step, row, reward),
            *self._mismatches(step, row),
            self._canary(step, row),
        ]
        return [alarm for alarm in alarms if alarm is not None]

    def _collapses(self, step: int, row: Mapping[str, float], reward: float) -> list[Alarm | None]:
        """Signs that the policy learns nothing any more."""
        broken = sorted(name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value))
        return [
            self._turn(
                NOT_FINITE,
                step,
                bool(broken),
                f"not a finite number: {', '.join(broken)}. Lower learner.lr, or compute in float32.",
            ),
            self._turn(
                EQUAL_REWARDS,
                step,
                0 < self._config.equal_rewards_steps <= self._equal_steps,
                f"every reward has been {reward:g} for {self._equal_steps} steps, and the policy learns nothing: the "
                "task is solved, or the policy or the actor has collapsed. Look at the policy accuracy.",
            ),
            self._turn(
                ZERO_GRADIENT,
                step,
                0 < self._config.zero_gradient_steps <= self._zero_steps,
                f"the policy's gradient has been exactly 0 for {self._zero_steps} steps: rewards do not differ within "
                "groups, or no token is accepted. Look at reward/std and the acceptance rate.",
            ),
        ]

    def _mismatches(self, step: int, row: Mapping[str, float]) -> list[Alarm | None]:
        """Signs that actor and policy have drifted too far apart."""
        divergence, bound = row.get("kl/policy_actor", row.get("rollout_corr/k3_kl", 0.0)), self._config.kl_bound
        acceptance = row.get("rollout_corr/obrs_acceptance_rate", 1.0)
        return [
            self._turn(
                KL_TOO_LARGE,
                step,
                bound is not None and divergence > bound,
                f"policy and actor are {divergence:.3g} nats per token apart, more than {bound}: the actor falls "
                "behind. Raise learner.actor_lr or algorithm.distillation.weight.",
            ),
            self._turn(
                LOW_ACCEPTANCE,
                step,
                acceptance < self._config.acceptance_bound,
                f"only {acceptance:.1%} of the actor's tokens are accepted, less than "
                f"{self._config.acceptance_bound:.1%}: almost nothing is left to learn from. Lower obrs_lambda, or "
                "distil more.",
            ),
        ]

    def _canary(self, step: int, row: Mapping[str, float]) -> Alarm | None:
        """Signs that an engine samples with other weights than it says."""
        if "rollout/canary_max_difference" not in row:
            return None  # not the first step of a batch
        greatest, typical = row["rollout/canary_max_difference"], row["rollout/canary_rms_difference"]
        found, bound = greatest, self._config.canary_bound
        if bound is None and self._exact:
            bound = EXACT_CANARY_BOUND
        elif bound is None:
            if len(self._canary_usual) < _CANARY_BATCHES:
                self._canary_usual.append(typical)
            usual = sum(self._canary_usual) / len(self._canary_usual)
            found, bound = typical, max(CANARY_GROWTH * usual, EXACT_CANARY_BOUND)
        return self._turn(
            CANARY,
            step,
            not found <= bound,
            f"sampled tokens are {found:.3g} nats, more than {bound:.3g}, from the version that sampled them (greatest "
            f"difference {greatest:.3g}, root mean square {typical:.3g}): a rollout replica does not hold the weights "
            "that it says, or computes them in another way. Look for refused versions in the replicas' logs, and "
            "restart them.",
        )

    def observe_evaluation(self, step: int, accuracy: float) -> list[Alarm]:
        """The alarms that begin with an evaluation of weight version ``step``."""
        reward = self._reward if self._reward is not None else -math.inf
        if self._best is None or accuracy >= self._best[0]:
            self._best = (accuracy, reward)
        best, reward_then = self._best
        drop = self._config.accuracy_drop
        bad = drop > 0 and best - accuracy > drop and reward > reward_then
        self._bad_evaluations = self._bad_evaluations + 1 if bad else 0
        alarm = self._turn(
            ACCURACY_FALLS,
            step,
            self._bad_evaluations >= _EVALUATIONS_IN_A_ROW,
            f"the policy's accuracy fell from {best:.3f} to {accuracy:.3f} while the actor's reward rose from "
            f"{reward_then:.3f} to {reward:.3f}: the policy learns from text that it would not write. Reject more "
            "(obrs_lambda), distil more, or lower learner.lr.",
        )
        return [] if alarm is None else [alarm]

    def _turn(self, name: str, step: int, on: bool, message: str) -> Alarm | None:
        begins = on and name not in self._active
        (self._active.add if on else self._active.discard)(name)
        return Alarm(name, step, message) if begins else None
