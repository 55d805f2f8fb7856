"""The canary: silent where engines hold what they say, and loud at the first version that an engine does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import save_weights
from jackpot.config import JobSpec, parse_job
from jackpot.learner.canary import TOKENS_PER_SEQUENCE, sampled_parts
from jackpot.loop import Loop
from jackpot.rollout.engine import GroupRequest, Sampling
from jackpot.rollout.transformers.engine import TransformersEngine
from jackpot.scoring.batch import Batch, build_batch
from jackpot.telemetry.alarms import AlarmWatch
from jackpot.trajectory import Group, VersionSpan

MakeJob = Callable[..., JobSpec]
HEALTHY = 1e-4
LARGEST, TYPICAL = "rollout/canary_max_difference", "rollout/canary_rms_difference"


@pytest.fixture
def make_job(make_model: Callable[..., Path]) -> MakeJob:
    def make(*overrides: str) -> JobSpec:
        data: dict[str, Any] = {
            "policy": {"model": str(make_model("qwen3", seed=1))},
            "actor": {"model": str(make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1))},
            "task": {"name": "complement"},
            "sampling": {"group_size": 2, "max_tokens": 6, "temperature": 0.7},
            "learner": {"lr": 1e-2, "groups_per_batch": 4, "steps": 6},
            "evaluation": {"every": 6, "prompts": 2},
            "rollout": {"top_logprobs": 5},
        }
        return parse_job(data, overrides)

    return make


def rows_of(job: JobSpec, staleness: int, batches: int = 4) -> list[dict[str, float]]:
    loop = Loop(job, staleness=staleness)
    return [row for _ in range(batches) for row in loop.train_batch()]


@pytest.mark.parametrize("actor", ["", "actor=policy"], ids=["own actor", "on-policy"])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_healthy_run_shows_rounding_alone_however_old_its_samples_are(
    make_job: MakeJob, actor: str, staleness: int
) -> None:
    job = make_job(*filter(None, [actor]), f"orchestrator.max_staleness={staleness}", "algorithm.correction=tis")
    watch = AlarmWatch(job.alarms)
    rows = rows_of(job, staleness)
    assert rows[-1]["staleness/mean"] == staleness
    for row in rows:
        assert row["rollout/canary_tokens"] >= 4
        assert 0 <= row[TYPICAL] <= row[LARGEST] < HEALTHY
        assert "canary" not in {alarm.name for alarm in watch.observe_step(row)}


def test_training_is_the_same_to_the_bit_with_and_without(make_job: MakeJob) -> None:
    """Old versions go into the very model that learns, and out again."""
    looked = rows_of(make_job("orchestrator.max_staleness=2"), 2)
    unseen = rows_of(make_job("orchestrator.max_staleness=2", "alarms.canary_sequences=0"), 2)
    assert [{k: v for k, v in row.items() if "canary" not in k} for row in looked] == unseen


def test_the_difference_is_that_to_the_version_that_sampled(make_job: MakeJob, make_model: Callable[..., Path]) -> None:
    """Tokens of another model than they say: the figures against transformers in float64."""
    job = make_job("orchestrator.max_staleness=0")
    loop, other = Loop(job), Loop(make_job("actor.model=" + str(make_model("llama", seed=5))))
    assert not isinstance(job.actor, str)
    groups = other.sample()
    (row, *_) = loop.learn(loop.score(groups))
    model = AutoModelForCausalLM.from_pretrained(job.actor.model, dtype=torch.float64)
    differences: list[float] = []
    for group in groups:
        trajectory = min(group.trajectories, key=lambda t: t.num_tokens)
        ids = torch.from_numpy(np.r_[group.prompt_token_ids, trajectory.token_ids].astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0, len(group.prompt_token_ids) - 1 :] / group.temperature
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[len(group.prompt_token_ids) :, None])[:, 0]
        differences += (logprobs - torch.from_numpy(trajectory.actor_logprobs).double()).tolist()
    assert row["rollout/canary_tokens"] == len(differences)
    assert row[LARGEST] == pytest.approx(np.abs(differences).max(), abs=HEALTHY)
    assert row[TYPICAL] == pytest.approx(np.sqrt(np.mean(np.square(differences))), abs=HEALTHY)


class DeafEngine(TransformersEngine):
    """An engine that from some version on takes versions' numbers and not their weights."""

    deaf_from = 2

    async def load_weights(self, version: int, directory: Path) -> None:
        if version >= self.deaf_from:
            self.version = version
        else:
            await super().load_weights(version, directory)


