"""The orchestrator against a real bus, real gRPC servers and a real weight store; only the models are scripted."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from scripted_rollout import ScriptedRollout, start_scripted

from jackpot.bus import TrajectoryBus
from jackpot.bus.server import EmbeddedServer
from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import BusLostError, DeadlineError, EngineError, JobFailedError
from jackpot.orchestrator.service import serve
from jackpot.process.service_process import STOPPED_EARLY
from jackpot.storage.batch_manifests import Manifest, ManifestLog
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.weights import WeightStore
from jackpot.trajectory import DEFERRED, Group, GroupKey, ScoredGroup, TokenScores

pytestmark = pytest.mark.timeout(TEST_SECONDS)

JOB_ID = "job-1"
DIGIT_0 = 3  # id of "0" in the tiny tokenizer; 1 ends a sequence


def right_answer(request) -> list[int]:
    """The complement of the six digits of a prompt ``999999-381592=``."""
    digits = np.frombuffer(request.prompt_token_ids, dtype="<u4")[7:13]
    return [int(2 * DIGIT_0 + 9 - digit) for digit in digits]


def mostly_right(request, index: int) -> list[int]:
    return [*right_answer(request), 1] if (request.sampling.seed + index) % 4 else [DIGIT_0, 1]


class World:
    """A run directory, the bus's server, two rollout replicas and an evaluator, and a learner without a model."""

    def __init__(self, run_dir: Path, sockets: Path, server: EmbeddedServer, job: JobSpec) -> None:
        self.run_dir = run_dir
        self.server = server
        self.job = job
        self.store = WeightStore(run_dir / "weights")
        self.replicas = [ScriptedRollout(mostly_right, self.version) for _ in range(2)]
        self.evaluator = ScriptedRollout(mostly_right, self.version)
        self.addresses = [f"unix:{sockets}/{name}" for name in ("0", "1", "evaluator")]
        self.groups: list[Group] = []  # as the scorer takes them
        self.scored: list[ScoredGroup] = []  # as the learner takes them
        self.trained: list[list[str]] = []  # ids by batch
        self.staleness: list[int] = []
        (run_dir / "job.json").write_text(job.model_dump_json())

    @property
    def environment(self) -> ServiceEnvironment:
        return ServiceEnvironment(
            run_dir=self.run_dir,
            job_id=JOB_ID,
            redis_url=self.server.url,
            rollout_addresses=tuple(self.addresses[:2]),
            evaluator_address=self.addresses[2],
        )

    def version(self) -> int:
        manifest = self.store.latest("policy")
        return -1 if manifest is None else manifest.version

    def publish(self, version: int) -> None:
        for role in ("policy", "actor"):
            self.store.publish(role, version, lambda path: (path / "model.safetensors").write_bytes(b"w"), {})

    async def connect(self, consumer: str) -> TrajectoryBus:
        bus = await TrajectoryBus.connect(
            self.server.url, JOB_ID, self.job.bus, consumer=consumer, payloads=self.run_dir / "payloads"
        )
        await bus.open()
        return bus

    async def learn(self) -> None:
        """Score and "train" batch after batch, as scorer and learner do on the bus."""
        bus = await self.connect("learner")
        self.publish(max(0, self.version()))
        held: dict[int, ScoredGroup] = {}
        try:
            while len(self.trained) < self.job.num_batches:
                try:
                    await self.learn_some(bus, held)
                except BusLostError:
                    held.clear()
                    await bus.open()
                    for batch in range(len(self.trained)):
                        await self.commit(bus, batch)
        finally:
            await bus.close()

    async def learn_some(self, bus: TrajectoryBus, held: dict[int, ScoredGroup]) -> None:
        for delivery in await bus.take_groups(16, 0.02):
            self.groups.append(delivery.value)
            await bus.publish_scored(delivery, scored(delivery.value))
        for delivery in await bus.take_scored(16, 0.02):
            self.scored.append(delivery.value)
            held[delivery.value.group.slot] = delivery.value
        size = self.job.learner.groups_per_batch
        slots = range(len(self.trained) * size, (len(self.trained) + 1) * size)
        if all(slot in held for slot in slots):
            await self.train(bus, [held.pop(slot) for slot in slots])

    async def train(self, bus: TrajectoryBus, batch: list[ScoredGroup]) -> None:
        number, updates = len(self.trained), self.job.learner.updates_per_batch
        self.staleness += [number * updates - group.group.oldest_version for group in batch]
        group_ids = [group.group_id for group in batch]
        manifests = ManifestLog(RunFiles(self.run_dir).manifests)
        manifests.write(Manifest(number, number * updates, tuple(group_ids)))
        self.trained.append(group_ids)
        self.publish((number + 1) * updates)
        await self.commit(bus, number)

    async def commit(self, bus: TrajectoryBus, batch: int) -> None:
        step = (batch + 1) * self.job.learner.updates_per_batch
        assert await bus.commit_trained(dict.fromkeys(self.trained[batch], step)) == []

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ledger(self) -> dict[str, str]:
        return {row["group_id"]: row["reason"] or row["state"] for row in self.rows("ledger.jsonl")}


