"""The learner, killed between its checkpoints or in one of its ranks: it trains what it would have trained."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from patience import PATIENCE_SECONDS, TEST_SECONDS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jackpot.bus import TrajectoryBus
from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.trajectory import Group, GroupKey, ScoredGroup, TokenScores, Trajectory, VersionSpan

pytestmark = pytest.mark.timeout(TEST_SECONDS)

STEPS, GROUPS_PER_BATCH, CHECKPOINT_EVERY = 6, 2, 4


async def fill(url: str, job: JobSpec, job_id: str, run_dir: Path, slots: range | None = None) -> TrajectoryBus:
    """Put groups of the job on the bus, scored: all of them, or those of some slots."""
    bus = await TrajectoryBus.connect(url, job_id, job.bus, "test", run_dir / "payloads")
    await bus.open()
    for slot in slots or range(job.num_groups):
        scored = scored_group(GroupKey(slot, 0, slot).group_id(job_id), np.random.default_rng(slot))
        assert await bus.reserve(scored.group_id, 10_000)
        assert await bus.publish(scored.group) == "published"
        (delivery,) = await bus.take_groups(1, 1.0)
        await bus.publish_scored(delivery, scored)
    return bus


def scored_group(group_id: str, random: np.random.Generator) -> ScoredGroup:
    trajectories, scores = [], []
    for index in range(2):
        ones = np.ones(5, np.float32)
        trajectories.append(
            Trajectory(
                trajectory_id=f"{group_id}#{index}",
                token_ids=random.integers(3, 40, 5).astype(np.uint32),
                actor_logprobs=-3.5 * ones,
                topk_ids=None,
                topk_logprobs=None,
                version_spans=(VersionSpan(0, 0, 5),),
                finish_reason="length",
                reward=float(index),
            )
        )
        scores.append(
            TokenScores(
                target_logprobs=-3.6 * ones,
                acceptance_probs=0.9 * ones,
                mask=random.random(5) < 0.9,
                normalizer_head=0.7 * ones,
                normalizer_tail=0.3 * ones,
                topk_mass=0.8 * ones,
            )
        )
    group = Group(
        group_id=group_id,
        prompt_index=0,
        prompt_token_ids=np.array([4, 5], np.uint32),
        trajectories=tuple(trajectories),
        temperature=1.0,
        dispatch_version=0,
    )
    return ScoredGroup(group=group, scores=tuple(scores), obrs_lambda=1.0, policy_version=0, normalizer="tail")


def start_learner(environment: ServiceEnvironment) -> subprocess.Popen[bytes]:
    log = (environment.run_dir / "learner.log").open("ab")
    variables = os.environ | environment.to_env() | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jackpot.learner"], env=variables, stdout=log, stderr=subprocess.STDOUT
    )
    log.close()
    return process


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}"
        await asyncio.sleep(0.02)


def rows(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def new_run(
    tmp_path: Path, name: str, url: str, make_model: Callable[..., Path], *overrides: str
) -> tuple[ServiceEnvironment, JobSpec]:
    job = parse_job(
        {
            "policy": {"model": str(make_model("qwen3", seed=1))},
            "actor": {"model": str(make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1))},
            "task": {"name": "complement"},
            "learner": {
                "steps": STEPS,
                "groups_per_batch": GROUPS_PER_BATCH,
                "checkpoint_every": CHECKPOINT_EVERY,
                "lr": 1e-3,
            },
        },
        overrides,
    )
    run_dir = tmp_path / name
    run_dir.mkdir()
    (run_dir / "job.json").write_text(job.model_dump_json())
    return ServiceEnvironment(run_dir=run_dir, job_id=name, redis_url=url), job


async def train(environment: ServiceEnvironment, job: JobSpec, *, kill_after_step: int | None) -> None:
    bus = await fill(environment.redis_url, job, environment.job_id, environment.run_dir)
    process = start_learner(environment)
    try:
        if kill_after_step is not None:
            reached = lambda: len(rows(environment.run_dir)) >= kill_after_step  # noqa: E731
            await wait_until(reached, f"step {kill_after_step}")
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start_learner(environment)
        await wait_until(lambda: process.poll() is not None, "the learner to finish")
        assert process.returncode == 0, (environment.run_dir / "learner.log").read_text()
        ledger = await bus.readings.ledger()
        assert (ledger.dispatched, ledger.trained, ledger.dropped, ledger.open) == (12, 12, {}, 0)
        steps = {GroupKey.parse(row.group_id).slot: row.step for _, row in await bus.readings.read_terminal("", 100)}
        assert steps == {slot: slot // GROUPS_PER_BATCH + 1 for slot in range(12)}  # the step with the group's effect
        assert (await bus.readings.depths()).bytes_used == 0
    finally:
        process.kill()
        process.wait()
        await bus.close()


async def test_a_killed_learner_ends_with_the_very_weights_of_an_undisturbed_one(
    tmp_path: Path, valkey_url: str, make_model: Callable[..., Path]
) -> None:
    undisturbed, job = new_run(tmp_path, "undisturbed", valkey_url, make_model)
    killed, _ = new_run(tmp_path, "killed", valkey_url, make_model)
    in_turn, job_in_turn = new_run(tmp_path, "in-turn", valkey_url, make_model, "learner.overlap=false")
    await train(undisturbed, job, kill_after_step=None)
    await train(killed, job, kill_after_step=2)
    await train(in_turn, job_in_turn, kill_after_step=None)

    for role in ("policy", "actor"):
        expected = load_file(undisturbed.run_dir / "export" / role / "model.safetensors")
        got = load_file(killed.run_dir / "export" / role / "model.safetensors")
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        # Nor does it matter whether fetching and publishing go on beside the steps.
        got = load_file(in_turn.run_dir / "export" / role / "model.safetensors")
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        model = AutoModelForCausalLM.from_pretrained(killed.run_dir / "export" / role)
        assert torch.equal(model.get_input_embeddings().weight, expected["model.embed_tokens.weight"])
    assert [row["step"] for row in rows(undisturbed.run_dir)] == [1, 2, 3, 4, 5, 6]
    assert {row["step"] for row in rows(killed.run_dir)} == {1, 2, 3, 4, 5, 6}
    assert len(list((killed.run_dir / "manifests").glob("*.json"))) == STEPS
    newest = (killed.run_dir / "weights" / "actor" / "LATEST").read_text()
    assert str(STEPS) in newest
    seconds = json.loads((undisturbed.run_dir / "activity" / "learner-0.json").read_text())["seconds"]
    assert {"train", "publish", "checkpoint", "wait_groups"} <= seconds.keys()


async def test_a_latest_checkpoint_that_is_damaged_gives_way_and_the_job_still_ends(
    tmp_path: Path, valkey_url: str, make_model: Callable[..., Path]
) -> None:
    """The groups of batches 2 and 3 are closed on the bus, as a checkpoint held their effect: nobody makes others."""
    environment, job = new_run(tmp_path, "damaged", valkey_url, make_model, "learner.checkpoint_every=2")
    run_dir = environment.run_dir
    bus = await fill(valkey_url, job, environment.job_id, run_dir, range(8))
    process = start_learner(environment)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (await bus.readings.ledger()).trained < 8:
            assert process.poll() is None and time.monotonic() < deadline, (run_dir / "learner.log").read_text()
            await asyncio.sleep(0.02)
        assert (run_dir / "checkpoints" / "latest").read_text() == "00000004\n"
        process.kill()
        process.wait()
        (shard,) = (run_dir / "checkpoints" / "00000004").glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-1])

        await (await fill(valkey_url, job, environment.job_id, run_dir, range(8, 12))).close()
        process = start_learner(environment)
        await wait_until(lambda: process.poll() is not None, "the learner to finish")
        log = (run_dir / "learner.log").read_text()
        assert process.returncode == 0, log
        ledger = await bus.readings.ledger()
        assert (ledger.dispatched, ledger.trained, ledger.dropped, ledger.open) == (12, 12, {}, 0)
    finally:
        process.kill()
        process.wait()
        await bus.close()
    assert "checkpoints/00000004 is damaged, looking for an older one" in log
    for batch in (2, 3):
        assert f"batch {batch} (1 steps from step {batch + 1} on) was trained into a checkpoint that is lost" in log
    assert json.loads((run_dir / "resumed.json").read_text())["resumed_from_step"] == 2
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert (run_dir / "checkpoints" / "latest").read_text() == "00000006\n"
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "export" / "policy")
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())


def rank_process(process: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of one rank, among those that torchrun started."""
    (found,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(rank)]
    return found


