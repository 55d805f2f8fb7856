"""Checkpoints as tar streams."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
from object_world import object_world

from jackpot.control_plane.observing.archive import Archive, checkpoints
from jackpot.errors import JobNotFoundError, ObjectCorruptError
from jackpot.storage.latest_checkpoint import LATEST, write_latest
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.object_weights import ObjectWeightStore
from jackpot.storage.objects import Objects


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for name, content in {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "model.safetensors": "old",
        "README.md": "no",
    }.items():
        (model / name).write_text(content)
    run = tmp_path / "run"
    for name in ("weights/policy/00000002", "weights/policy/00000003", "export/policy"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(b"w" * 700)
    (run / "weights/policy/00000002/manifest.json").write_text("{}")
    for name in ("00000002", ".00000003"):  # the second is not whole yet
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "export/policy/config.json").write_text("{}")
    (run / "job.json").write_text(json.dumps({"policy": {"model": str(model)}}))
    return run


def write_model(content: bytes, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(content)


def test_a_checkpoint_becomes_a_whole_model_directory(run_dir: Path) -> None:
    assert [(one["name"], one["step"], one["roles"], one["latest"]) for one in checkpoints(run_dir)] == [
        ("00000002", 2, {"policy": 700}, True),
        ("export", None, {"policy": 700}, False),
    ]
    packed = Archive(run_dir, "00000002", "policy", "job-2")
    shutil.rmtree(run_dir / "checkpoints")  # pruned while it is sent
    shutil.rmtree(run_dir / "weights")
    data = b"".join(packed.chunks())
    assert len(data) == packed.size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert sorted(tar.getnames()) == ["job-2/config.json", "job-2/model.safetensors", "job-2/tokenizer.json"]
        weights = tar.extractfile("job-2/model.safetensors")
        assert weights is not None and weights.read() == b"w" * 700


def test_the_latest_is_what_the_pointer_names(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "00000003").mkdir()  # whole, and not yet named: its groups are still on the bus
    write_latest(run_dir / "checkpoints", "00000002")
    assert {one["name"]: one["latest"] for one in checkpoints(run_dir)} == {
        "00000002": True,
        "00000003": False,
        "export": False,
    }
    (run_dir / "weights/policy/00000002/model.safetensors").write_bytes(b"named")
    content = b"".join(Archive(run_dir, "latest", "policy", "x").chunks())
    assert b"named" in content and b"w" * 700 not in content
    write_latest(run_dir / "checkpoints", "00000007")  # gone
    assert [one["name"] for one in checkpoints(run_dir) if one["latest"]] == ["00000003"]


@pytest.mark.parametrize(("name", "role"), [("00000003", "policy"), ("export", "actor"), ("..", "policy")])
def test_what_is_not_there_is_named_with_what_is(run_dir: Path, name: str, role: str) -> None:
    with pytest.raises(JobNotFoundError, match=r"there are: 00000002 \(policy\), export \(policy\)"):
        Archive(run_dir, name, role, "x")


def test_a_checkpoint_in_a_bucket_is_downloaded_from_there(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_world() as world:
        for name, value in world.environ.items():
            monkeypatch.setenv(name, value)
        job = json.loads((run_dir / "job.json").read_text()) | {"weights": {"store": world.url}}
        (run_dir / "job.json").write_text(json.dumps(job))
        (run_dir / "run.json").write_text(json.dumps({"job_id": "tiny-1"}))
        shutil.rmtree(run_dir / "export")
        assert checkpoints(run_dir) == []

        objects = Objects(f"{world.url}/tiny-1")
        store = ObjectWeightStore(objects.below("weights"), tmp_path / "copies")
        content = bytes(range(256)) * 8192  # 2 MiB: several pieces
        for step in (2, 3):
            store.publish("policy", step, partial(write_model, content), {})
        ObjectDirectories(objects.below("checkpoints")).upload("00000002", run_dir / "checkpoints" / "00000002")
        assert [(one["name"], one["roles"]) for one in checkpoints(run_dir)] == [("00000002", {"policy": len(content)})]

        (run_dir / "checkpoints" / "00000003").mkdir()
        stored = ObjectDirectories(objects.below("checkpoints"))
        stored.upload("00000003", run_dir / "checkpoints" / "00000003")
        stored.point(LATEST, "00000002")
        assert [(one["name"], one["latest"]) for one in checkpoints(run_dir)] == [
            ("00000002", True),
            ("00000003", False),
        ]
        stored.remove("00000003")

        packed = Archive(run_dir, "latest", "policy", "job-2")
        data = b"".join(packed.chunks())
        assert len(data) == packed.size
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert sorted(tar.getnames()) == ["job-2/config.json", "job-2/model.safetensors", "job-2/tokenizer.json"]
            weights = tar.extractfile("job-2/model.safetensors")
            assert weights is not None and weights.read() == content

        world.spoil("runs/tiny-1/weights/policy/00000002/model.safetensors")
        with pytest.raises(ObjectCorruptError, match=r"00000002/model.safetensors does not match its manifest"):
            b"".join(Archive(run_dir, "00000002", "policy", "job-2").chunks())
        with pytest.raises(JobNotFoundError, match=r"there are: 00000002 \(policy\)"):
            Archive(run_dir, "00000003", "policy", "x")
