"""The controller of λ_distill against simple models of an actor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from jackpot.algorithm.kl_control import KlControlSettings, KlControlState, initial_state, update

SETTINGS = KlControlSettings(
    target=0.2, initial=1.0, lower=0.01, upper=100.0, proportional=0.5, integral=0.1, smoothing=0.5
)


def test_by_hand() -> None:
    settings = replace(SETTINGS, smoothing=0.0)
    state = update(initial_state(settings), 0.2 * math.exp(0.4), settings)
    assert state.integral == pytest.approx(0.04)
    assert state.weight == pytest.approx(math.exp(0.04 + 0.2))
    later = update(state, 0.2, settings)
    assert later.integral == pytest.approx(0.04)
    assert later.weight == pytest.approx(math.exp(0.04))


def test_a_wild_batch_counts_no_more_than_a_factor_e() -> None:
    settings = replace(SETTINGS, smoothing=0.0)
    assert update(initial_state(settings), 1e6, settings).weight == pytest.approx(math.exp(0.6))


@pytest.mark.parametrize("kl", [math.nan, math.inf, 0.0, -1.0])
def test_what_is_no_divergence_changes_nothing(kl: float) -> None:
    state = KlControlState(integral=0.3, log_kl=-1.0, weight=2.0)
    assert update(state, kl, SETTINGS) == state


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_the_kl_of_a_slow_actor_ends_at_the_target(target: float) -> None:
    """An actor whose KL goes to 0.3/weight^0.5, a fifth of the way each step."""
    settings = replace(SETTINGS, target=target)
    state, log_kl = initial_state(settings), math.log(0.6)
    for _ in range(300):
        log_kl += 0.2 * (math.log(0.3) - 0.5 * math.log(state.weight) - log_kl)
        state = update(state, math.exp(log_kl), settings)
    assert math.exp(log_kl) == pytest.approx(target, rel=0.02)


def test_at_a_bound_the_integrator_waits() -> None:
    state = initial_state(SETTINGS)
    for _ in range(1000):
        state = update(state, 5.0, SETTINGS)
    assert state.weight == SETTINGS.upper
    assert state.integral <= math.log(SETTINGS.upper)
    for _ in range(10):
        state = update(state, 0.05, SETTINGS)
    assert state.weight < 0.5 * SETTINGS.upper, "it left the bound at once, with nothing to unwind"


def test_near_the_target_the_actor_slows_down_and_below_it_waits() -> None:
    paces = {
        kl: KlControlState(log_kl=math.log(kl), weight=1.0).pace(0.2) for kl in (0.8, 0.4, 0.2 * 2**0.5, 0.2, 0.01)
    }
    assert paces == pytest.approx({0.8: 1.0, 0.4: 1.0, 0.2 * 2**0.5: 0.5, 0.2: 0.0, 0.01: 0.0}, abs=1e-9)
    assert initial_state(SETTINGS).pace(0.2) == 1.0


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_an_actor_that_comes_near_of_itself_is_held_off_at_the_target(target: float) -> None:
    """The policy moves away by 0.003 nats a step; the actor follows by half of the gap times its pace. What is measured
    is off by a quarter, up and down in turn: where both hold each other, 0.003 = 0.5 · log2(KL/target) · KL."""
    settings = replace(SETTINGS, target=target, lower=0.1, smoothing=0.8)
    state, kl = initial_state(settings), 0.6
    for step in range(1000):
        kl += 0.003 - 0.5 * state.pace(target) * kl
        state = update(state, kl * 1.25 ** (-1) ** step, settings)
    held = target
    for _ in range(50):
        held = target * 2 ** (0.006 / held)
    assert kl == pytest.approx(held, rel=0.05)
    assert kl == pytest.approx(target, rel=0.2)
