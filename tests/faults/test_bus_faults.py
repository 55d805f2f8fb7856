"""Faults on the trajectory bus. After each: one terminal state per group, counters that add up, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zstandard
from bus_world import STORES, Job, bus_settings, eventually, ids, make_scored
from cutting_proxy import cutting_proxy
from patience import PATIENCE_SECONDS, TEST_SECONDS
from redis.asyncio import Redis

from jackpot.bus import Ledger, TrajectoryBus
from jackpot.bus.client import BusClient
from jackpot.bus.payload_format import encode_group, encode_scored
from jackpot.bus.payloads import FilePayloads
from jackpot.bus.server import EmbeddedServer
from jackpot.errors import BusError, BusLostError, LeaseLostError
from jackpot.trajectory import deferred

pytestmark = pytest.mark.timeout(TEST_SECONDS)

NUM_GROUPS = 30

T = TypeVar("T")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def job(store: str, valkey_url: str, tmp_path: Path) -> Job:
    return Job(valkey_url, store, tmp_path)


@pytest.fixture
async def own_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A server that this test may kill, fill and flush."""
    server = EmbeddedServer(tmp_path_factory.mktemp("own-server"))
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For sockets, whose paths must be short."""
    directory = Path(tempfile.mkdtemp(prefix="jp-"))
    yield directory
    shutil.rmtree(directory)


async def persist(call: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Repeat a call until the bus answers, as every service does."""
    while True:
        try:
            return await call(*args)
        except LeaseLostError:
            raise
        except BusError:
            await asyncio.sleep(0.01)


class Line:
    """Orchestrator, scorers and learner of one job, working until every group has ended."""

    def __init__(self, job: Job, num_groups: int = NUM_GROUPS) -> None:
        self.job = job
        self.groups = [job.group(slot) for slot in range(num_groups)]
        self.outcomes: Counter[str] = Counter()
        self.trained: list[str] = []  # as the learner saw them come
        self.progress = 0

    async def run(self) -> None:
        async with (
            self.job.connect("orchestrator") as a,
            # On a busy machine leases lapse by themselves; how often that may happen is not what is tested here.
            self.job.connect("0", max_attempts=1000) as b,
            self.job.connect("1", max_attempts=1000) as c,
            self.job.connect("0") as d,
        ):
            scorers = [asyncio.create_task(self._score(bus)) for bus in (b, c)]
            try:
                await asyncio.gather(self._dispatch(a), self._train(d))
            finally:
                for scorer in scorers:
                    scorer.cancel()
                await asyncio.gather(*scorers, return_exceptions=True)

    async def _dispatch(self, bus: TrajectoryBus) -> None:
        for group in self.groups:
            await persist(bus.reserve, group.group_id, 2000)
            self.job.dispatched.add(group.group_id)
            self.outcomes[await persist(bus.publish, group)] += 1

    async def _score(self, bus: TrajectoryBus) -> None:
        while True:
            for delivery in await persist(bus.take_groups, 4, 0.2):
                try:
                    await persist(bus.publish_scored, delivery, make_scored(delivery.value))
                except LeaseLostError:
                    self.outcomes["lease lost"] += 1

    async def _train(self, bus: TrajectoryBus) -> None:
        uncommitted: list[str] = []
        while len(set(self.trained)) < len(self.groups):
            deliveries = await persist(bus.take_scored, 4, 0.2)
            self.trained += ids(deliveries)
            uncommitted += ids(deliveries)
            self.progress = len(self.trained)
            if len(uncommitted) >= 8:
                await persist(bus.commit_trained, dict.fromkeys(uncommitted, 1))
                uncommitted = []
        # All of them once more, as after a restart: a server that was killed may have forgotten its last second.
        await persist(bus.commit_trained, dict.fromkeys(self.trained, 1))

    async def assert_all_trained(self) -> None:
        async with self.job.connect("late") as bus:
            await bus.close_job()
            ledger = await self.job.assert_closed(bus)
        assert ledger == Ledger(dispatched=len(self.groups), trained=len(self.groups))


# --- the server ---


