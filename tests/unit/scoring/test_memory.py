"""Scoring never holds [tokens, vocabulary]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring_world import World, make_actor, make_policy
from torch.utils._python_dispatch import TorchDispatchMode

from jackpot.compute.model_weights import save_weights
from jackpot.scorer.target import ActorVersions, HeldPolicy, TargetPolicy
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.storage.weights import WeightStore
from jackpot.trajectory import Group, Trajectory, VersionSpan

VOCABULARY = 40_000
NUM_TOKENS = 900
CHUNK_TOKENS = 110


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.numel())
        return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    run_dir: Path = tmp_path_factory.mktemp("wide")
    world = World(run_dir, WeightStore(run_dir / "weights"), {}, {})
    for role, model in (("policy", make_policy(1, VOCABULARY)), ("actor", make_actor(2, VOCABULARY))):
        model.save_pretrained(run_dir / role)
        world.store.publish(role, 0, lambda directory, model=model: save_weights(model, directory), {})
    return world


@pytest.mark.parametrize("normalizer", ["tail", "union_tail", "full"])
def test_no_tensor_is_larger_than_a_slice(world: World, normalizer: str) -> None:
    job = world.job({"name": "jackpot", "normalizer": normalizer}, scorer={"chunk_tokens": CHUNK_TOKENS})
    target = TargetPolicy(HeldPolicy(job.policy, "cpu"), world.store, 1.0)
    pending = target.read_newer()
    assert pending is not None
    target.apply(pending)
    scorer = GroupScorer(job, target, ActorVersions(job.rollout_model, "actor", world.store, "cpu"))
    rng = np.random.default_rng(0)
    length = NUM_TOKENS // 3
    trajectories = tuple(
        Trajectory(
            trajectory_id=f"job-1.s0.e0.p0.a0#{index}",
            token_ids=rng.integers(0, VOCABULARY, length).astype(np.uint32),
            actor_logprobs=np.full(length, -3, dtype=np.float32),
            topk_ids=np.tile(np.arange(4, dtype=np.uint32), (length, 1)),
            topk_logprobs=np.full((length, 4), -4, dtype=np.float16),
            version_spans=(VersionSpan(0, 0, length),),
            finish_reason="length",
        )
        for index in range(3)
    )
    group = Group(
        group_id="job-1.s0.e0.p0.a0",
        prompt_index=0,
        prompt_token_ids=np.arange(5, dtype=np.uint32),
        trajectories=trajectories,
        temperature=1.0,
        dispatch_version=0,
    )
    with LargestTensor() as largest:
        scorer.score_groups([group])
    slice_elements = CHUNK_TOKENS * VOCABULARY
    assert slice_elements / 2 < largest.elements <= slice_elements < NUM_TOKENS * VOCABULARY / 4
