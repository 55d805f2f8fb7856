import pytest

from jackpot.config import ScheduleConfig
from jackpot.learner.schedule import learning_rate_factor


def factors(total: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [learning_rate_factor(schedule, step, total) for step in range(total)]


def test_constant_without_warmup_is_always_the_peak() -> None:
    assert factors(3) == [1.0, 1.0, 1.0]


def test_warmup_rises_linearly_and_moves_in_the_first_step() -> None:
    assert factors(5, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_ends_at_the_final_fraction() -> None:
    assert factors(5, name="linear", final_fraction=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_passes_its_middle_half_way_down() -> None:
    assert factors(3, name="cosine") == pytest.approx([1.0, 0.5, 0.0])


def test_a_schedule_of_one_step_does_not_divide_by_zero() -> None:
    assert factors(1, name="cosine", final_fraction=0.5) == [1.0]
