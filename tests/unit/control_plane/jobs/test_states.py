"""The table of transitions."""

import pytest

from jackpot.control_plane.jobs.states import TRANSITIONS, JobState, check_transition
from jackpot.errors import JobStateError


def test_every_state_is_in_the_table_and_every_job_can_end() -> None:
    assert set(TRANSITIONS) == set(JobState)
    for state in JobState:
        reachable = {state}
        while (more := {after for before in reachable for after in TRANSITIONS[before]} | reachable) != reachable:
            reachable = more
        assert any(one.finished for one in reachable), state


def test_success_is_final_and_slots_are_given_back_only_by_ending_or_queueing() -> None:
    assert TRANSITIONS[JobState.SUCCEEDED] == frozenset()
    for state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING):
        assert state.active and not state.finished
    assert JobState.QUEUED not in TRANSITIONS[JobState.STOPPING]  # what was cancelled never comes back by itself


def test_a_refusal_names_the_state_and_what_may_follow() -> None:
    check_transition("a", JobState.QUEUED, JobState.STARTING)
    with pytest.raises(JobStateError, match="a is cancelled and cannot become running; what may follow is: queued"):
        check_transition("a", JobState.CANCELLED, JobState.RUNNING)
