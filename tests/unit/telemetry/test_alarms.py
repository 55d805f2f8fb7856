"""When alarms begin, and when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jackpot.config import AlarmsConfig
from jackpot.telemetry.alarms import Alarm, AlarmWatch


def watch(**settings: Any) -> AlarmWatch:
    return AlarmWatch(AlarmsConfig.model_validate(settings))


def row(step: int, **figures: float) -> dict[str, float]:
    healthy = {"reward/mean": 0.5, "reward/std": 0.5, "policy/grad_norm": 1.0, "kl/policy_actor": 0.2}
    return {"step": step, **healthy} | {name.replace("__", "/"): value for name, value in figures.items()}


def names(alarms: Sequence[Alarm]) -> list[tuple[str, int]]:
    return [(alarm.name, alarm.step) for alarm in alarms]


def test_a_healthy_run_raises_nothing() -> None:
    watched = watch()
    for step in range(1, 50):
        assert watched.observe_step(row(step)) == []
        assert watched.observe_evaluation(step, step / 50) == []


def test_equal_rewards_for_so_many_steps_in_a_row() -> None:
    watched = watch(equal_rewards_steps=3)
    found = [watched.observe_step(row(step, reward__std=0.0 if step != 2 else 0.1)) for step in range(1, 8)]
    # Two steps do not count, for the second was different; and it is said once.
    assert [names(alarms) for alarms in found] == [[], [], [], [], [("equal_rewards", 5)], [], []]
    assert "every reward has been 0.5 for 3 steps" in found[4][0].message


def test_an_alarm_that_passed_may_be_raised_again() -> None:
    watched = watch(kl_bound=1.0)
    found = [watched.observe_step(row(step, kl__policy_actor=kl)) for step, kl in enumerate((2.0, 2.0, 0.5, 3.0), 1)]
    assert [names(alarms) for alarms in found] == [[("kl_too_large", 1)], [], [], [("kl_too_large", 4)]]


def test_without_a_learning_actor_the_estimated_divergence_is_watched() -> None:
    figures = row(1) | {"rollout_corr/k3_kl": 7.0}
    del figures["kl/policy_actor"]
    assert names(watch().observe_step(figures)) == [("kl_too_large", 1)]


def test_a_gradient_of_exactly_zero() -> None:
    watched = watch(zero_gradient_steps=2)
    found = [watched.observe_step(row(step, policy__grad_norm=norm)) for step, norm in enumerate((0, 1e-30, 0, 0), 1)]
    assert [names(alarms) for alarms in found] == [[], [], [], [("zero_gradient", 4)]]


def test_accuracy_that_falls_while_the_reward_rises() -> None:
    watched = watch(accuracy_drop=0.1)
    accuracies = {10: 0.4, 20: 0.6, 30: 0.45, 40: 0.3, 50: 0.2}
    found = []
    for step in range(1, 51):
        watched.observe_step(row(step, reward__mean=step / 50))
        if step in accuracies:
            found.append(names(watched.observe_evaluation(step, accuracies[step])))
    assert found == [[], [], [], [("accuracy_falls", 40)], []]


def test_accuracy_that_falls_together_with_the_reward_is_another_matter() -> None:
    watched = watch(accuracy_drop=0.1)
    for step in range(1, 51):
        watched.observe_step(row(step, reward__mean=1 - step / 50))
        assert watched.observe_evaluation(step, 1 - step / 50) == []


def test_next_to_nothing_accepted() -> None:
    watched = watch(acceptance_bound=0.1)
    rates = (0.5, 0.09, 0.05, 0.2)
    found = [
        watched.observe_step(row(step, rollout_corr__obrs_acceptance_rate=rate)) for step, rate in enumerate(rates)
    ]
    assert [names(alarms) for alarms in found] == [[], [("low_acceptance", 1)], [], []]
    assert "only 9.0% of the actor's tokens are accepted, less than 10.0%" in found[1][0].message


def test_figures_that_are_not_finite_are_named() -> None:
    alarms = watch().observe_step(row(4, policy__loss=float("nan"), policy__grad_norm=float("inf")))
    assert names(alarms) == [("not_finite", 4)]
    assert "policy/grad_norm, policy/loss" in alarms[0].message


def test_every_alarm_but_that_of_broken_numbers_can_be_switched_off() -> None:
    watched = watch(equal_rewards_steps=0, zero_gradient_steps=0, kl_bound=None, accuracy_drop=0, acceptance_bound=0)
    for step in range(1, 30):
        bad = row(step, reward__std=0, policy__grad_norm=0, kl__policy_actor=99, rollout_corr__obrs_acceptance_rate=0)
        assert watched.observe_step(bad) == []
        assert watched.observe_evaluation(step, 1 - step / 30) == []


def canary(largest: float, typical: float) -> dict[str, float]:
    return {"rollout/canary_max_difference": largest, "rollout/canary_rms_difference": typical}


def test_a_canary_beyond_rounding_and_one_that_was_not_looked_at() -> None:
    watched = watch()
    figures = [canary(9e-4, 1e-4), canary(2e-3, 1e-4), {}, canary(3e-3, 1e-3), canary(1e-5, 1e-6), canary(1, 1)]
    found = [names(watched.observe_step(row(step) | seen)) for step, seen in enumerate(figures, 1)]
    # A step without the column neither ends the alarm nor begins it.
    assert found == [[], [("canary", 2)], [], [], [], [("canary", 6)]]
    assert names(watch(canary_bound=0.5).observe_step(row(1) | canary(0.6, 0.1))) == [("canary", 1)]
    assert watch(canary_bound=0.5).observe_step(row(1) | canary(0.4, 0.4)) == []
    assert "canary" in dict(names(watch().observe_step(row(1) | canary(float("nan"), float("nan")))))


def test_in_other_formats_the_canary_is_held_against_the_first_batches() -> None:
    watched = AlarmWatch(AlarmsConfig(), exact=False)
    figures = [canary(0.5, 0.02), canary(0.9, 0.03), canary(0.7, 0.04), canary(2.0, 0.089), canary(0.5, 0.091)]
    found = [names(watched.observe_step(row(step) | seen)) for step, seen in enumerate(figures, 1)]
    assert found == [[], [], [], [], [("canary", 5)]]  # beyond three times 0.03
