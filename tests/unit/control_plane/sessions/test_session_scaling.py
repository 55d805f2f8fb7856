"""A session passes the number of rollout replicas wanted on to the launcher."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jackpot.control_plane.launch.launcher import LaunchStatus
from jackpot.control_plane.sessions import scaling
from jackpot.control_plane.sessions.scaling import Scaling, rollout_replicas
from jackpot.errors import JackpotError
from jackpot.process.scaling import set_wanted_replicas
from jackpot.storage.run_directory import RunFiles


class Launcher:
    """Notes what it is told; refuses more than three."""

    redis_url = None

    def __init__(self) -> None:
        self.told: list[int] = []

    async def scale(self, rollout_replicas: int) -> None:
        self.told.append(rollout_replicas)
        if rollout_replicas > 3:
            raise JackpotError("no room")

    async def start(self) -> None: ...
    async def check(self) -> LaunchStatus:
        return LaunchStatus()

    async def stop(self) -> None: ...


def rows(run_dir: Path) -> list[tuple[int, int, str | None]]:
    lines = RunFiles(run_dir).scalings.read_text().splitlines()
    return [(row["before"], row["rollout_replicas"], row["error"]) for row in map(json.loads, lines)]


@pytest.fixture(autouse=True)
def no_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "DRAIN_SECONDS", 0.0)


async def test_wanting_fewer_is_told_once_the_orchestrator_has_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "DRAIN_SECONDS", 0.2)
    launcher = Launcher()
    session = Scaling(tmp_path, launcher, 2)
    set_wanted_replicas(tmp_path, 1)
    began = time.monotonic()
    while not launcher.told:
        assert time.monotonic() - began < 10
        await session.look()
    assert launcher.told == [1] and time.monotonic() - began >= 0.2
    set_wanted_replicas(tmp_path, 3)  # more are told at once
    await session.look()
    assert launcher.told == [1, 3]
    # Taken back in time, nobody leaves; asked for again, there is time again.
    for replicas in (1, 3):
        set_wanted_replicas(tmp_path, replicas)
        await session.look()
    assert launcher.told == [1, 3]
    while time.monotonic() < began + 5 and session._wait_until > time.monotonic():
        await session.look()
    set_wanted_replicas(tmp_path, 1)
    await session.look()
    assert launcher.told == [1, 3]


async def test_each_number_is_told_once_and_written_down(tmp_path: Path) -> None:
    launcher = Launcher()
    session = Scaling(tmp_path, launcher, 2)
    await session.look()
    assert launcher.told == []
    for replicas in (2, 3, 1):  # first as many as there are
        set_wanted_replicas(tmp_path, replicas)
        for _ in range(3):
            await session.look()
    assert launcher.told == [2, 3, 1]
    assert rows(tmp_path) == [(2, 3, None), (3, 1, None)]
    assert rollout_replicas(tmp_path, configured=2) == 1


async def test_what_is_refused_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RETRY_SECONDS", 0.0)
    launcher = Launcher()
    session = Scaling(tmp_path, launcher, 2)
    set_wanted_replicas(tmp_path, 4)
    for _ in range(3):
        await session.look()
    assert launcher.told == [4, 4, 4] and rows(tmp_path) == [(2, 4, "no room")]
    set_wanted_replicas(tmp_path, 3)
    await session.look()
    assert rows(tmp_path)[1:] == [(2, 3, None)]