@pytest.mark.slow
async def test_two_ranks_end_together_and_go_on_together(
    tmp_path: Path, valkey_url: str, make_model: Callable[..., Path]
) -> None:
    """A rank killed ends the other at once; SIGTERM stops both in order; both resume from the checkpoint."""
    environment, job = new_run(tmp_path, "ranks", valkey_url, make_model, "learner.processes=2", "learner.steps=40")
    run_dir = environment.run_dir
    bus = await fill(valkey_url, job, environment.job_id, run_dir)
    process = start_learner(environment)
    try:
        await wait_until(lambda: len(rows(run_dir)) >= 5, "step 5")
        rank_process(process, 1).kill()
        await wait_until(lambda: process.poll() is not None, "rank 0 to follow rank 1")
        assert process.returncode not in (0, 75)

        seen = len(rows(run_dir))
        process = start_learner(environment)
        await wait_until(lambda: len(rows(run_dir)) >= seen + 2, "two more steps")
        process.send_signal(signal.SIGTERM)
        await wait_until(lambda: process.poll() is not None, "both ranks to stop")
        assert process.returncode == 75, (run_dir / "learner.log").read_text()
        assert json.loads((run_dir / "resumed.json").read_text())["resumed_from_step"] >= CHECKPOINT_EVERY

        process = start_learner(environment)
        await wait_until(lambda: process.poll() is not None, "the learner to finish")
        assert process.returncode == 0, (run_dir / "learner.log").read_text()
        ledger = await bus.readings.ledger()
        assert (ledger.dispatched, ledger.trained, ledger.dropped, ledger.open) == (80, 80, {}, 0)
        # Rank 1 read its own groups from the bus, always.
        assert "cannot read its groups" not in (run_dir / "learner.log").read_text()
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_SECONDS)
        await bus.close()
    assert len(list((run_dir / "checkpoints" / "00000040").glob("*.safetensors"))) == 2
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "export" / "policy")
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())