async def test_the_server_is_killed_and_restarted_under_load(
    own_server: EmbeddedServer, store: str, tmp_path: Path
) -> None:
    line = Line(Job(own_server.url, store, tmp_path))
    running = asyncio.create_task(line.run())
    for kill_at in (3, 10, 17, 24):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while line.progress < kill_at and not running.done():
                await asyncio.sleep(0.001)
        assert own_server.pid is not None
        os.kill(own_server.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while own_server.poll() is None:
                await asyncio.sleep(0.001)
        await own_server.start()
    await asyncio.wait_for(running, PATIENCE_SECONDS)
    await line.assert_all_trained()
    assert sorted(set(line.trained)) == sorted(group.group_id for group in line.groups)


@pytest.mark.parametrize("cut_every", [2, 5])
async def test_cut_replies_duplicate_and_lose_nothing(job: Job, short_directory: Path, cut_every: int) -> None:
    server_url = job.url
    async with cutting_proxy(server_url, short_directory / "s", cut_every) as proxy:
        job.url = proxy.url
        line = Line(job, num_groups=16)
        await asyncio.wait_for(line.run(), PATIENCE_SECONDS)
        assert proxy.num_cuts > 10
    job.url = server_url
    async with Redis.from_url(server_url) as redis:
        for stream in ("rollouts", "scored"):
            assert (await redis.xinfo_stream(f"jackpot:{{{job.job_id}}}:{stream}"))["entries-added"] == len(line.groups)
    # A group may be scored, even trained, before its publisher hears of it: it is told of a duplicate, and goes on.
    assert sum(line.outcomes[outcome] for outcome in ("published", "duplicate", "terminal")) == len(line.groups)
    assert len(line.trained) == len(line.groups)  # each delivered once
    await line.assert_all_trained()


async def test_a_call_whose_reply_is_cut_succeeds_as_if_it_were_not(job: Job, short_directory: Path) -> None:
    server_url = job.url
    async with cutting_proxy(server_url, short_directory / "s") as proxy:
        job.url = proxy.url
        async with job.connect(lease_seconds=60) as bus:

            async def cut(call: Awaitable[T]) -> T:
                cuts = proxy.num_cuts
                proxy.cut_next = True
                result = await call
                assert proxy.num_cuts == cuts + 1
                return result

            group = job.group(0)
            job.dispatched.add(group.group_id)
            assert await cut(bus.reserve(group.group_id, 3000))
            assert (await bus.readings.depths()).bytes_used == 3000
            assert await cut(bus.publish(group)) == "published"
            (delivery,) = await cut(bus.take_groups(1, 1.0))
            assert delivery.attempt == 1
            await cut(bus.fail(delivery, "scoring_failed"))
            (delivery,) = await cut(bus.take_groups(1, 1.0))
            assert delivery.attempt == 2
            await cut(bus.release([delivery]))
            (delivery,) = await bus.take_groups(1, 1.0)
            assert delivery.attempt == 2
            assert await cut(bus.renew()) == []
            await cut(bus.publish_scored(delivery, make_scored(delivery.value)))
            (ready,) = await cut(bus.take_scored(1, 1.0))
            assert await bus.take_scored(1, 0.05) == []
            assert await cut(bus.commit_trained({ready.group_id: 1})) == []
            straight = deferred(job.group(1), 5)
            job.dispatched.add(straight.group_id)
            assert await bus.reserve(straight.group_id, 3000)
            assert await cut(bus.publish_deferred(straight)) == "published"
            depths = await bus.readings.depths()
            assert (depths.scored_waiting, depths.bytes_used < 3000) == (1, True)
            (ready,) = await cut(bus.take_scored(1, 1.0))
            assert ready.group_id == straight.group_id
            assert await cut(bus.commit_trained({ready.group_id: 2})) == []
            assert await cut(bus.open()) is False
    job.url = server_url
    async with job.connect() as bus:
        assert await job.assert_closed(bus) == Ledger(dispatched=2, trained=2)


async def test_a_flushed_server_is_noticed_by_everyone_and_begun_anew(
    own_server: EmbeddedServer, store: str, tmp_path: Path
) -> None:
    job = Job(own_server.url, store, tmp_path)
    async with job.connect("0") as bus, job.connect("1") as other:
        done, held, *_ = await job.publish_scored(bus, 0, 1)
        await job.publish(bus, 2, 3)
        await bus.take_scored(2, 1.0)
        await bus.commit_trained({done: 1})
        blocked = asyncio.create_task(other.take_scored(1, PATIENCE_SECONDS))
        await asyncio.sleep(0)
        async with Redis.from_url(job.url) as redis:
            await redis.flushall()
        with pytest.raises(BusLostError):
            await blocked
        with pytest.raises(BusLostError):
            await bus.readings.dispatched()
        assert await bus.open() is True
        assert await other.open() is False
        assert await bus.readings.dispatched() == {}
        # What the services' own records know goes back into the ledger; the rest is dispatched again.
        await bus.commit_trained({done: 1})
        await bus.drop(held, "lost", "the server was flushed")
        job.dispatched = {done, held}
        await job.publish(bus, 4)
        assert ids(await other.take_groups(1, 1.0)) == [job.group(4).group_id]
        assert await bus.close_job() == 1
        ledger = await job.assert_closed(bus)
        assert ledger == Ledger(dispatched=3, trained=1, dropped={"lost": 1, "unused": 1})


async def test_a_server_out_of_memory_refuses_whole_publications_and_can_be_emptied(
    own_server: EmbeddedServer, tmp_path: Path
) -> None:
    job = Job(own_server.url, "redis", tmp_path)
    async with job.connect() as bus, Redis.from_url(job.url) as redis:
        await job.publish(bus, 0)
        (held,) = await bus.take_groups(1, 1.0)
        await bus.reserve(job.group(1).group_id, 2000)
        await redis.config_set("maxmemory", 1)
        with pytest.raises(BusError, match=r"refused a command: .*maxmemory"):
            await bus.publish(job.group(1))
        with pytest.raises(BusError, match="maxmemory"):
            await bus.publish_scored(held, make_scored(held.value))
        assert set((await bus.readings.dispatched()).values()) == {"published", "dispatched"}
        assert await bus.renew() == []
        job.dispatched.add(job.group(1).group_id)
        await bus.drop(job.group(1).group_id, "lost")
        await redis.config_set("maxmemory", 0)
        await bus.publish_scored(held, make_scored(held.value))
        await bus.close_job()
        ledger = await job.assert_closed(bus)
        assert ledger == Ledger(dispatched=2, trained=0, dropped={"lost": 1, "unused": 1})


async def test_a_bus_that_is_closed_while_a_given_up_call_is_under_way_keeps_no_connection(
    own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The caller is cancelled, its script is not; when its connection goes, it would be sent again over a new one."""
    job = Job(own_server.url, "redis", tmp_path)
    async with Redis.from_url(job.url) as redis:
        before = (await redis.info("clients"))["connected_clients"]
        async with job.connect() as bus:
            await redis.client_pause(500, all=True)
            calling = asyncio.create_task(bus.set_value("name", "value"))
            await asyncio.wait([calling], timeout=0.1)  # sent, and not answered for as long as the server pauses
            calling.cancel()
            await asyncio.wait([calling])
        assert calling.cancelled()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in tasks if "_run_rounds" in str(task)]

        async def no_other_is_left() -> bool:
            return int((await redis.info("clients"))["connected_clients"]) == before

        await eventually(no_other_is_left, "the bus's connections to be closed")
        assert bus is not None  # nor were they closed by the garbage collector


# --- payloads ---


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _sealed_bomb(whole: bytes) -> bytes:
    """A frame that claims a gigabyte, under a right checksum."""
    frame = zstandard.compress(bytes(64 << 20), 1)
    head = struct.pack("<4sBBBxQ", b"JKPT", 1, whole[5], 1, 64 << 20)
    return head + struct.pack("<I", zlib.crc32(frame, zlib.crc32(head))) + frame


def _of_another_schema(whole: bytes) -> bytes:
    head = whole[:4] + b"\x63" + whole[5:16]
    return head + struct.pack("<I", zlib.crc32(whole[20:], zlib.crc32(head))) + whole[20:]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "corrupt": (_flipped, "checksum mismatch"),
    "truncated": (lambda data: data[:-7], "checksum mismatch"),
    "empty": (lambda data: b"", "truncated: 0 bytes"),
    "oversized": (lambda data: data + bytes(1 << 20), "more than bus.max_payload_bytes allows"),
    "bomb": (_sealed_bomb, "oversized: 67108864 bytes"),
    "schema": (_of_another_schema, "schema version 99"),
}


async def _replace_payload(job: Job, group_id: str, change: Callable[[bytes], bytes] | None) -> None:
    """Damage the stored payload of a group; None removes it."""
    async with Redis.from_url(job.url) as redis:
        tag = f"jackpot:{{{job.job_id}}}:"
        name = (await redis.hget(f"{tag}payloads", group_id)).decode()
        if job.store == "file":
            path = job.payload_dir / name
            path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
        elif change is None:
            await redis.hdel(f"{tag}payload:{group_id}", name)
        else:
            whole = await redis.hget(f"{tag}payload:{group_id}", name)
            await redis.hset(f"{tag}payload:{group_id}", name, change(whole))


@pytest.mark.parametrize("stage", ["rollout", "scored"])
async def test_unreadable_payloads_are_dead_lettered_and_their_neighbours_survive(job: Job, stage: str) -> None:
    expected: dict[str, tuple[str, str]] = {}
    async with job.connect(max_payload_bytes=100_000) as bus:
        publish = job.publish if stage == "rollout" else job.publish_scored
        group_ids = await publish(bus, *range(2 * len(DAMAGES) + 3))
        bad = iter(group_ids[1::2])
        for change, message in DAMAGES.values():
            group_id = next(bad)
            await _replace_payload(job, group_id, change)
            expected[group_id] = ("corrupt_payload", message)
        missing = next(bad)
        await _replace_payload(job, missing, None)
        expected[missing] = ("lost", "")
        swapped = group_ids[0]
        encode = encode_group(job.group(99)) if stage == "rollout" else encode_scored(make_scored(job.group(99)))
        await _replace_payload(job, swapped, lambda _: encode)
        expected[swapped] = ("corrupt_payload", "holds group")

        survivors = [group_id for group_id in group_ids if group_id not in expected]
        if stage == "rollout":
            taken = await bus.take_groups(len(group_ids), 1.0)
            for delivery in taken:
                await bus.publish_scored(delivery, make_scored(delivery.value))
        else:
            taken = await bus.take_scored(len(group_ids), 1.0)
        assert ids(taken) == survivors
        await bus.commit_trained(dict.fromkeys(survivors, 1))
        ledger = await job.assert_closed(bus)
        assert ledger.dropped == {"corrupt_payload": len(DAMAGES) + 1, "lost": 1}
        for _, record in await bus.readings.read_terminal("", 100):
            if record.group_id in expected:
                reason, message = expected[record.group_id]
                assert record.reason == reason
                assert message in record.detail


async def test_fetching_passes_over_unreadable_groups(job: Job) -> None:
    async with job.connect() as bus:
        good, bad = await job.publish_scored(bus, 0, 1)
        await _replace_payload(job, bad, _flipped)
        assert list(await bus.fetch_scored([good, bad])) == [good]


async def test_payloads_left_by_a_crash_are_swept(valkey_url: str, tmp_path: Path) -> None:
    job = Job(valkey_url, "file", tmp_path)
    async with job.connect() as bus:
        ended, still_open = await job.publish(bus, 0, 1)
        await bus.drop(ended, "stale")
        # A writer that died between its payload and its claim, and one that died while writing.
        (tmp_path / f"{ended}.scored.abc").write_bytes(b"orphan")
        (tmp_path / f"{still_open}.rollout.abc.tmp").write_bytes(b"half")
        foreign = tmp_path / "other-job.s0.e0.p0.a0.rollout.abc"
        foreign.write_bytes(b"not ours")
        async with job.connect():
            assert not (tmp_path / f"{ended}.scored.abc").exists()
            assert len(await bus.take_groups(1, 1.0)) == 1
        await bus.close_job()
        foreign.unlink()
        await job.assert_closed(bus)


# --- consumers ---


async def test_two_scorers_race_for_expired_leases_and_each_group_counts_once(job: Job) -> None:
    """Both hold everything in turn and never renew, as under a clock that jumps."""
    async with job.connect("0", max_attempts=1000) as a, job.connect("1", max_attempts=1000) as b:
        await job.publish(a, *range(8))
        lost = 0
        published: list[str] = []

        async def score(bus: TrajectoryBus) -> None:
            nonlocal lost
            while len(published) < 8:
                for delivery in await bus.take_groups(3, 0.05):
                    await asyncio.sleep(random.Random(delivery.entry_id).choice((0.0, 0.35)))
                    try:
                        await bus.publish_scored(delivery, make_scored(delivery.value))
                        published.append(delivery.group_id)
                    except LeaseLostError:
                        lost += 1

        await asyncio.wait_for(asyncio.gather(score(a), score(b)), PATIENCE_SECONDS)
        deliveries = await a.take_scored(20, 1.0)
        assert sorted(ids(deliveries)) == sorted(job.dispatched) == sorted(published)
        await a.commit_trained(dict.fromkeys(published, 1))
        assert (await job.assert_closed(a)).trained == 8


class HeldBackPayloads(FilePayloads):
    """Stalls its reader between the claim and the payload."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, max_bytes=1 << 20)
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def get(self, name: str) -> bytes:
        self.reached.set()
        await self.go_on.wait()
        return await super().get(name)


async def test_a_scorer_that_stalls_before_reading_does_not_drop_what_another_has_scored(
    valkey_url: str, tmp_path: Path
) -> None:
    job = Job(valkey_url, "file", tmp_path)
    store = HeldBackPayloads(tmp_path)
    stalled = TrajectoryBus(BusClient(job.url, job.job_id), store, bus_settings("file"), job.job_id, "stalled")
    await stalled.open()
    async with job.connect("quick") as quick:
        (group_id,) = await job.publish(quick, 0)
        taking = asyncio.create_task(stalled.take_groups(1, 0.1))
        await asyncio.wait_for(store.reached.wait(), PATIENCE_SECONDS)
        (delivery,) = await quick.take_groups(1, PATIENCE_SECONDS)
        await quick.publish_scored(delivery, make_scored(delivery.value))
        store.go_on.set()
        assert await asyncio.wait_for(taking, PATIENCE_SECONDS) == []
        assert await quick.readings.dispatched() == {group_id: "scored"}
        await quick.commit_trained({group_id: 1})
        await job.assert_closed(quick)
    await stalled.close()


SCORER = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from bus_world import bus_settings, make_scored
from jackpot.bus import TrajectoryBus

async def main(url, job_id, store, payload_dir):
    bus = await TrajectoryBus.connect(url, job_id, bus_settings(store), "0", Path(payload_dir))
    await bus.open()
    empty = 0  # one alone may be a group that ended there and then
    while empty < 2:
        deliveries = await bus.take_groups(4, 0.5)
        empty = 0 if deliveries else empty + 1
        for delivery in deliveries:
            if delivery.value.slot == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        for delivery in deliveries:
            await bus.publish_scored(delivery, make_scored(delivery.value))

asyncio.run(main(*sys.argv[1:5]))
"""


async def test_a_group_that_kills_its_scorers_ends_alone(valkey_url: str, tmp_path: Path) -> None:
    """Slot 2 kills whoever looks at its batch; its neighbours in that batch are tried with it once, then apart."""
    job = Job(valkey_url, "file", tmp_path)
    async with job.connect("learner") as bus:
        group_ids = await job.publish(bus, *range(8))
        command = [sys.executable, "-c", SCORER, job.url, job.job_id, job.store, str(tmp_path)]
        statuses = []
        for _ in range(6):
            process = subprocess.Popen([*command, str(Path(__file__).parents[1])])
            statuses.append(await asyncio.to_thread(process.wait, PATIENCE_SECONDS))
            if statuses[-1] == 0:
                break
        assert statuses == [-signal.SIGKILL] * 3 + [0]
        poison = group_ids.pop(2)
        assert sorted(ids(await bus.take_scored(20, 1.0))) == sorted(group_ids)
        assert await bus.readings.terminal_states([poison]) == {poison: "dropped:scoring_failed"}
        await bus.commit_trained(dict.fromkeys(group_ids, 1))
        ledger = await job.assert_closed(bus)
        assert ledger == Ledger(dispatched=8, trained=7, dropped={"scoring_failed": 1})
        (record,) = [r for _, r in await bus.readings.read_terminal("", 100) if r.state == "dropped"]
        assert record.detail == "taken 3 times and never finished"
