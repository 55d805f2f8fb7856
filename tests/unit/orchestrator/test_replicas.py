"""Replicas that are slow, full, broken, killed or restarted, as real gRPC servers."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import scripted_rollout
from patience import PATIENCE_SECONDS, TEST_SECONDS
from scripted_rollout import ScriptedRollout, start_scripted

from jackpot.errors import (
    DeadlineError,
    EngineError,
    QueueFullError,
    RequestRefusedError,
    UnsupportedSamplingError,
    WeightMissingError,
)
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.rpc.channel import open_channel
from jackpot.rpc.proto import ids_to_bytes
from jackpot.v1 import rollout_pb2

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture
def sockets():
    with tempfile.TemporaryDirectory() as directory:  # short paths: a unix socket's has at most 107 bytes
        yield Path(directory)


@asynccontextmanager
async def pool_of(addresses, attempts=3, timeout_seconds=PATIENCE_SECONDS) -> AsyncIterator[ReplicaPool]:
    pool = ReplicaPool(open_channel, addresses, attempts, timeout_seconds)
    try:
        watching = asyncio.create_task(pool.watch())
        try:
            yield pool
        finally:
            watching.cancel()
            await asyncio.wait([watching])
    finally:
        await pool.close()


@asynccontextmanager
async def serving(sockets, *servicers) -> AsyncIterator[list[str]]:
    addresses = [f"unix:{sockets}/{index}" for index in range(len(servicers))]
    servers = [await start_scripted(*pair) for pair in zip(addresses, servicers, strict=True)]
    yield addresses
    for server in servers:
        await server.stop(0)


def failing(*errors: Exception | None):
    """Fail the first calls with these errors, in turn."""
    left = list(errors)

    async def before(request):
        if left and (error := left.pop(0)) is not None:
            raise error

    return before


def request(name="g", min_version=0) -> rollout_pb2.GenerateRequest:
    sampling = rollout_pb2.SamplingParams(temperature=1.0, max_tokens=16, top_logprobs=2, seed=5)
    return rollout_pb2.GenerateRequest(
        group_id=name,
        prompt_token_ids=ids_to_bytes([3, 4]),
        num_trajectories=2,
        sampling=sampling,
        min_version=min_version,
    )


async def test_a_group_comes_back_as_it_was_sampled(sockets):
    replica = ScriptedRollout(lambda request, index: [5 + index, 1], version=lambda: 3)
    async with serving(sockets, replica) as addresses, pool_of(addresses) as pool:
        trajectories = await pool.generate(request(min_version=3))
    assert [t.token_ids.tolist() for t in trajectories] == [[5, 1], [6, 1]]
    assert [t.trajectory_id for t in trajectories] == ["g#0", "g#1"]
    assert [t.oldest_version for t in trajectories] == [3, 3]


async def test_the_least_loaded_replica_is_asked(sockets):
    release = asyncio.Event()

    async def wait(request):
        await release.wait()

    replicas = [ScriptedRollout(), ScriptedRollout()]
    for replica in replicas:
        replica.before = wait
    async with serving(sockets, *replicas) as addresses, pool_of(addresses) as pool:
        await both_ready(pool, replicas, release)
        for replica in replicas:
            replica.requests.clear()
        calls = [asyncio.create_task(pool.generate(request(str(index)))) for index in range(6)]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while sum(len(replica.requests) for replica in replicas) < 6:
                await asyncio.sleep(0.01)
        assert [len(replica.requests) for replica in replicas] == [3, 3]
        release.set()
        await asyncio.gather(*calls)


async def both_ready(pool, replicas, release) -> None:
    """Ask until both replicas have answered, so that the pool knows that both are there."""
    release.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not all(replica.requests for replica in replicas):
            await asyncio.gather(*(pool.generate(request("warm")) for _ in range(4)))
    release.clear()


@pytest.mark.parametrize("error", [EngineError("out of memory"), WeightMissingError("pruned"), RuntimeError("bug")])
async def test_a_failed_attempt_goes_to_another_replica_under_the_same_id(sockets, error):
    replicas = [ScriptedRollout(), ScriptedRollout()]
    replicas[0].before = replicas[1].before = failing(error)  # whichever is asked first
    async with serving(sockets, *replicas) as addresses, pool_of(addresses) as pool:
        assert len(await pool.generate(request("same"))) == 2
    asked = [len(replica.requests) for replica in replicas]
    assert sum(asked) == 2
    assert all(r.group_id == "same" for replica in replicas for r in replica.requests)


async def test_a_replica_that_has_not_failed_the_group_comes_before_an_idle_one_that_has(sockets):
    """The first fails the group and is ready again by the time the second fails it; the third is busy, but new."""
    first, second, busy = replicas = [ScriptedRollout() for _ in range(3)]
    go_on = asyncio.Event()
    async with serving(sockets, *replicas) as addresses, pool_of(addresses) as pool:

        async def wait(request):
            await go_on.wait()

        async def fail_once_all_are_ready(request):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while pool.num_ready < 3:
                    await asyncio.sleep(0.01)
            raise EngineError("second")

        await all_ready(pool)
        busy.before = wait
        others = [asyncio.create_task(pool.generate(request(f"other {index}"))) for index in range(3)]
        await asyncio.gather(*others[:2])  # one each: only the third's is still under way
        first.before, second.before = failing(EngineError("first")), fail_once_all_are_ready
        calling = asyncio.create_task(pool.generate(request("g")))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while sum(r.group_id == "g" for replica in replicas for r in replica.requests) < 3:
                await asyncio.sleep(0.01)
        go_on.set()
        assert len(await calling) == 2
        await others[2]
    assert [[r.group_id for r in replica.requests].count("g") for replica in replicas] == [1, 1, 1]


async def all_ready(pool) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while pool.num_ready < pool.num_wanted:
            await asyncio.sleep(0.01)


async def test_after_all_attempts_every_failure_is_named(sockets):
    replica = ScriptedRollout()
    replica.before = failing(EngineError("first"), EngineError("second"), EngineError("third"))
    async with serving(sockets, replica) as addresses, pool_of(addresses) as pool:
        with pytest.raises(EngineError, match=r"3 attempts failed: .*first; .*second; .*third"):
            await pool.generate(request())
        assert len(await pool.generate(request())) == 2


async def test_a_refused_request_is_not_tried_again(sockets):
    replica = ScriptedRollout()
    replica.before = failing(UnsupportedSamplingError("the prompt is longer than the context"))
    async with serving(sockets, replica) as addresses, pool_of(addresses) as pool:
        with pytest.raises(RequestRefusedError, match="longer than the context"):
            await pool.generate(request())
    assert len(replica.requests) == 1


async def test_a_full_queue_costs_time_and_no_attempt(sockets):
    replica = ScriptedRollout()
    replica.before = failing(*[QueueFullError(0.1)] * 4)
    async with serving(sockets, replica) as addresses, pool_of(addresses, attempts=1) as pool:
        started = time.monotonic()
        assert len(await pool.generate(request())) == 2
        assert time.monotonic() - started >= 0.4
    assert len(replica.requests) == 5


async def test_a_queue_that_stays_full_fails_in_the_end(sockets):
    replica = ScriptedRollout()
    replica.before = failing(*[QueueFullError(60.0)] * 10)
    async with serving(sockets, replica) as addresses, pool_of(addresses, attempts=2, timeout_seconds=0.5) as pool:
        with pytest.raises(EngineError, match=r"every replica's queue stayed full for 0\.5 s"):
            await pool.generate(request())
    assert len(replica.requests) == 1


async def test_answers_that_cannot_be_right_are_failures(sockets):
    replica = ScriptedRollout(version=lambda: 1)
    async with serving(sockets, replica) as addresses, pool_of(addresses, attempts=1) as pool:
        with pytest.raises(EngineError, match="sampled by version 1, older than 2"):
            await pool.generate(request(min_version=2))
        replica.complete = lambda request, index: []
        with pytest.raises(EngineError, match="has no tokens"):
            await pool.generate(request())


async def test_without_any_replica_the_wait_ends_with_its_name(sockets):
    async with pool_of([f"unix:{sockets}/none"], timeout_seconds=0.3) as pool:
        with pytest.raises(DeadlineError, match=r"waited 0\.3 s for a rollout replica to be ready \(unix:.*/none\)"):
            await pool.generate(request())


async def test_a_replica_that_comes_later_is_found(sockets):
    address = f"unix:{sockets}/late"
    async with pool_of([address]) as pool:
        waiting = asyncio.create_task(pool.generate(request()))
        await asyncio.sleep(0)
        server = await start_scripted(address, ScriptedRollout())
        assert len(await waiting) == 2
        await server.stop(0)


async def test_the_work_of_a_killed_replica_is_done_by_another(sockets):
    """kill -9 in the middle of a call; later the replica comes back and is asked again."""
    addresses = [f"unix:{sockets}/killed", f"unix:{sockets}/survivor"]
    survivor = ScriptedRollout()
    killed = await process(addresses[0])
    async with pool_of(addresses) as pool:
        assert (await pool.generate(request()))[0].token_ids.tolist() == [7, 1]
        killed.send_signal(signal.SIGSTOP)  # so that the call is surely under way when the process dies
        waiting = asyncio.create_task(pool.generate(request()))
        await asyncio.sleep(0)
        server = await start_scripted(addresses[1], survivor)
        killed.kill()
        await killed.communicate()
        assert len(await waiting) == 2
        assert [r.group_id for r in survivor.requests] == ["g"]

        await server.stop(0)
        again = await process(addresses[0])
        assert (await pool.generate(request()))[0].token_ids.tolist() == [7, 1]
        again.kill()
        await again.communicate()


async def process(address: str) -> asyncio.subprocess.Process:
    started = await asyncio.create_subprocess_exec(
        sys.executable, scripted_rollout.__file__, address, "7", stdout=asyncio.subprocess.PIPE
    )
    assert await started.stdout.readline() == f"ready {address}\n".encode()
    return started


async def test_cancelling_cancels_the_call(sockets):
    async def hang(request):
        await asyncio.sleep(600)

    replica = ScriptedRollout()
    replica.before = hang
    async with serving(sockets, replica) as addresses, pool_of(addresses) as pool:
        waiting = asyncio.create_task(pool.generate(request()))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not replica.requests:
                await asyncio.sleep(0.01)
            waiting.cancel()
            while not replica.cancelled:
                await asyncio.sleep(0.01)
        assert waiting.cancelled()
