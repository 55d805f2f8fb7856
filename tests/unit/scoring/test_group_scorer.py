"""Scores against a slow float64 reference, and what must not change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_world import (
    SEED,
    VOCABULARY,
    World,
    actor_logprobs,
    expected_scores,
    full_logprobs,
    make_world,
    sample_group,
    score_rounding,
)

from jackpot.algorithm.obrs import acceptance_uniforms
from jackpot.compute.varlen import attends_by_lengths
from jackpot.errors import PayloadError, ScoringError, WeightMissingError
from jackpot.scorer.target import ActorVersions, HeldPolicy, TargetPolicy
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.trajectory import EXACT_KL, Group, ScoredGroup

NORMALIZERS = ("tail", "union_tail", "union_kappa", "full")
TOP_K = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), actor_versions=(0, 1, 2))


def scorer_for(world: World, correction: dict | str, **scorer: int) -> GroupScorer:
    job = world.job(correction, scorer=scorer)
    target = TargetPolicy(
        HeldPolicy(job.policy, "cpu"), world.store, getattr(job.algorithm.correction, "obrs_lambda", 1.0)
    )
    pending = target.read_newer()
    assert pending is not None
    target.apply(pending)
    actors = ActorVersions(job.rollout_model, job.rollout_role, world.store, "cpu") if job.scorer_runs_actor else None
    return GroupScorer(job, target, actors)


def jackpot(normalizer: str, obrs_lambda: float = 1.3, **more: str) -> dict:
    return {"name": "jackpot", "normalizer": normalizer, "obrs_lambda": obrs_lambda, "top_k": TOP_K, **more}


def assert_expected(world: World, group: Group, scored: ScoredGroup, normalizer: str, obrs_lambda: float) -> None:
    for trajectory, scores in zip(group.trajectories, scored.scores, strict=True):
        expected = expected_scores(
            world, group, trajectory,
            policy_version=0, normalizer=normalizer, obrs_lambda=obrs_lambda, top_k=TOP_K,
        )  # fmt: skip
        for name in ("target_logprobs", "acceptance_probs", "normalizer_head", "normalizer_tail", "topk_mass"):
            found, wanted = getattr(scores, name), getattr(expected, name)
            assert found.dtype == np.float32
            atol = score_rounding(world, expected.target_logprobs)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=name)
        uniforms = acceptance_uniforms(SEED, trajectory.trajectory_id, trajectory.num_tokens).numpy()
        np.testing.assert_array_equal(scores.mask, uniforms < scores.acceptance_probs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_scores_are_those_of_the_reference(world: World, normalizer: str, temperature: float) -> None:
    group = sample_group(world, lengths=(7, 1, 4), temperature=temperature)
    (scored,) = scorer_for(world, jackpot(normalizer)).score_groups([group])
    assert_expected(world, group, scored, normalizer, obrs_lambda=1.3)
    assert scored.normalizer == normalizer
    assert scored.obrs_lambda == 1.3
    assert scored.policy_version == 0


@pytest.mark.parametrize("normalizer", ["union_tail", "union_kappa", "full"])
def test_each_span_is_scored_with_the_actor_version_that_sampled_it(world: World, normalizer: str) -> None:
    group = sample_group(world, lengths=(9, 6), versions=(0, 1, 2))
    assert [span.version for span in group.trajectories[0].version_spans] == [0, 1, 2]
    (scored,) = scorer_for(world, jackpot(normalizer)).score_groups([group])
    assert_expected(world, group, scored, normalizer, obrs_lambda=1.3)


def test_the_full_normalizer_comes_with_exact_divergences(world: World) -> None:
    group = sample_group(world, lengths=(7, 4), versions=(0, 1))
    (scored,) = scorer_for(world, jackpot("full")).score_groups([group])
    expected = np.zeros(2)
    for trajectory in group.trajectories:
        prompt, ids = group.prompt_token_ids, trajectory.token_ids
        target = full_logprobs(world.policies[0], prompt, ids, group.temperature)
        actor = actor_logprobs(world, prompt, ids, trajectory.version_spans, group.temperature)
        accepted = np.minimum(np.exp(actor), np.exp(target) / 1.3)
        accepted = np.log(accepted / accepted.sum(-1, keepdims=True))
        expected += [(np.exp(target) * (target - other)).sum() for other in (actor, accepted)]
    error = max(score_rounding(world, scores.target_logprobs) for scores in scored.scores)
    np.testing.assert_allclose(scored.group.metadata[EXACT_KL], expected, rtol=error)
    assert expected[1] < expected[0]
    (estimated,) = scorer_for(world, jackpot("tail")).score_groups([group])
    assert EXACT_KL not in estimated.group.metadata


@pytest.mark.parametrize("correction", ["none", "tis"])
def test_without_obrs_everything_is_accepted_and_the_target_is_still_asked(world: World, correction: str) -> None:
    group = sample_group(world)
    (scored,) = scorer_for(world, correction).score_groups([group])
    for trajectory, scores in zip(group.trajectories, scored.scores, strict=True):
        expected = expected_scores(
            world, group, trajectory, policy_version=0, normalizer="tail", obrs_lambda=1.0, top_k=TOP_K
        )
        atol = score_rounding(world, expected.target_logprobs)
        np.testing.assert_allclose(scores.target_logprobs, expected.target_logprobs, rtol=0, atol=atol)
        assert scores.mask.all() and (scores.acceptance_probs == 1).all()
        assert (scores.normalizer_head == 1).all() and (scores.normalizer_tail == 0).all()
    assert scored.normalizer == "none"


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_neither_batching_nor_slicing_changes_a_score(world: World, normalizer: str) -> None:
    groups = [
        sample_group(world, slot=1, lengths=(2, 9), prompt_length=3),
        sample_group(world, slot=2, lengths=(4,), temperature=0.7),
        sample_group(world, slot=3, lengths=(11, 1, 6), prompt_length=8),
        sample_group(world, slot=4, lengths=(3, 3), top_k=3),
    ]
    together = scorer_for(world, jackpot(normalizer)).score_groups(groups)
    small = scorer_for(world, jackpot(normalizer), max_batch_tokens=12, chunk_tokens=2)
    for group, one in zip(groups, together, strict=True):
        (alone,) = small.score_groups([group])
        for left, right in zip(one.scores, alone.scores, strict=True):
            for name in ("target_logprobs", "acceptance_probs", "normalizer_head", "normalizer_tail", "topk_mass"):
                atol = score_rounding(world, right.target_logprobs)
                np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=0, atol=atol)
            np.testing.assert_array_equal(left.mask, right.mask)


def test_topk_leaves_the_group_unless_the_learner_needs_it(world: World) -> None:
    group = sample_group(world)
    (reference,) = scorer_for(world, jackpot("tail")).score_groups([group])
    (policy,) = scorer_for(world, jackpot("tail", target="policy")).score_groups([group])
    assert all(t.topk_ids is None and t.topk_logprobs is None for t in reference.group.trajectories)
    for before, after in zip(group.trajectories, policy.group.trajectories, strict=True):
        np.testing.assert_array_equal(before.topk_ids, after.topk_ids)
    assert [t.reward for t in reference.group.trajectories] == [t.reward for t in group.trajectories]
    np.testing.assert_array_equal(reference.scores[0].normalizer_head, policy.scores[0].normalizer_head)


def broken(group: Group, **changes: object) -> Group:
    first, *others = group.trajectories
    return replace(group, trajectories=(replace(first, **changes), *others))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token_ids": np.full(5, VOCABULARY, dtype=np.uint32)}, "beyond the vocabulary, 97"),
        ({"topk_ids": np.full((5, 6), VOCABULARY, dtype=np.uint32)}, "beyond the vocabulary, 97"),
        ({"topk_ids": None, "topk_logprobs": None}, "lacks the actor's most probable tokens"),
        ({"actor_logprobs": np.full(5, np.nan, dtype=np.float32)}, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(world: World, changes: dict, problem: str) -> None:
    group = broken(sample_group(world), **changes)
    with pytest.raises(PayloadError, match=problem) as refusal:
        scorer_for(world, jackpot("tail")).score_groups([group])
    assert group.trajectories[0].trajectory_id in str(refusal.value)


@pytest.mark.parametrize("changes", [{"prompt_token_ids": np.zeros(0, dtype=np.uint32)}, {"temperature": 0.0}])
def test_groups_that_no_model_can_be_asked_about_are_refused(world: World, changes: dict) -> None:
    with pytest.raises(PayloadError, match=r"job-1\.s0"):
        scorer_for(world, "none").score_groups([replace(sample_group(world), **changes)])


def test_diverged_weights_do_not_pass_as_scores(world: World, tmp_path: Path) -> None:
    diverged = make_world(tmp_path)
    scorer = scorer_for(diverged, jackpot("tail"))
    model = scorer._target.model
    next(iter(model.parameters())).data.fill_(float("nan"))
    with pytest.raises(ScoringError, match="policy version 0 are not finite"):
        scorer.score_groups([sample_group(world)])


def test_scores_made_with_a_lambda_that_is_no_number_do_not_pass(world: World) -> None:
    """The log-probabilities are as they should be; what OBRS makes of them is not."""
    scorer = scorer_for(world, jackpot("tail"))
    scorer._target.obrs_lambda = float("nan")
    with pytest.raises(ScoringError, match="policy version 0 are not finite"):
        scorer.score_groups([sample_group(world)])


def test_an_actor_version_that_is_gone_is_named(world: World) -> None:
    group = sample_group(world)
    span = replace(group.trajectories[0].version_spans[0], version=7)
    with pytest.raises(WeightMissingError, match="version 7 of the actor's weights"):
        scorer_for(world, jackpot("union_tail")).score_groups([broken(group, version_spans=(span,))])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_completions_that_share_their_prompts_row_score_as_in_rows_of_their_own(world: World, normalizer: str) -> None:
    groups = [sample_group(world, lengths=(3, 1, 4, 2), slot=slot) for slot in range(3)]
    rows: dict[str, list[int]] = {}
    scored = {}
    for layout in ("auto", "never"):
        scorer = scorer_for(world, jackpot(normalizer), packing=layout)
        trunk = scorer._target.model.base_model
        seen = rows.setdefault(layout, [])
        hook = trunk.layers[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[0]))
        scored[layout] = scorer.score_groups(groups)
        hook.remove()
    assert sum(rows["never"]) == 12 > sum(rows["auto"])
    for group, one, other in zip(groups, scored["auto"], scored["never"], strict=True):
        assert_expected(world, group, one, normalizer, obrs_lambda=1.3)
        for mine, theirs in zip(one.scores, other.scores, strict=True):
            np.testing.assert_allclose(
                mine.target_logprobs, theirs.target_logprobs, rtol=0, atol=score_rounding(world, theirs.target_logprobs)
            )


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_packed_completions_score_as_in_rows_of_their_own(world: World, normalizer: str) -> None:
    """In several passes; prompts that are worth it are shared all the same. The actor, which nobody asks, gets rows."""
    groups = [sample_group(world, lengths=(3, 1, 4, 2), slot=slot) for slot in range(3)]
    job = world.job(jackpot(normalizer), scorer={"max_batch_tokens": 40})
    target = TargetPolicy(HeldPolicy(job.policy, "cpu"), world.store, 1.3)
    pending = target.read_newer()
    assert pending is not None
    target.apply(pending)
    actors = ActorVersions(job.rollout_model, job.rollout_role, world.store, "cpu") if job.scorer_runs_actor else None
    scorer = GroupScorer(job, target, actors, has_varlen=lambda _device, _dtype: True)
    assert attends_by_lengths(target.model)
    for attention in (scorer._layout.attention, None):
        scorer._layout = replace(scorer._layout, attention=attention)
        rows: list[int] = []
        hook = target.model.base_model.layers[0].register_forward_pre_hook(
            lambda _, given, rows=rows: rows.append(given[0].shape[0])
        )
        scored = scorer.score_groups(groups)
        hook.remove()
        assert rows == [3] if attention else set(rows) == {1} and len(rows) > 1
        for group, one in zip(groups, scored, strict=True):
            assert_expected(world, group, one, normalizer, obrs_lambda=1.3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_a_gpu_packs_and_scores_as_rows_do(world: World) -> None:
    groups = [sample_group(world, lengths=(3, 1, 4, 2), slot=slot) for slot in range(3)]
    policy = {"model": str(world.run_dir / "policy"), "dtype": "bfloat16"}
    found = {}
    for packing in ("auto", "never"):
        job = world.job(jackpot("tail"), policy=policy, scorer={"packing": packing, "max_batch_tokens": 40})
        target = TargetPolicy(HeldPolicy(job.policy, "cuda"), world.store, 1.3)
        pending = target.read_newer()
        assert pending is not None
        target.apply(pending)
        scorer = GroupScorer(job, target)
        scorer._layout = replace(scorer._layout, attention=None)  # through the kernel, all of it
        assert scorer._layout.packed == attends_by_lengths(target.model) == (packing == "auto")
        scores = [one for group in scorer.score_groups(groups) for one in group.scores]
        found[packing] = np.concatenate([one.target_logprobs for one in scores])
    np.testing.assert_allclose(found["auto"], found["never"], rtol=0, atol=0.15)
