"""When a process that died is started again."""

from __future__ import annotations

from jackpot.control_plane.launch.supervision import BACKOFF_SECONDS, STABLE_SECONDS, Deaths, told


def test_each_death_in_a_row_waits_longer_until_the_process_is_given_up() -> None:
    deaths = Deaths(allowed=8)
    delays = [deaths.restart_delay(1.0) for _ in range(9)]
    assert delays == [*BACKOFF_SECONDS, BACKOFF_SECONDS[-1], BACKOFF_SECONDS[-1], None]
    assert list(BACKOFF_SECONDS) == sorted(BACKOFF_SECONDS)


def test_a_process_that_stayed_up_long_has_its_earlier_deaths_forgiven() -> None:
    deaths = Deaths(allowed=1)
    assert deaths.restart_delay(1.0) == BACKOFF_SECONDS[0]
    assert deaths.restart_delay(STABLE_SECONDS + 1) == BACKOFF_SECONDS[0]
    assert deaths.restart_delay(STABLE_SECONDS) is None


def test_none_allowed_means_the_first_death_is_the_last() -> None:
    assert Deaths(allowed=0).restart_delay(STABLE_SECONDS + 1) is None


def test_exit_statuses_are_told_in_words() -> None:
    assert told(-9) == "signal 9"
    assert told(75) == "exit code 75"
