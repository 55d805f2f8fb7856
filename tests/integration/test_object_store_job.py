"""Whole jobs whose weights and checkpoints are in a bucket, on a server that speaks S3."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from job_world import JACKPOT, assert_ledger_adds_up, assert_mirror_agrees, jackpot_run, kill_group, write_job
from object_world import ObjectWorld, object_world
from patience import PATIENCE_SECONDS, TEST_SECONDS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectWorld]:
    with object_world() as world:
        for name, value in world.environ.items():
            monkeypatch.setenv(name, value)
        yield world


def job_id(directory: Path) -> str:
    return str(json.loads((directory / "run.json").read_text())["job_id"])


def checkpoints(world: ObjectWorld, directory: Path) -> list[int]:
    prefix = f"runs/{job_id(directory)}/checkpoints/"
    keys = world.keys(prefix)
    return sorted(int(key.removeprefix(prefix).split("/")[0]) for key in keys if key.endswith("/manifest.json"))


def test_a_job_outlives_its_store_being_down_and_its_machine_being_lost(
    tmp_path: Path, make_model: MakeModel, world: ObjectWorld
) -> None:
    job_file = write_job(tmp_path, make_model, steps=30, checkpoint_every=2, keep_checkpoints=2)
    directory = tmp_path / "run"
    settings = [f"weights.store={world.url}", "bus.payload_store=s3"]
    arguments = [str(job_file), *settings, "--run-dir", str(directory)]
    with jackpot_run(*arguments, directory=directory) as run:
        run.wait_for_step(2)
        world.door.shut()
        threading.Timer(3.0, world.door.open).start()
        run.wait_until(lambda: checkpoints_of(world, directory) >= 4, "a checkpoint after the outage")
        kill_group(run.process)
        run.process.wait()
    newest = int(world.read(f"runs/{job_id(directory)}/checkpoints/latest"))
    assert not (directory / "weights").exists() and not (directory / "checkpoints").exists()
    shutil.rmtree(directory / "scratch")  # what was on the machine is gone

    with jackpot_run("--resume", str(directory), "--json", directory=directory) as run:
        code, stdout, stderr = run.finish()
    assert code == 0, stderr + run.output()
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["resumed_from_step"] == newest and summary["steps"] == 30
    assert_ledger_adds_up(summary, trained=60)
    assert_mirror_agrees(run)
    assert summary["restarts"] == 0
    kept = checkpoints(world, directory)
    assert kept[-2:] == [28, 30] and len(kept) <= 3  # and the best
    weights = {key.split("/")[4] for key in world.keys(f"runs/{job_id(directory)}/weights/policy/0")}
    assert {f"{step:08d}" for step in kept} <= weights and len(weights) <= 8 + 3
    local = [path.name for path in (directory / "scratch" / "checkpoints").iterdir()]
    assert local == ["00000030"]
    assert not world.keys(f"runs/{job_id(directory)}/payloads/")


def checkpoints_of(world: ObjectWorld, directory: Path) -> int:
    """The newest checkpoint; −1 while the server cannot be asked."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return (checkpoints(world, directory) or [-1])[-1]
    except (BotoCoreError, ClientError):
        return -1


def test_a_store_that_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, make_model: MakeModel, world: ObjectWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = str(write_job(tmp_path, make_model))

    def refusal(store: str) -> str:
        command = [*JACKPOT, "run", job_file, f"weights.store={store}", "--run-dir", str(tmp_path / "run")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert not (tmp_path / "run").exists()
        return result.stderr

    assert "is no place in a bucket. Write s3://bucket" in refusal("/mnt/weights")
    assert "NoSuchBucket" in refusal("s3://no-such-bucket/runs")
    world.door.shut()
    assert "cannot be written now" in refusal(world.url)
    world.door.open()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = refusal(world.url)
    assert "weights.store" in message and "no credentials" in message and "Set AWS_ACCESS_KEY_ID" in message
