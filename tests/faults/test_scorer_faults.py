"""The scorer killed, its bus killed, its bus's memory wiped: everything is scored, and once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from redis.asyncio import Redis
from scoring_world import World, make_world, sample_group, until

from jackpot.bus import TrajectoryBus
from jackpot.bus.server import EmbeddedServer
from jackpot.config import JobSpec
from jackpot.errors import BusError, DeadlineError
from jackpot.process.service_process import STOPPED_EARLY
from jackpot.rpc.channel import open_channel, wait_ready
from jackpot.scorer.worker import ScorerWorker
from jackpot.trajectory import Group, GroupKey

pytestmark = pytest.mark.timeout(TEST_SECONDS)

JOB_ID = "job-1"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "server")
    await server.start()
    yield server
    await server.stop()


@asynccontextmanager
async def connected(server: EmbeddedServer, job: JobSpec, world: World, consumer: str) -> AsyncIterator[TrajectoryBus]:
    bus = await TrajectoryBus.connect(server.url, JOB_ID, job.bus, consumer, world.run_dir / "payloads")
    await bus.open()
    try:
        yield bus
    finally:
        await bus.close()


def copies(group: Group, slots: range) -> list[Group]:
    """The group under other ids: sampling is the slow part."""
    made = []
    for slot in slots:
        group_id = GroupKey(slot=slot, epoch=0, prompt_index=slot).group_id(JOB_ID)
        trajectories = tuple(
            replace(trajectory, trajectory_id=f"{group_id}#{index}")
            for index, trajectory in enumerate(group.trajectories)
        )
        made.append(replace(group, group_id=group_id, prompt_index=slot, trajectories=trajectories))
    return made


async def publish(bus: TrajectoryBus, groups: list[Group]) -> None:
    for group in groups:
        assert await bus.reserve(group.group_id, 1_000_000)
        assert await bus.publish(group) == "published"


class Processes:
    """Scorer processes of one run directory."""

    def __init__(self, world: World, job: JobSpec, redis_url: str, socket: str) -> None:
        (world.run_dir / "job.json").write_text(job.model_dump_json())
        self.address = socket
        self._environ = world.environment(redis_url=redis_url, listen=socket, threads=1).to_env()
        self._log = world.run_dir / "scorer.log"
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, **environ: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jackpot.scorer"],
                env={**os.environ, **self._environ, **environ},
                stdout=log,
                stderr=log,
            )
        self._running.append(process)
        return process

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def processes(world: World, server: EmbeddedServer) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory() as directory:  # a unix socket's path must be short
        job = world.job(scorer={"max_groups_per_batch": 1, "max_batch_tokens": 512}, bus={"lease_seconds": 60.0})
        processes = Processes(world, job, server.url, f"unix:{directory}/scorer.sock")
        yield processes
        processes.stop()


async def test_a_scorer_of_a_job_that_needs_none_says_so_and_ends(world: World, processes: Processes) -> None:
    job = world.job(scorer={"reuse_reference": True})
    (world.run_dir / "job.json").write_text(job.model_dump_json())
    assert await asyncio.to_thread(processes.start().wait, PATIENCE_SECONDS) == 2
    assert "error: scorer.reuse_reference = True: leaves the scores to the learner" in processes.log
    assert "Start none, or leave reuse_reference out." in processes.log


async def test_a_scorer_killed_while_scoring_is_restarted_and_scores_everything_once(
    world: World, server: EmbeddedServer, processes: Processes
) -> None:
    # Until the learner publishes, there is nothing to be ready with.
    published = world.run_dir / "weights"
    published.rename(world.run_dir / "not-yet")
    first = processes.start()
    async with open_channel(processes.address) as channel:
        await wait_ready(channel, "liveness", PATIENCE_SECONDS)
        with pytest.raises(DeadlineError, match="NOT_SERVING"):
            await wait_ready(channel, "readiness", 2.0)
        (world.run_dir / "not-yet").rename(published)
        await wait_ready(channel, "readiness", PATIENCE_SECONDS)

    groups = copies(sample_group(world, lengths=(100,) * 8, prompt_length=20), range(30))
    async with connected(server, world.job(), world, "test") as bus:
        await publish(bus, groups)

        async def some_are_scored() -> bool:
            return (await bus.readings.depths()).scored_waiting >= 3

        await until(some_are_scored, "the first scores")
        first.kill()
        first.wait()
        at_kill = await bus.readings.depths()
        assert at_kill.rollouts_pending > 0, "the kill was to meet it at work"
        assert at_kill.scored_waiting < len(groups)

        second = processes.start()
        times: dict[str, int] = {}

        async def all_are_scored() -> bool:
            for delivery in await bus.take_scored(50, 0.5):
                times[delivery.group_id] = times.get(delivery.group_id, 0) + 1
            return len(times) >= len(groups)

        await until(all_are_scored, "all groups to be scored")
        assert times == {group.group_id: 1 for group in groups}
        depths = await bus.readings.depths()
        assert (depths.rollouts_waiting, depths.rollouts_pending, depths.scored_waiting) == (0, 0, 0)
        assert (await bus.readings.ledger()).open == len(groups), "none was dropped"

    second.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(second.wait, PATIENCE_SECONDS) == 0, processes.log


async def test_settings_that_cannot_work_end_it_before_torch_loads(processes: Processes) -> None:
    missing = processes.start(JACKPOT_RUN_DIR="/nowhere")
    assert await asyncio.to_thread(missing.wait, PATIENCE_SECONDS) == 2
    assert "error: JACKPOT_RUN_DIR = '/nowhere'" in processes.log
    assert "Traceback" not in processes.log


async def test_it_outlives_its_bus_being_killed_and_its_state_being_lost(world: World, server: EmbeddedServer) -> None:
    job = world.job()
    engine = world.engine(job)
    await engine.refresh()
    stop = asyncio.Event()
    batches = [copies(sample_group(world), slots) for slots in (range(0, 4), range(4, 8), range(8, 12))]

    async with connected(server, job, world, "scorer-0") as own, connected(server, job, world, "test") as bus:
        worker = asyncio.create_task(ScorerWorker(job, own, engine, stop).run())
        found: set[str] = set()

        async def all_scored(groups: list[Group]) -> bool:
            try:
                found.update(delivery.group_id for delivery in await bus.take_scored(50, 0.5))
            except BusError:
                return False
            return found >= {group.group_id for group in groups}

        await publish(bus, batches[0])
        await until(lambda: all_scored(batches[0]), "the first groups")

        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await until(lambda: asyncio.sleep(0, server.poll() is not None), "the server to be dead")
        await server.start()
        await publish(bus, batches[1])
        await until(lambda: all_scored(batches[1]), "groups published after the server came back")

        async with Redis.from_url(server.url) as redis:
            await redis.flushall()
        await bus.open()
        await publish(bus, batches[2])
        await until(lambda: all_scored(batches[2]), "groups published after the state was lost")
        assert not worker.done()
        stop.set()
        await asyncio.wait_for(worker, PATIENCE_SECONDS)
    engine.close()


async def test_it_stops_although_the_bus_that_it_would_give_groups_back_to_is_gone(
    world: World, server: EmbeddedServer
) -> None:
    job = world.job(learner={"groups_per_batch": 1})
    engine = world.engine(job)
    await engine.refresh()
    stop = asyncio.Event()
    async with connected(server, job, world, "scorer-0") as own, connected(server, job, world, "test") as bus:
        await publish(bus, copies(sample_group(world), range(5, 6)))  # its version is to come
        worker = asyncio.create_task(ScorerWorker(job, own, engine, stop).run())

        async def taken() -> bool:
            return (await bus.readings.depths()).rollouts_pending == 1

        await until(taken, "the group to be taken")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await until(lambda: asyncio.sleep(0, server.poll() is not None), "the server to be dead")
        stop.set()
        await asyncio.wait_for(worker, PATIENCE_SECONDS)
    engine.close()


async def test_a_damaged_version_next_to_good_ones_does_not_stop_the_scoring(
    world: World, server: EmbeddedServer
) -> None:
    job = world.job(orchestrator={"max_staleness": 3}, learner={"groups_per_batch": 1})
    engine = world.engine(job)
    await engine.refresh()
    world.publish_policy(1)
    world.damage_policy(1)
    groups = copies(sample_group(world), range(2, 4))  # to be scored by versions 1 and 2, a batch earlier
    stop = asyncio.Event()
    async with connected(server, job, world, "scorer-0") as own, connected(server, job, world, "test") as bus:
        worker = asyncio.create_task(ScorerWorker(job, own, engine, stop).run())
        await publish(bus, groups[:1])
        (delivery,) = await until(lambda: bus.take_scored(4, 0.5), "scores by the old version, in its place")
        assert delivery.value.policy_version == 0 and engine.num_refused_versions >= 1
        world.publish_policy(2)
        await publish(bus, [replace(groups[1], dispatch_version=2)])
        (delivery,) = await until(lambda: bus.take_scored(4, 0.5), "scores by the next version")
        assert delivery.value.policy_version == 2
        stop.set()
        await asyncio.wait_for(worker, PATIENCE_SECONDS)
    engine.close()


async def test_a_scorer_of_two_ranks_follows_the_weights_and_is_restarted_whole_when_one_is_killed(
    world: World, server: EmbeddedServer, tmp_path: Path
) -> None:
    group = sample_group(world, lengths=(30,) * 4, prompt_length=10)
    scorer = {"max_groups_per_batch": 2, "processes": 2, "device": "cpu"}
    # Slots 0 to 6 are scored by version 0, slots 14 to 20 by version 1.
    job = world.job(
        scorer=scorer,
        bus={"lease_seconds": 60.0},
        orchestrator={"max_staleness": 2},
        learner={"groups_per_batch": 7},
    )
    with tempfile.TemporaryDirectory() as directory:
        processes = Processes(world, job, server.url, f"unix:{directory}/scorer.sock")
        try:
            first = processes.start()
            async with connected(server, job, world, "test") as bus:
                await publish(bus, copies(group, range(4)))
                assert await scored(bus, 4) == {slot: 0 for slot in range(4)}
                world.publish_policy(1)
                await publish(bus, [replace(one, dispatch_version=1) for one in copies(group, range(14, 18))])
                assert await scored(bus, 4) == {slot: 1 for slot in range(14, 18)}

                os.kill(ranks_of(first)[1], signal.SIGKILL)
                assert await asyncio.to_thread(first.wait, PATIENCE_SECONDS) == 128 + signal.SIGKILL, processes.log
                await publish(bus, copies(group, range(18, 21)))
                second = processes.start()
                assert await scored(bus, 3) == {slot: 1 for slot in range(18, 21)}
                second.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(second.wait, PATIENCE_SECONDS) == STOPPED_EARLY, processes.log
        finally:
            processes.stop()


async def scored(bus: TrajectoryBus, count: int) -> dict[int, int]:
    """The policy version that scored each slot, once so many are."""
    versions: dict[int, int] = {}

    async def all_are() -> bool:
        for delivery in await bus.take_scored(50, 0.5):
            versions[delivery.value.group.prompt_index] = delivery.value.policy_version
        return len(versions) >= count

    await until(all_are, f"{count} scored groups")
    return versions


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """The process ids of a scorer's ranks."""
    return {int(child.environ()["RANK"]): child.pid for child in psutil.Process(process.pid).children()}
