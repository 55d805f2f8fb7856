"""Several ranks against one process: the same scores, by whichever weights, with slices alone in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from patience import TEST_SECONDS
from probe_world import probe_by_hand
from scoring_ranks import make_newest, score_on_ranks
from scoring_world import World, make_actor, make_policy, make_world, sample_group, score_rounding

from jackpot.compute.ranks.group import leave_ranks
from jackpot.compute.ranks.held_tensors import HeldTensors
from jackpot.config import JobSpec, parse_job
from jackpot.errors import ConfigError, WeightCorruptError
from jackpot.scorer.ranked_scorer import ALONE, join_ranked_scorer
from jackpot.trajectory import EXACT_KL, Group, ScoredGroup

pytestmark = pytest.mark.timeout(TEST_SECONDS)

FIGURES = ("target_logprobs", "acceptance_probs", "normalizer_head", "normalizer_tail", "topk_mass")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), actor_versions=(0, 1))
    world.publish_actor(2, probe=probe_by_hand(make_actor(202), world.actors[0]).as_json())
    probe = probe_by_hand(make_policy(101), world.policies[0]).as_json()
    world.publish_policy(1, probe=probe)
    world.publish_policy(2, probe=probe)  # not its own
    return world


def alone(world: World, job: JobSpec, version: int, groups: list[Group]) -> list[ScoredGroup]:
    make_newest(world.run_dir, version)
    target, scorer = ALONE.make_scorer(job, world.store)
    pending = target.read_newer()
    assert pending is not None
    target.apply(pending)
    return scorer.score_groups(groups)


def test_two_ranks_score_as_one_process_does_with_every_normalizer_and_after_a_swap(world: World) -> None:
    """Trajectories of mixed actor versions and lengths, several passes; then fewer trajectories than ranks; then a
    version that does not give its probe, for which the one before stands in."""
    normalizers = ("tail", "union_tail", "union_kappa", "full")
    corrections = [{"name": "jackpot", "normalizer": name, "obrs_lambda": 1.3, "top_k": 5} for name in normalizers]
    scorer = {"processes": 2, "max_batch_tokens": 40, "device": "cpu"}
    jobs = [world.job(correction, scorer=scorer) for correction in (*corrections, "tis")]
    batches = [
        [
            sample_group(world, slot=1, lengths=(11, 3, 9, 5), versions=(0, 1)),
            sample_group(world, slot=2, lengths=(4, 8), versions=(2,), temperature=0.7),
        ],
        [sample_group(world, slot=3, lengths=(6,), versions=(1, 2))],
    ]
    found = score_on_ranks(world.run_dir, jobs, batches, 2)
    whole = sum(tensor.numel() * 4 for tensor in world.policies[0].parameters())
    held = [json.loads((world.run_dir / f"held-{rank}.json").read_text()) for rank in range(2)]
    assert sum(held) == whole and max(held) < 0.6 * whole
    for index, job in enumerate(jobs):
        for version, groups in enumerate(batches):
            expected = alone(world, job, version, groups)
            for got, wanted in zip(found[index, version], expected, strict=True):
                assert_same(world, got, wanted)


def assert_same(world: World, got: ScoredGroup, wanted: ScoredGroup) -> None:
    assert (got.group_id, got.policy_version, got.normalizer) == (
        wanted.group_id,
        wanted.policy_version,
        wanted.normalizer,
    )
    for ours, theirs in zip(got.scores, wanted.scores, strict=True):
        atol = score_rounding(world, theirs.target_logprobs)
        for name in FIGURES:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=atol, err_msg=name)
        assert (ours.mask == theirs.mask).all()
    assert (EXACT_KL in got.group.metadata) == (wanted.normalizer == "full")
    # Sums over all tokens: the error of log p weighs every term, as a relative one of p.
    error = max(score_rounding(world, scores.target_logprobs) for scores in wanted.scores)
    wanted_kl = wanted.group.metadata.get(EXACT_KL, [])
    assert got.group.metadata.get(EXACT_KL, []) == pytest.approx(wanted_kl, rel=error)


def test_what_is_held_of_a_whole_model_is_all_of_it(world: World) -> None:
    model = world.policies[0]
    held = HeldTensors(model)
    assert held.num_bytes == sum(p.numel() * 4 for p in model.parameters())
    before = model.lm_head.weight.detach().clone()
    held.apply(held.read(world.store.open("policy", 1)))
    assert torch.equal(model.lm_head.weight, world.policies[1].lm_head.weight) and not torch.equal(
        before, model.lm_head.weight
    )
    held.apply(held.read(world.store.open("policy", 0)))
    with pytest.raises(WeightCorruptError, match=r"not in the model|has shape"):
        held.read(world.store.open("actor", 0))


def test_settings_that_cannot_work_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="each process takes a GPU of its own"):
        parse_job(world.job().model_dump(mode="json"), ['scorer={processes: 2, device: "cuda:0"}'])
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"scorer\.processes = 2: torchrun started 3 ranks"):
        join_ranked_scorer(world.environment(), world.job(scorer={"processes": 2, "device": "cpu"}))
    leave_ranks()
