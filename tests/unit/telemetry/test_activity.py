"""What a service spends its time on: overlapping work, work under way, the record."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import WRITE_SECONDS, Activity


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_pieces_of_one_activity_that_overlap_count_once(tmp_path: Path, clock: Clock) -> None:
    registry = CollectorRegistry()
    activity = Activity(Metrics("job-1", registry), "learner", "0", tmp_path, clock)
    with activity.doing("train"):
        clock.now += 1
        with activity.doing("train"), activity.doing("publish"):
            clock.now += 2
        clock.now += 4
    assert activity.seconds() == {"train": 7, "publish": 2}
    counted = registry.get_sample_value("jackpot_activity_seconds_total", {"job_id": "job-1", "activity": "train"})
    assert counted == 7


def test_work_under_way_counts_and_counts_once(clock: Clock) -> None:
    activity = Activity(Metrics("job-1", CollectorRegistry()), "scorer", "0", None, clock)
    with activity.doing("score"):
        clock.now += 3
        assert activity.seconds() == {"score": 3}
        clock.now += 1
    assert activity.seconds() == {"score": 4}


def test_an_error_ends_the_activity(clock: Clock) -> None:
    activity = Activity(Metrics("job-1", CollectorRegistry()), "scorer", "0", None, clock)
    with pytest.raises(RuntimeError), activity.doing("score"):
        clock.now += 1
        raise RuntimeError
    clock.now += 5
    assert activity.seconds() == {"score": 1}


def test_the_record_is_written_now_and_then_and_on_request(tmp_path: Path, clock: Clock) -> None:
    activity = Activity(Metrics("job-1", CollectorRegistry()), "scorer", "1", tmp_path, clock)
    path = tmp_path / "activity" / "scorer-1.json"
    with activity.doing("score"):
        clock.now += WRITE_SECONDS
    assert not path.exists()
    with activity.doing("score"):
        clock.now += 1
    assert json.loads(path.read_text()) == {"service": "scorer", "seconds": {"score": 3.0}, "wall_seconds": 3.0}
    clock.now += 1
    activity.write()
    assert json.loads(path.read_text())["wall_seconds"] == 4.0
    assert [file.name for file in path.parent.iterdir()] == ["scorer-1.json"]


def test_threads_share_a_clock(clock: Clock) -> None:
    activity = Activity(Metrics("job-1", CollectorRegistry()), "rollout", "0", None, clock)
    inside, leave = threading.Barrier(5), threading.Event()

    def work() -> None:
        with activity.doing("generate"):
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    clock.now += 2
    leave.set()
    for thread in threads:
        thread.join(10)
    assert activity.seconds() == {"generate": 2}