def scored(group: Group) -> ScoredGroup:
    def scores(n: int) -> TokenScores:
        zeros, ones = np.zeros(n, np.float32), np.ones(n, np.float32)
        return TokenScores(
            target_logprobs=-ones,
            acceptance_probs=ones,
            mask=np.ones(n, np.bool_),
            normalizer_head=ones,
            normalizer_tail=zeros,
            topk_mass=ones,
        )

    return ScoredGroup(
        group=group,
        scores=tuple(scores(t.num_tokens) for t in group.trajectories),
        obrs_lambda=1.0,
        policy_version=0,
        normalizer="tail",
    )


def job_of(model: Path, **sections: Any) -> JobSpec:
    return parse_job(
        {
            "policy": {"model": str(model)},
            "actor": {"model": str(model)},
            "task": {"name": "complement", "params": {"prompts": 50}},
            "sampling": {"group_size": 3, "max_tokens": 8},
            "rollout": {"top_logprobs": 2},
            "learner": {"steps": 4, "groups_per_batch": 4},
            "orchestrator": {"generate_timeout_seconds": PATIENCE_SECONDS},
            "evaluation": {"every": 2, "prompts": 6, "timeout_seconds": PATIENCE_SECONDS},
            **sections,
        }
    )


@pytest.fixture
def unregistered():
    """Several orchestrators in one process: each brings its own metrics."""
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


@pytest.fixture
def make_world(tmp_path, make_model, unregistered):
    @asynccontextmanager
    async def make(**sections: Any) -> AsyncIterator[World]:
        with tempfile.TemporaryDirectory() as sockets:
            server = EmbeddedServer(tmp_path / "redis")
            await server.start()
            run_dir = tmp_path / "run"
            run_dir.mkdir()
            world = World(run_dir, Path(sockets), server, job_of(make_model(), **sections))
            servicers = [*world.replicas, world.evaluator]
            servers = [await start_scripted(*pair) for pair in zip(world.addresses, servicers, strict=True)]
            try:
                yield world
            finally:
                for rpc_server in servers:
                    await rpc_server.stop(0)
                await server.stop()

    return make


async def run(world: World, timeout_seconds: float = PATIENCE_SECONDS) -> int:
    """Orchestrator and learner side by side, to the end of the job."""
    async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as tasks:
        tasks.create_task(world.learn())
        return await serve(world.environment, world.job, asyncio.Event())


