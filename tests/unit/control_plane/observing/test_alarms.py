"""Alarms begin once, and begin again after they have ended."""

from jackpot.control_plane.observing.alarms import FLAT_STEPS, AlarmWatch


def names(watch: AlarmWatch, **row: float) -> list[str]:
    return [alarm.name for alarm in watch.look({name.replace("__", "/"): value for name, value in row.items()})]


def test_flat_rewards_are_told_after_a_while_and_once() -> None:
    watch = AlarmWatch()
    told = [names(watch, step=step, reward__std=0.0) for step in range(FLAT_STEPS + 3)]
    assert told == [[]] * (FLAT_STEPS - 1) + [["no_reward_variance"]] + [[]] * 3
    assert names(watch, step=20, reward__std=0.5) == []
    assert [names(watch, step=step, reward__std=0.0) for step in range(FLAT_STEPS)][-1] == ["no_reward_variance"]


def test_what_is_not_finite_is_named() -> None:
    (alarm,) = AlarmWatch().look({"step": 3, "policy/loss": float("nan"), "reward/std": 1.0})
    assert (alarm.name, alarm.step) == ("not_finite", 3) and "policy/loss" in alarm.message


def test_divergence_and_rejection_have_bounds() -> None:
    watch = AlarmWatch()
    assert names(watch, step=1, kl__policy_actor=4.9, rollout_corr__obrs_acceptance_rate=0.06) == []
    assert names(watch, step=2, kl__policy_actor=5.1, rollout_corr__obrs_acceptance_rate=0.04) == [
        "kl_too_large",
        "acceptance_too_low",
    ]
    assert names(watch, step=3, kl__policy_actor=6.0) == []
    assert names(watch, step=4, rollout_corr__nonfinite=1.0) == ["nonfinite_tokens"]
