"""λ_distill that follows the measured KL(policy ‖ actor) to a set point. Beyond the paper, which leaves it open (§8).

A proportional-integral controller in logarithms, since both λ_distill and the KL are positive and work by factors.
λ_distill alone keeps the actor from falling behind, but not from coming nearer than it need: its own loss leads it to
the same answers, and an optimizer like AdamW is indifferent to the scale of a loss. So the nearer the KL is to the
target, the lower the actor's learning rate, too, by the *pace*; at the target the actor waits until the policy has
moved on. Nothing but that brings the KL up again: the pace falls gradually, so that the actor does not run past.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FULL_PACE_FACTOR = 2.0
"""The actor learns at its full rate where the KL is this many times the target, more slowly in proportion to the log of
the factor below, and not at all at the target. A narrow band turns a noisy batch into a full step, and the KL ends a
standard deviation of that noise below the target."""

GREATEST_ERROR = 1.0
"""A KL off by more than a factor e counts as one by e, so that a single wild batch moves the weight little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlControlSettings:
    """What the controller is told. Gains are changes of log λ_distill per unit of log(KL/target)."""

    target: float  # nats per token, > 0
    initial: float  # λ_distill at the start, within the bounds
    lower: float  # least λ_distill, > 0
    upper: float  # greatest
    proportional: float  # gain on the error as it is
    integral: float  # gain per update on the error summed up
    smoothing: float  # weight of the past in the smoothed log KL, in [0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlControlState:
    """What the controller remembers; to be checkpointed."""

    integral: float = 0.0  # part of log λ_distill that the integrator holds
    log_kl: float | None = None  # smoothed; None before the first measurement
    weight: float  # λ_distill in force

    def pace(self, target: float) -> float:
        """What the actor's learning rate is multiplied by, in [0, 1]: 0 up to ``target``, in nats per token."""
        if self.log_kl is None:
            return 1.0
        return max(0.0, min(1.0, (self.log_kl - math.log(target)) / math.log(FULL_PACE_FACTOR)))


def initial_state(settings: KlControlSettings) -> KlControlState:
    """The state before any measurement."""
    return KlControlState(weight=settings.initial)


def update(state: KlControlState, kl: float, settings: KlControlSettings) -> KlControlState:
    """The state after a measurement: more weight where the KL is above its target, less where it is below.

    Anti-windup: while the weight is at a bound, the integrator does not run further beyond it, so that it leaves the
    bound with the first error of the other sign. A KL that is not finite or not positive changes nothing.

    Args:
        state: the state before.
        kl: mean KL(policy ‖ actor) of the latest optimizer step, in nats per token.
        settings: target, bounds and gains.
    """
    if not math.isfinite(kl) or kl <= 0:
        return state
    past = math.log(kl) if state.log_kl is None else state.log_kl
    log_kl = settings.smoothing * past + (1.0 - settings.smoothing) * math.log(kl)
    error = max(-GREATEST_ERROR, min(GREATEST_ERROR, log_kl - math.log(settings.target)))
    integral = state.integral + settings.integral * error
    wanted = math.log(settings.initial) + integral + settings.proportional * error
    weight = max(settings.lower, min(settings.upper, math.exp(wanted)))
    if (weight == settings.upper and error > 0) or (weight == settings.lower and error < 0):
        integral = state.integral
    return KlControlState(integral=integral, log_kl=log_kl, weight=weight)