async def sampled_by(engine: TransformersEngine, groups: Sequence[Group]) -> list[Group]:
    """The same groups' prompts, sampled by an engine; rewards are those of the places."""
    found = []
    for number, group in enumerate(groups):
        sampling = Sampling(temperature=group.temperature, max_tokens=6, top_logprobs=5, seed=number)
        request = GroupRequest(
            group_id=group.group_id,
            prompt_token_ids=group.prompt_token_ids,
            num_trajectories=len(group.trajectories),
            sampling=sampling,
        )
        trajectories = await engine.generate(request)
        rewarded = tuple(replace(t, reward=float(index % 2)) for index, t in enumerate(trajectories))
        found.append(replace(group, trajectories=rewarded))
    return found


@pytest.mark.parametrize("number_format", ["float32", "bfloat16"])
async def test_weights_that_silently_never_arrive_show_at_once(
    make_job: MakeJob, tmp_path: Path, number_format: str
) -> None:
    job = make_job(
        f"policy.dtype={number_format}",
        f"actor.dtype={number_format}",
        "orchestrator.max_staleness=0",
        "learner.lr=0.05",
    )
    assert not isinstance(job.actor, str)
    loop, watch = Loop(job), AlarmWatch(job.alarms, exact=job.samples_in_float32)
    engine = DeafEngine(load_causal_lm(job.actor.model, number_format, "cpu"), max_batch_size=16, max_queue=64)
    engine.deaf_from = 4
    alarms: list[tuple[str, int]] = []
    try:
        for version in range(6):
            directory = tmp_path / str(version)
            directory.mkdir()
            save_weights(loop.trainer.models["actor"], directory)
            await engine.load_weights(version, directory)
            groups = await sampled_by(engine, loop.sample())
            assert {t.version_spans[0].version for group in groups for t in group.trajectories} == {version}
            for row in loop.learn(loop.score(groups)):
                alarms += [(alarm.name, int(row["step"])) for alarm in watch.observe_step(row)]
    finally:
        await engine.close()
    # Step 5 trains on what version 4 should have sampled.
    assert [step for name, step in alarms if name == "canary"] == [5]


def batch_of(versions: Sequence[Sequence[tuple[int, int, int]]], loop: Loop) -> Batch:
    """A batch of one-trajectory groups, each of 60 tokens with the given spans."""
    (group, *_) = loop.sample()
    (first, *_) = group.trajectories
    groups = []
    for number, spans in enumerate(versions):
        trajectory = replace(
            first,
            trajectory_id=f"{number}#0",
            token_ids=np.full(60, 3 + number, dtype=np.uint32),
            actor_logprobs=np.arange(60, dtype=np.float32) + 100 * number,
            topk_ids=None,
            topk_logprobs=None,
            version_spans=tuple(VersionSpan(*span) for span in spans),
            reward=0.0,
        )
        groups.append(replace(group, trajectories=(trajectory,)))
    from jackpot.trajectory import deferred

    return build_batch([deferred(group, 0) for group in groups], loop.job.algorithm.advantage)


def test_of_each_version_the_first_tokens_of_each_group_are_taken_in_turn(make_job: MakeJob) -> None:
    mixed, whole = [(3, 0, 50), (4, 50, 60)], [(4, 0, 60)]
    batch = batch_of([mixed, whole, whole], Loop(make_job()))
    assert sampled_parts(batch, {7}, 8, 0) == []
    older, newer = sampled_parts(batch, {3, 4}, 8, 0)
    assert (older.version, newer.version) == (3, 4)
    prompt = batch.sequences[0].prompt_length
    assert [(p.prompt_length - prompt, p.start, p.end) for p in older.parts] == [(0, 0, TOKENS_PER_SEQUENCE)]
    # Everything before them was read, whichever version sampled it.
    assert [(p.prompt_length - prompt, p.start, p.end) for p in newer.parts] == [(50, 0, 10), (0, 10, 42), (0, 42, 74)]
    expected = np.r_[50:60, 100:132, 200:232].astype(np.float32)
    np.testing.assert_array_equal(newer.actor_logprobs, expected)
    # With fewer groups than there are the next batch begins with others.
    for seed, number in ((0, 0), (1, 1), (2, 2)):
        (sample,) = sampled_parts(batch, {4}, 1, seed)
        assert sample.actor_logprobs[0] == [50, 100, 200][number]