@asynccontextmanager
async def beside(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something while the body runs; it must have succeeded at the end."""
    task = asyncio.create_task(coroutine)
    try:
        yield
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], bool], what: str, timeout_seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_seconds} s for {what}")
        await asyncio.sleep(0.01)


async def assert_ledger_adds_up(world: World) -> None:
    bus = await world.connect("check")
    counters = await bus.readings.ledger()
    await bus.close()
    ledger = Counter(world.ledger().values())
    assert counters.open == 0
    assert counters.trained == ledger.pop("trained") == world.job.num_groups
    assert counters.dropped == ledger
    assert counters.dispatched == counters.trained + sum(ledger.values())
    slots = [GroupKey.parse(group_id).slot for batch in world.trained for group_id in batch]
    assert slots == list(range(world.job.num_groups))


REUSES = {"scorer": {"reuse_reference": True}}


@pytest.mark.parametrize("sections", [{}, REUSES], ids=["scored", "straight to the learner"])
@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_a_job_from_its_first_evaluation_to_its_last(make_world, staleness, sections):
    async with make_world(orchestrator={"max_staleness": staleness}, **sections) as world:
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
        assert set(world.ledger().values()) == {"trained"}
        assert max(world.staleness) <= staleness
        assert min(world.staleness) >= 0

        rows = world.rows("evaluations.jsonl")
        assert (rows[0]["step"], rows[-1]["step"]) == (0, 4)
        if staleness == 0:  # training waits: timing does not decide what is evaluated
            assert [(row["step"], row["newest_step"]) for row in rows] == [(0, 0), (2, 2), (4, 4)]
        # Six prompts, the same seeds at every step: the same samples from the same script.
        rewards = [mostly_right(request, 0) != [DIGIT_0, 1] for request in world.evaluator.requests[:6]]
        assert [row["policy_accuracy"] for row in rows] == [np.mean(rewards)] * len(rows)
        assert [row["mean_reward"] for row in rows] == [np.mean(rewards)] * len(rows)
        assert [row["pass_at_n"] for row in rows] == [np.mean(rewards)] * len(rows)  # one sample a prompt
        assert {(row["num_prompts"], row["num_samples"], row["num_reward_failures"]) for row in rows} == {(6, 6, 0)}
        accuracy = np.mean(rewards)
        assert [row["accuracy_stderr"] for row in rows] == pytest.approx(
            [math.sqrt(accuracy * (1 - accuracy) / 5)] * len(rows), rel=1e-12
        )
        assert {row["comparable"] for row in rows} == {True}
        assert rows[0]["mean_tokens"] == np.mean([7 if right else 2 for right in rewards])
        assert rows[0]["truncated_fraction"] == 0.0
        prompts = [request.prompt_token_ids for request in world.evaluator.requests]
        assert Counter(prompts) == dict.fromkeys(prompts[:6], len(rows))
        trained_on = {request.prompt_token_ids for replica in world.replicas for request in replica.requests}
        assert not trained_on & set(prompts)


async def test_groups_carry_rewards_prompts_and_versions(make_world):
    async with make_world() as world:
        assert await run(world) == 0
        groups = world.groups
    assert len(groups) == 16
    requests = {r.group_id: r for replica in world.replicas for r in replica.requests}
    for group in groups:
        request = requests[group.group_id]
        assert group.prompt_token_ids.tobytes() == request.prompt_token_ids
        assert [t.token_ids.tolist() for t in group.trajectories] == [mostly_right(request, i) for i in range(3)]
        assert [t.reward for t in group.trajectories] == [
            float(t.token_ids.tolist() == [*right_answer(request), 1]) for t in group.trajectories
        ]
        assert request.min_version == max(0, group.slot // 4 - 1) <= group.dispatch_version
        assert list(request.sampling.stop_token_ids) == [1]
        assert (request.sampling.max_tokens, request.sampling.top_logprobs, request.num_trajectories) == (8, 2, 3)
    assert len({r.sampling.seed for r in requests.values()}) == 16


@pytest.mark.parametrize("correction", ["jackpot", "tis"])
async def test_where_no_scorer_runs_the_learner_gets_the_groups_at_once(make_world, correction):
    async with make_world(**REUSES, algorithm={"correction": correction}) as world:
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
    assert world.groups == []  # as scorers take them
    requests = {r.group_id: r for replica in world.replicas for r in replica.requests}
    assert len(world.scored) == 16
    for scored in world.scored:
        group, request = scored.group, requests[scored.group_id]
        assert (scored.normalizer, scored.obrs_lambda) == (DEFERRED, 0.0)
        assert group.dispatch_version <= scored.policy_version <= group.slot // 4
        assert [t.token_ids.tolist() for t in group.trajectories] == [mostly_right(request, i) for i in range(3)]
        assert {t.reward for t in group.trajectories} <= {0.0, 1.0}
        assert all((t.topk_ids is None) == (correction == "tis") for t in group.trajectories)


async def test_a_group_that_does_not_fit_the_policy_never_comes_to_the_learner(make_world):
    async with make_world(**REUSES) as world:
        foreign: set[str] = set()

        def some_foreign(request, index):
            if GroupKey.parse(request.group_id).prompt_index % 5:
                return mostly_right(request, index)
            foreign.add(request.group_id)
            return [49, 1]  # the tiny model has 49 ids

        for replica in world.replicas:
            replica.complete = some_foreign
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
        dropped = {row["group_id"]: row for row in world.rows("ledger.jsonl") if row["state"] == "dropped"}
        assert foreign and dropped.keys() == foreign
        for group_id, row in dropped.items():
            assert row["reason"] == "rollout_failed"
            assert row["detail"] == (
                f"PayloadError: trajectory {group_id}#0: it has no tokens, or ids beyond the vocabulary, 49."
            )


async def test_every_drop_gives_its_slot_away_and_is_accounted_for(make_world):
    algorithm = {"advantage": {"filter_zero_variance": True}}
    async with make_world(orchestrator={"attempts": 2}, algorithm=algorithm) as world:
        broken: set[str] = set()

        async def fail_every_fifth_prompt(request):
            if GroupKey.parse(request.group_id).prompt_index % 5 == 0:
                broken.add(request.group_id)
                raise EngineError("this prompt cannot be sampled")

        for replica in world.replicas:
            replica.before = fail_every_fifth_prompt
        assert await run(world) == 0
        await assert_ledger_adds_up(world)

        ledger = world.ledger()
        assert {group_id for group_id, end in ledger.items() if end == "rollout_failed"} == broken
        requests = {r.group_id: r for replica in world.replicas for r in replica.requests if r.group_id not in broken}
        equal = {
            group_id
            for group_id, request in requests.items()
            if len({tuple(mostly_right(request, index)) for index in range(3)}) == 1
        }
        assert equal
        assert broken
        assert {group_id for group_id, end in ledger.items() if end == "zero_variance"} == equal
        asked = Counter(r.group_id for replica in world.replicas for r in replica.requests)
        assert {asked[group_id] for group_id in broken} == {2}


async def test_a_group_bears_the_version_at_its_dispatch_however_long_it_takes(make_world):
    """The second batch is dispatched at version 0 and sampled only once the third is dispatched, at version 1."""
    async with make_world(orchestrator={"max_staleness": 1}) as world:

        async def wait_for_the_third_batch(request):
            if GroupKey.parse(request.group_id).slot in range(4, 8):
                seen = [r for replica in world.replicas for r in replica.requests]
                while not any(GroupKey.parse(r.group_id).slot >= 8 for r in seen):
                    await asyncio.sleep(0.01)
                    seen = [r for replica in world.replicas for r in replica.requests]

        for replica in world.replicas:
            replica.before = wait_for_the_third_batch
        assert await run(world) == 0
    assert {group.slot: group.dispatch_version for group in world.groups if group.slot < 8} == dict.fromkeys(
        range(8), 0
    )


async def test_groups_dropped_by_others_are_replaced(make_world):
    async with make_world() as world:
        bus = await world.connect("meddler")

        async def meddle():
            await until(lambda: any(replica.requests for replica in world.replicas), "a first request")
            (first, *_) = [r.group_id for replica in world.replicas for r in replica.requests]
            await bus.drop(first, "scoring_failed", "by the test")

        async with beside(meddle()):
            assert await run(world) == 0
        await bus.close()
        await assert_ledger_adds_up(world)
        assert Counter(world.ledger().values()) == {"trained": 16, "scoring_failed": 1}


async def test_dispatch_holds_while_the_budget_is_spent_and_still_finishes(make_world, caplog):
    # Room for about two groups, and four are needed for a batch.
    async with make_world(bus={"max_bytes": 150_000}, orchestrator={"max_staleness": 3}) as world:
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
        # Groups of the batch that is being filled pass over the budget, in the same look in which others are refused.
        holds = [record for record in caplog.records if record.getMessage().startswith("dispatch holds")]
        assert holds and min(record.slot for record in holds) >= 4
        (record,) = (world.run_dir / "activity").glob("orchestrator-*.json")
        assert json.loads(record.read_text())["seconds"]["wait_bus_budget"] > 0


async def test_a_job_whose_groups_all_fail_says_so(make_world):
    # One at a time, so that each failure is counted before the next group is asked for.
    async with make_world(orchestrator={"attempts": 1, "max_in_flight_groups": 1}) as world:

        async def fail(request):
            raise EngineError("out of memory")

        for replica in world.replicas:
            replica.before = fail
        world.publish(0)
        with pytest.raises(JobFailedError, match=r"16 groups in a row failed, the last one: .*out of memory"):
            async with asyncio.timeout(PATIENCE_SECONDS):
                await serve(world.environment, world.job, asyncio.Event())
        assert set(world.ledger().values()) == {"rollout_failed"}
        assert sum(len(replica.requests) for replica in world.replicas) == 16


async def test_without_weights_the_wait_has_an_end(make_world):
    async with make_world(run={"startup_timeout_seconds": 0.3}) as world:
        with pytest.raises(DeadlineError, match=r"waited 0\.3 s for version 0 of the actor's weights"):
            await serve(world.environment, world.job, asyncio.Event())


async def test_a_failing_evaluation_is_skipped_but_the_first_and_last_are_not(make_world):
    async with make_world() as world:
        calls = Counter()

        async def fail_in_the_middle(request):
            calls[request.min_version] += 1
            if request.min_version == 2 or calls[request.min_version] == 1:
                raise EngineError("evaluator is unwell")

        world.evaluator.before = fail_in_the_middle
        assert await run(world) == 0
        steps = [row["step"] for row in world.rows("evaluations.jsonl")]
        assert steps[0] == 0
        assert steps[-1] == 4
        assert 2 not in steps


LAST_EVALUATION_SECONDS = 20.0
"""The first one has to succeed in this time, too, and it starts the processes that judge."""


async def test_a_last_evaluation_that_never_succeeds_is_an_error(make_world):
    async with make_world(evaluation={"every": 100, "prompts": 2, "timeout_seconds": LAST_EVALUATION_SECONDS}) as world:

        async def fail_at_the_end(request):
            if request.min_version == 4:
                raise EngineError("evaluator is unwell")

        world.evaluator.before = fail_at_the_end
        with pytest.raises(ExceptionGroup) as caught:
            await run(world)
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert "the evaluation of step 4" in str(error)


async def test_when_the_bus_loses_everything_the_groups_are_generated_again(make_world):
    async with make_world(learner={"steps": 6, "groups_per_batch": 4}) as world:

        async def lose():
            await until(lambda: len(world.trained) >= 2, "two batches")
            await until(lambda: len(world.ledger()) >= 8, "the mirror")
            client = Redis.from_url(world.server.url)
            await client.flushall()
            await client.aclose()

        async with beside(lose()):
            assert await run(world) == 0
        ledger = world.ledger()
        trained = [group_id for batch in world.trained for group_id in batch]
        assert sorted(trained) == sorted(group_id for group_id, end in ledger.items() if end == "trained")
        lost = [GroupKey.parse(group_id) for group_id, end in ledger.items() if end == "lost"]
        assert lost
        again = {GroupKey.parse(group_id) for group_id in trained}
        assert {GroupKey(k.slot, k.epoch, k.prompt_index, k.attempt + 1) for k in lost} <= again


async def test_a_bus_server_that_is_killed_and_comes_back_costs_nothing(make_world):
    async with make_world(learner={"steps": 6, "groups_per_batch": 4}) as world:

        async def restart():
            await until(lambda: len(world.trained) >= 2, "two batches")
            os.kill(world.server.pid, signal.SIGKILL)
            await until(lambda: world.server.poll() is not None, "the server's end")
            await world.server.start()

        async with beside(restart()):
            assert await run(world) == 0
        await assert_ledger_adds_up(world)
        assert set(world.ledger().values()) == {"trained"}


FLAKY_TASK = """
from jackpot.demo.task import ComplementTask

class Flaky(ComplementTask):
    def reward(self, item, completion):
        if item.metadata["answer"].startswith(("1", "2", "3")):
            raise RuntimeError("the checker is down")
        return super().reward(item, completion)
"""


async def test_a_reward_that_fails_for_all_of_a_group_drops_it(make_world, tmp_path, monkeypatch):
    (tmp_path / "flaky_task.py").write_text(FLAKY_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with make_world(task={"name": "python:flaky_task:Flaky", "params": {"prompts": 50}}) as world:
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
        asked = {r.group_id: right_answer(r)[0] - DIGIT_0 for replica in world.replicas for r in replica.requests}
        failing = {group_id for group_id, first_digit in asked.items() if first_digit in (1, 2, 3)}
        assert failing
        assert {group_id for group_id, end in world.ledger().items() if end == "reward_failed"} == failing
        details = {row["detail"] for row in world.rows("ledger.jsonl") if row["reason"] == "reward_failed"}
        assert all("RuntimeError: the checker is down" in detail for detail in details)
        (first, *_) = world.rows("evaluations.jsonl")
        assert first["num_samples"] == 6
        assert first["comparable"] == (first["num_reward_failures"] == 0)


FRAGILE_TASK = """
from jackpot.demo.task import ComplementTask

class Fragile(ComplementTask):
    def reward(self, item, completion):
        if completion == "0":
            raise RecursionError("the parser gave up")
        return super().reward(item, completion)
"""


@pytest.mark.parametrize("policy", ["zero", "drop"])
async def test_a_completion_whose_reward_fails_is_wrong_or_left_out(make_world, tmp_path, monkeypatch, policy):
    (tmp_path / "fragile_task.py").write_text(FRAGILE_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    task = {"name": "python:fragile_task:Fragile", "params": {"prompts": 50}, "on_reward_failure": policy}
    async with make_world(task=task) as world:
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
        assert set(world.ledger().values()) == {"trained"}
        requests = {r.group_id: r for replica in world.replicas for r in replica.requests}
        for group in world.groups:
            wrong = [mostly_right(requests[group.group_id], index) == [DIGIT_0, 1] for index in range(3)]
            expected = [0.0 if failed else 1.0 for failed in wrong if policy == "zero" or not failed]
            assert [t.reward for t in group.trajectories] == expected
        # An evaluation asks each prompt once: what fails there is a wrong answer, or no answer at all.
        row = world.rows("evaluations.jsonl")[0]
        failed = sum(mostly_right(request, 0) == [DIGIT_0, 1] for request in world.evaluator.requests[:6])
        assert failed
        assert (row["num_reward_failures"], row["comparable"]) == (failed, False)
        assert row["num_samples"] == (6 if policy == "zero" else 6 - failed)
        assert row["policy_accuracy"] == ((6 - failed) / 6 if policy == "zero" else 1.0)
        failures = world.rows("reward_failures.jsonl")
        assert {(row["completion"], row["failure"].split(":")[0]) for row in failures} == {("0", "failed 2 times")}


async def test_a_row_that_cannot_be_used_costs_its_own_groups(make_world, tmp_path):
    numbers = [f"{n:06d}" for n in range(0, 120, 10)]
    rows = [{"prompt": f"999999-{number}=", "answer": "x"} for number in numbers]
    rows[3]["prompt"] = "half an emoji \ud83d"
    rows[7]["prompt"] = "1+" * 70  # the tiny models have 128 positions
    path, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": f"999999-{n}=", "answer": "x"} for n in (111111, 222222)]
    asked += [{"prompt": "999999-111111=  ", "answer": "x"}, {"prompt": "2+" * 70, "answer": "x"}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in asked))
    task = {"name": "jsonl", "params": {"path": str(path), "eval_path": str(held_out)}}
    async with make_world(task=task) as world:
        assert await run(world) == 0
        await assert_ledger_adds_up(world)
        dropped = [row for row in world.rows("ledger.jsonl") if row["state"] == "dropped"]
        assert {row["reason"] for row in dropped} == {"prompt_unusable"}
        details = {row["detail"].split(" of line ")[1][:10] for row in dropped}
        assert details == {"4 cannot b", "8 has 140 "}
        assert {row["num_prompts"] for row in world.rows("evaluations.jsonl")} == {2}


class Process:
    """``python -m jackpot.orchestrator`` as the launcher starts it."""

    def __init__(self, world: World) -> None:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("JACKPOT_")}
        self.log = world.run_dir / "orchestrator.log"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "jackpot.orchestrator"],
                env={**variables, **world.environment.to_env()},
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()

    async def exit_code(self) -> int:
        await until(lambda: self.popen.poll() is not None, "the process to end")
        return self.popen.wait()


@pytest.mark.parametrize("sections", [{}, REUSES], ids=["scored", "straight to the learner"])
async def test_killed_and_started_again_nothing_is_lost_or_done_twice(make_world, sections):
    learner = {"steps": 8, "groups_per_batch": 4}
    async with make_world(learner=learner, **sections) as world:

        async def slowly(request):
            await asyncio.sleep(0.05)

        for replica in world.replicas:
            replica.before = slowly
        async with beside(world.learn()):
            for batches in (2, 5):
                with Process(world) as process:
                    await until(lambda due=batches: len(world.trained) >= due, f"{batches} batches")
                    process.popen.kill()
                    assert await process.exit_code() == -signal.SIGKILL
            with Process(world) as process:
                assert await process.exit_code() == 0, process.log.read_text()
        await assert_ledger_adds_up(world)
        assert set(world.ledger().values()) == {"trained"}
        # Without drops the order of prompts is the order of slots, whatever was killed in between.
        trained = [GroupKey.parse(group_id) for batch in world.trained for group_id in batch]
        assert len({(key.epoch, key.prompt_index) for key in trained}) == 32
        assert {key.attempt for key in trained} == {0}
        steps = [row["step"] for row in world.rows("evaluations.jsonl")]
        assert (steps[0], steps[-1], steps.count(0), steps.count(8)) == (0, 8, 1, 1)


async def test_sigterm_stops_it_and_cancels_its_calls(make_world):
    async with make_world() as world:

        async def hang(request):
            await asyncio.Event().wait()

        for replica in world.replicas:
            replica.before = hang
        world.publish(0)
        with Process(world) as process:
            await until(lambda: sum(len(replica.requests) for replica in world.replicas) >= 7, "requests under way")
            process.popen.send_signal(signal.SIGTERM)
            assert await process.exit_code() == STOPPED_EARLY, process.log.read_text()
        await until(lambda: sum(len(replica.cancelled) for replica in world.replicas) >= 7, "their cancellation")


@pytest.mark.parametrize("task", ["complement", "reasoning_gym:chain_sum"])
def test_torch_is_never_imported(task):
    if task.startswith("reasoning_gym:"):
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: it takes a C compiler")
    code = (
        "import sys; import jackpot.orchestrator.service, jackpot.orchestrator.preflight\n"
        "from jackpot.config import TaskConfig\n"
        "from jackpot.orchestrator.tasks import validate_task\n"
        "from jackpot.orchestrator.tasks.mathematics import math_verify\n"
        f"validate_task(TaskConfig(name={task!r}), 0)\n"
        "assert math_verify('1/2', '0.5') == 1.0\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
