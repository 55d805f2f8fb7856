"""Controls λ_distill so that the measured KL(policy ‖ actor) reaches a set point. Beyond the paper, which leaves this
open (§8).

The controller is proportional-integral and works in logarithms, because λ_distill and the KL are positive and act as
factors. λ_distill alone keeps the actor from falling behind, but not from coming closer than necessary: the actor's
PPO loss leads it to the same answers, and an optimizer like AdamW ignores the scale of a loss. The closer the KL is to
the target, the lower the actor's learning rate therefore is, by the *pace*. At the target the actor waits until the
policy has moved. Only the policy's movement raises the KL again, so the pace falls gradually and the actor does not
overshoot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FULL_PACE_FACTOR = 2.0
"""The actor learns at its full rate if the KL is this many times the target or more. Below, the rate is proportional to
the log of KL/target, and at the target it is 0. A narrow band turns a noisy batch into a full step, and the KL then
ends a standard deviation of that noise below the target."""

GREATEST_ERROR = 1.0
"""A KL off by more than a factor e counts as off by e, so that a single outlier batch moves the weight little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlControlSettings:
    """The controller's settings. Gains are changes of log λ_distill per unit of log(KL/target)."""

    target: float  # nats per token, > 0
    initial: float  # λ_distill at the start, within the bounds
    lower: float  # least λ_distill, > 0
    upper: float  # greatest
    proportional: float  # gain on the present error
    integral: float  # gain per update on the accumulated error
    smoothing: float  # weight of the past in the smoothed log KL, in [0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlControlState:
    """The controller's state, kept in checkpoints."""

    integral: float = 0.0  # the integrator's part of log λ_distill
    log_kl: float | None = None  # smoothed; None before the first measurement
    weight: float  # λ_distill in force

    def pace(self, target: float) -> float:
        """The factor of the actor's learning rate, in [0, 1]; 0 up to ``target``, in nats per token."""
        if self.log_kl is None:
            return 1.0
        return max(0.0, min(1.0, (self.log_kl - math.log(target)) / math.log(FULL_PACE_FACTOR)))


def initial_state(settings: KlControlSettings) -> KlControlState:
    """The state before any measurement."""
    return KlControlState(weight=settings.initial)


def update(state: KlControlState, kl: float, settings: KlControlSettings) -> KlControlState:
    """The state after a measurement: more weight if the KL is above its target, less if it is below.

    Anti-windup: while the weight is at a bound, the integrator stops there, so that the weight leaves the bound at the
    first error of the other sign. A KL that is not finite or not positive changes nothing.

    Args:
        state: the previous state.
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
