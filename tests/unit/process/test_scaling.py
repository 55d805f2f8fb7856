"""How many rollout replicas are wanted, and where those that there are can be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from jackpot.errors import ConfigError
from jackpot.process.scaling import (
    WANTED_FILE,
    announce_rollout,
    announced_rollouts,
    forget_rollouts,
    set_wanted_replicas,
    wanted_replicas,
    withdraw_rollout,
)


def test_the_last_number_counts(tmp_path: Path) -> None:
    assert wanted_replicas(tmp_path) is None
    for replicas in (3, 1024, 2):
        set_wanted_replicas(tmp_path, replicas)
        assert wanted_replicas(tmp_path) == replicas


@pytest.mark.parametrize("replicas", [0, -1, 1025])
def test_a_number_out_of_bounds_is_refused_and_changes_nothing(tmp_path: Path, replicas: int) -> None:
    set_wanted_replicas(tmp_path, 2)
    with pytest.raises(ConfigError, match=rf"rollout_replicas = {replicas}: is not between 1 and 1024"):
        set_wanted_replicas(tmp_path, replicas)
    assert wanted_replicas(tmp_path) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rollout_replicas": "two"}', '{"rollout_replicas": 0}', "{}"])
def test_a_damaged_file_wants_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / WANTED_FILE).write_text(text)
    assert wanted_replicas(tmp_path) is None


def test_announcements_come_and_go(tmp_path: Path) -> None:
    assert announced_rollouts(tmp_path) == {}
    announce_rollout(tmp_path, "10", "10.0.0.1:50051")
    announce_rollout(tmp_path, "2", "unix:/a")
    announce_rollout(tmp_path, "2", "unix:/b")  # came back elsewhere
    (tmp_path / "rollouts" / "3.json").write_text("{half")
    assert announced_rollouts(tmp_path) == {10: "10.0.0.1:50051", 2: "unix:/b"}
    withdraw_rollout(tmp_path, "2")
    withdraw_rollout(tmp_path, "2")
    assert announced_rollouts(tmp_path) == {10: "10.0.0.1:50051"}
    forget_rollouts(tmp_path)
    assert announced_rollouts(tmp_path) == {}
