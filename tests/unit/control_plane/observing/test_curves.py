"""Pictures of runs."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jackpot.config import parse_job
from jackpot.control_plane.observing.curves import draw_comparison, draw_run
from jackpot.storage.run_directory import RunDirectory


def run_in(path: Path, steps: int) -> RunDirectory:
    job = parse_job({"policy": {"model": "/m/p"}, "actor": {"model": "/m/a"}, "task": {"name": "complement"}})
    run = RunDirectory.create(path, path.name, job)
    rows = [{"step": s, "reward/mean": s / 10, "kl/policy_actor": None if s == 2 else 1 / s} for s in range(1, steps)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "evaluations.jsonl").write_text('{"step": 0, "policy_accuracy": 0.5}\n' if steps else "")
    return run


def size_of(picture: Path) -> tuple[int, int]:
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_run_can_be_drawn_however_short_it_was(tmp_path: Path, steps: int) -> None:
    draw_run(run_in(tmp_path / "run", steps), tmp_path / "curves.png")
    assert size_of(tmp_path / "curves.png") == (1200, 780)


def test_runs_are_drawn_into_one_picture(tmp_path: Path) -> None:
    runs = {name: run_in(tmp_path / name, 5) for name in ("on-policy", "none", "tis", "jackpot")}
    draw_comparison(runs, tmp_path / "comparison.png", "demo, seed 0")
    assert size_of(tmp_path / "comparison.png") == (1320, 504)


def test_matplotlib_loads_only_when_something_is_drawn() -> None:
    program = "import sys, jackpot.control_plane.sessions.job_run; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
