"""How many rollout replicas are wanted, and where those that there are can be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from jackpot.errors import ConfigError
from jackpot.process.scaling import (
    announce_rollout,
    announced_rollouts,
    forget_rollouts,
    set_wanted_replicas,
    wanted_replicas,
    withdraw_rollout,
)
from jackpot.storage.run_directory import RunFiles


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
def test_a_damaged_file_wants_nothing_and_is_named(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    RunFiles(tmp_path).scale.write_text(text)
    assert wanted_replicas(tmp_path) is None
    assert f"{tmp_path}/scale.json is damaged" in caplog.text


def test_announcements_come_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert announced_rollouts(tmp_path) == {}
    announce_rollout(tmp_path, "10", "10.0.0.1:50051")
    announce_rollout(tmp_path, "2", "unix:/a")
    announce_rollout(tmp_path, "2", "unix:/b")  # came back elsewhere
    (tmp_path / "rollouts" / "3.json").write_text("{half")
    assert announced_rollouts(tmp_path) == {10: "10.0.0.1:50051", 2: "unix:/b"}
    assert "rollouts/3.json is damaged" in caplog.text
    withdraw_rollout(tmp_path, "2")
    withdraw_rollout(tmp_path, "2")
    assert announced_rollouts(tmp_path) == {10: "10.0.0.1:50051"}
    forget_rollouts(tmp_path)
    assert announced_rollouts(tmp_path) == {}
