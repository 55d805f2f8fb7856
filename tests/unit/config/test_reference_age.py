"""Which version of the policy scores a batch: the same for all of its groups, and as old as the setting says."""

from __future__ import annotations

from typing import Any

import pytest

from jackpot.config import JobSpec, parse_job
from jackpot.errors import ConfigError


def job(**sections: Any) -> JobSpec:
    return parse_job({"policy": {"model": "p"}, "actor": {"model": "a"}, "task": {"name": "complement"}, **sections})


def versions(job: JobSpec, *slots: int) -> list[int]:
    return [job.reference_version(slot) for slot in slots]


def test_the_reference_is_a_batch_old_where_sampling_overlaps_training() -> None:
    overlapping = job(learner={"groups_per_batch": 4})
    assert overlapping.reference_age == 1
    assert versions(overlapping, 0, 3, 4, 7, 8, 11, 12) == [0, 0, 0, 0, 1, 1, 2]


def test_the_reference_of_a_synchronous_job_is_the_policy_as_the_batch_begins() -> None:
    synchronous = job(learner={"groups_per_batch": 4}, orchestrator={"max_staleness": 0})
    assert versions(synchronous, 0, 3, 4, 7, 8, 11, 12) == [0, 0, 1, 1, 2, 2, 3]


def test_an_age_is_counted_in_batches_of_several_updates() -> None:
    sections = {"learner": {"groups_per_batch": 8, "updates_per_batch": 4, "steps": 40}}
    assert job(**sections).reference_age == 0  # a staleness of one step is less than a batch
    old = job(**sections, orchestrator={"max_staleness": 8}, scorer={"reference_age": 2})
    assert versions(old, 0, 8, 16, 24, 31, 32) == [0, 0, 0, 4, 4, 8]
    assert old.start_step(31) == 12


def test_the_learners_own_pass_is_the_policy_as_the_batch_begins() -> None:
    assert job(scorer={"reuse_reference": True}).reference_age == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"scorer": {"reference_age": 2}}, "reference_age = 2 is older than samples may be.*at most 1"),
        ({"scorer": {"reference_age": 1, "reuse_reference": True}}, "reference_age = 1 cannot be with reuse_reference"),
        (
            {"scorer": {"reference_age": 7}, "orchestrator": {"max_staleness": 7}},
            "keep_versions = 8 does not keep. Raise keep_versions to 9",
        ),
    ],
)
def test_ages_that_cannot_be_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**sections)
