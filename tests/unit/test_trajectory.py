import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jackpot.trajectory import Group, GroupKey, Trajectory, VersionSpan, seeded_as

NUMBERS = st.integers(0, 10**12)


@given(key=st.builds(GroupKey, slot=NUMBERS, epoch=NUMBERS, prompt_index=NUMBERS, attempt=NUMBERS))
def test_a_group_id_is_read_back(key: GroupKey) -> None:
    assert GroupKey.parse(key.group_id("my-job-7")) == key


def test_the_same_work_has_the_same_id() -> None:
    assert GroupKey(3, 0, 17).group_id("job") == "job.s3.e0.p17.a0"
    assert GroupKey(3, 0, 17, attempt=2).group_id("job") == "job.s3.e0.p17.a2"


@pytest.mark.parametrize("text", ["", "job", "job.s1.e0.p2", "job.s1.e0.p2.a", "job.s-1.e0.p2.a0", "job.s1.e0.p2.a0#1"])
def test_other_texts_are_no_group_ids(text: str) -> None:
    with pytest.raises(ValueError, match="is not a group id"):
        GroupKey.parse(text)


def test_seeds_know_a_group_by_what_it_is_and_not_by_its_job() -> None:
    key = GroupKey(3, 0, 17, attempt=2)
    names = [seeded_as(key.group_id(job_id) + index) for job_id in ("job", "other-1129") for index in ("", "#0", "#1")]
    assert names[:3] == names[3:]
    assert len(set(names)) == 3
    assert seeded_as(key.group_id("job")) != seeded_as(GroupKey(3, 0, 17, attempt=1).group_id("job"))


@pytest.mark.parametrize("name", ["evaluation 3", "t", "math.s1", "job.s1.e0.p2.a0#", "job.x.s1.e0.p2.a0"])
def test_names_of_other_things_are_seeded_as_they_are(name: str) -> None:
    assert seeded_as(name) == name


def make_trajectory(*spans: VersionSpan) -> Trajectory:
    num_tokens = spans[-1].end
    return Trajectory(
        trajectory_id="job.s3.e0.p17.a0#0",
        token_ids=np.zeros(num_tokens, np.uint32),
        actor_logprobs=np.zeros(num_tokens, np.float32),
        topk_ids=None,
        topk_logprobs=None,
        version_spans=spans,
        finish_reason="stop",
    )


def test_a_group_counts_tokens_and_is_as_old_as_its_oldest_token() -> None:
    group = Group(
        group_id="job.s3.e0.p17.a0",
        prompt_index=17,
        prompt_token_ids=np.zeros(2, np.uint32),
        trajectories=(
            make_trajectory(VersionSpan(8, 0, 5)),
            make_trajectory(VersionSpan(6, 0, 1), VersionSpan(7, 1, 3)),
        ),
        temperature=1.0,
        dispatch_version=6,
    )
    assert group.slot == 3
    assert group.num_tokens == 8
    assert [trajectory.oldest_version for trajectory in group.trajectories] == [8, 6]
    assert group.oldest_version == 6
    assert group.metadata == {}


def test_what_travels_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_trajectory(VersionSpan(0, 0, 1)).reward = 1.0  # type: ignore[misc]
