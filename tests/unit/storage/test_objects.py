"""Objects, directories of them, and weights in a bucket, on a server that speaks S3."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from object_world import ObjectWorld, object_world
from prometheus_client import CollectorRegistry

from jackpot.bus.object_payloads import ObjectPayloads
from jackpot.bus.payloads import ENVELOPE_BYTES, payload_name
from jackpot.errors import (
    BusError,
    ObjectConflictError,
    ObjectCorruptError,
    ObjectMissingError,
    ObjectRefusedError,
    ObjectUnavailableError,
    PayloadError,
    PayloadMissingError,
    WeightCorruptError,
    WeightError,
    WeightMissingError,
)
from jackpot.storage import object_weights
from jackpot.storage import objects as objects_module
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.object_weights import ObjectWeightStore
from jackpot.storage.objects import ABSENT, Objects, observe_calls
from jackpot.telemetry import Metrics


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectWorld]:
    with object_world() as world:
        yield world


@pytest.fixture
def world(server: ObjectWorld, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ObjectWorld:
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_weights, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(object_weights, "LOOK_SECONDS_IN_OUTAGE", 0.0)
    server.url = f"s3://{server.bucket}/{request.node.name[:60]}"
    return server


@pytest.fixture
def objects(world: ObjectWorld) -> Objects:
    return Objects(world.url)


def test_small_objects_are_written_on_conditions(objects: Objects) -> None:
    with pytest.raises(ObjectMissingError, match=r"s3://jackpot-.*/a is not there"):
        objects.get("a")
    objects.put("a", b"1", ABSENT)
    with pytest.raises(ObjectConflictError, match="written by somebody else"):
        objects.put("a", b"2", ABSENT)
    data, tag = objects.get("a")
    assert data == b"1"
    objects.put("a", b"3", tag)
    with pytest.raises(ObjectConflictError):
        objects.put("a", b"4", tag)
    objects.put("b/c", b"55")
    assert [(found.key, found.bytes) for found in objects.list()] == [("a", 1), ("b/c", 2)]
    assert [found.key for found in objects.below("b").list()] == ["c"]
    objects.delete(["a", "b/c", "never-there"])
    assert not objects.list()


def test_calls_are_told_of(world: ObjectWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(objects_module, "_observers", [])
    observe_calls(Metrics("job-1", registry).observe_object_call)
    objects = Objects(world.url)
    with pytest.raises(ObjectMissingError):
        objects.get("a")
    objects.put("a", b"1")
    world.door.shut()
    try:
        with pytest.raises(ObjectUnavailableError):
            objects.get("a")
    finally:
        world.door.open()

    def counted(operation: str, result: str) -> float | None:
        labels = {"job_id": "job-1", "operation": operation, "result": result}
        return registry.get_sample_value("jackpot_object_store_calls_total", labels)

    assert [counted("read", "done"), counted("write", "done"), counted("read", "failed")] == [1, 1, 1]
    seconds = registry.get_sample_value(
        "jackpot_object_store_call_seconds_count", {"job_id": "job-1", "operation": "read"}
    )
    assert seconds == 1


def test_files_of_many_parts_and_streams(objects: Objects, tmp_path: Path) -> None:
    content = bytes(range(256)) * (40 << 10)  # 10 MiB: more than one part
    (tmp_path / "sent").write_bytes(content)
    objects.upload(tmp_path / "sent", "large")
    objects.download("large", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == content
    assert b"".join(objects.chunks("large", len(content))) == content


def test_a_broken_stream_is_taken_up_where_it_broke(world: ObjectWorld, tmp_path: Path) -> None:
    objects = Objects(world.url, outage_seconds=30.0)
    content = bytes(range(256)) * (32 << 10)  # 8 MiB: more than the connection's buffers hold
    (tmp_path / "sent").write_bytes(content)
    objects.upload(tmp_path / "sent", "large")
    stream = objects.chunks("large", len(content))
    got = [next(stream)]
    world.door.shut()
    threading.Timer(0.5, world.door.open).start()
    got.extend(stream)
    assert b"".join(got) == content


def test_an_outage_is_waited_out_and_no_longer_than_told(world: ObjectWorld) -> None:
    patient, hasty = Objects(world.url, outage_seconds=30.0), Objects(world.url, outage_seconds=0.0)
    world.door.shut()
    try:
        with pytest.raises(ObjectUnavailableError, match="cannot be written now"):
            hasty.put("x", b"")
    finally:
        threading.Timer(0.5, world.door.open).start()
    patient.put("x", b"1")
    assert hasty.get("x")[0] == b"1"


def test_refusals_name_the_place_and_the_remedy(world: ObjectWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ObjectRefusedError, match=r"s3://no-such-bucket/.* cannot be written .*NoSuchBucket.* Create"):
        Objects("s3://no-such-bucket/runs").check()
    Objects(world.url).check()
    assert not world.keys(world.url.removeprefix(f"s3://{world.bucket}/"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(ObjectRefusedError, match=r"no credentials .*Set AWS_ACCESS_KEY_ID"):
        Objects(world.url).check()


def test_a_directory_appears_with_its_manifest_and_is_checked(
    world: ObjectWorld, objects: Objects, tmp_path: Path
) -> None:
    directories = ObjectDirectories(objects)
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    (source / "a").write_bytes(b"one")
    (source / "sub" / "b").write_bytes(b"three")
    objects.put("00000002/a", b"of a writer that died")
    directories.upload("00000001", source)
    assert directories.names() == ["00000001"] and directories.found()[0].bytes == 8
    directories.download("00000001", target)
    assert (target / "a").read_bytes() == b"one" and (target / "sub" / "b").read_bytes() == b"three"
    assert directories.sweep() == ["00000001"]
    assert not [found for found in objects.list() if found.key.startswith("00000002")]
    world.spoil(objects.name("00000001/sub/b").removeprefix(f"s3://{world.bucket}/"))
    with pytest.raises(ObjectCorruptError, match=r"s3://.*/00000001/sub/b does not match its manifest \(5 bytes"):
        directories.download("00000001", target)
    directories.remove("00000001")
    assert not objects.list()
    with pytest.raises(ObjectMissingError):
        directories.files("00000001")


def publish(store: ObjectWeightStore, *versions: int) -> None:
    for version in versions:
        store.publish("policy", version, lambda d, v=version: write(d, v), {"obrs_lambda": 0.5})


def write(directory: Path, version: int) -> None:
    (directory / "model.safetensors").write_bytes(f"weights {version}".encode() * 100)


def test_a_published_version_is_read_by_others(objects: Objects, tmp_path: Path) -> None:
    learner, reader = ObjectWeightStore(objects, tmp_path / "l"), ObjectWeightStore(objects, tmp_path / "r")
    assert reader.latest("policy") is None and reader.versions("policy") == []
    publish(learner, 0, 1)
    latest = reader.latest("policy")
    assert latest is not None and latest.version == 1 and latest.metadata == {"obrs_lambda": 0.5}
    assert latest == learner.manifest("policy", 1)
    assert (reader.open("policy", 0) / "model.safetensors").read_bytes() == b"weights 0" * 100
    assert reader.versions("policy") == [0, 1]
    publish(learner, 0)
    assert reader.latest("policy") == latest  # never backwards
    with pytest.raises(WeightMissingError, match="version 7 of the policy's weights is not in s3://"):
        reader.open("policy", 7)
    with pytest.raises(WeightError, match="negative"):
        publish(learner, -1)


def test_versions_are_pruned_and_copies_bounded(objects: Objects, tmp_path: Path) -> None:
    learner, reader = ObjectWeightStore(objects, tmp_path / "l"), ObjectWeightStore(objects, tmp_path / "r")
    for version in range(8):
        publish(learner, version)
        reader.open("policy", version)
    assert learner.prune("policy", keep=3, pinned=[1]) == [0, 2, 3, 4]
    assert reader.versions("policy") == [1, 5, 6, 7]
    for copies in (tmp_path / "l", tmp_path / "r"):
        assert len([path for path in (copies / "policy").iterdir() if path.name.isdigit()]) == 2
    reader.open("policy", 1)
    assert sorted(p.name for p in (tmp_path / "r" / "policy").iterdir() if p.name.isdigit()) == [
        f"{v:08d}" for v in (1, 6, 7)
    ]


def test_a_spoiled_object_is_refused_and_an_intact_copy_serves(
    world: ObjectWorld, objects: Objects, tmp_path: Path
) -> None:
    learner, reader = ObjectWeightStore(objects, tmp_path / "l"), ObjectWeightStore(objects, tmp_path / "r")
    publish(learner, 3)
    world.spoil(objects.name("policy/00000003/model.safetensors").removeprefix(f"s3://{world.bucket}/"))
    with pytest.raises(WeightCorruptError, match=r"s3://.*/policy/00000003/model.safetensors does not match"):
        reader.open("policy", 3)
    assert not list((tmp_path / "r" / "policy").glob("[0-9]*"))
    assert (learner.open("policy", 3) / "model.safetensors").read_bytes() == b"weights 3" * 100


def test_while_the_store_is_down_the_newest_known_stays(world: ObjectWorld, objects: Objects, tmp_path: Path) -> None:
    learner, reader = ObjectWeightStore(objects, tmp_path / "l"), ObjectWeightStore(objects, tmp_path / "r")
    publish(learner, 0)
    latest = reader.latest("policy")
    world.door.shut()
    try:
        assert reader.latest("policy") == latest and latest is not None
        with pytest.raises(ObjectUnavailableError):
            publish(learner, 1)
    finally:
        world.door.open()
    publish(learner, 1)
    newer = reader.latest("policy")
    assert newer is not None and newer.version == 1


async def test_payloads_in_a_bucket_come_back_and_go(objects: Objects) -> None:
    store = ObjectPayloads(objects, max_bytes=100)
    kept, ended = (payload_name(f"job-1.s{slot}.e0.p9.a0", "rollout") for slot in (3, 4))
    for name in (kept, ended):
        assert await store.put(name, b"bytes") == b""  # nothing for the script to store
    assert await store.get(kept) == b"bytes"
    with pytest.raises(PayloadError, match="not a payload's name"):
        await store.get("../secret")
    objects.put("large", bytes(101 + ENVELOPE_BYTES))
    with pytest.raises(PayloadError, match=r"s3://.*/large has .* more than bus.max_payload_bytes allows"):
        await store.get("large")
    await store.delete("large")

    async def ended_groups(group_ids: Sequence[str]) -> set[str]:
        assert sorted(group_ids) == ["job-1.s3.e0.p9.a0", "job-1.s4.e0.p9.a0"]
        return {"job-1.s4.e0.p9.a0"}

    assert await store.sweep(ended_groups) == 1
    assert [found.key for found in objects.list()] == [kept]
    await store.delete(kept)
    with pytest.raises(PayloadMissingError, match="is not there"):
        await store.get(kept)


async def test_payloads_wait_for_a_bucket_no_longer_than_told(world: ObjectWorld) -> None:
    store = ObjectPayloads(Objects(world.url, outage_seconds=0.0), max_bytes=100)
    world.door.shut()
    try:
        with pytest.raises(BusError, match=r"payloads: s3://.* cannot be written now"):
            await store.put("a", b"")
    finally:
        world.door.open()
