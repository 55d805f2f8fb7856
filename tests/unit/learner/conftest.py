"""Scored groups made from real tiny models, and trainers on those models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import figures_rounding, model_rounding

from jackpot.algorithm.obrs import acceptance_mask, acceptance_probs, acceptance_uniforms
from jackpot.bus import TrajectoryBus
from jackpot.compute.model_loading import load_causal_lm
from jackpot.config import JobSpec, parse_job
from jackpot.learner.trainer import Trainer
from jackpot.scoring.batch import Batch
from jackpot.trajectory import Group, GroupKey, ScoredGroup, TokenScores, Trajectory, VersionSpan

VOCABULARY = 49
TEMPERATURE = 0.8
MOST_TOKENS = 5 + 11
"""Of a sequence of ``make_groups``: prompt and completion."""

MakeJob = Callable[..., JobSpec]
MakeTrainer = Callable[[JobSpec], Trainer]
MakeGroups = Callable[..., list[ScoredGroup]]


@pytest.fixture
def make_job(make_model: Callable[..., Path]) -> MakeJob:
    """Jobs on two random models of one vocabulary; ``learner_max_grad_norm`` is out of the way by default."""

    def make(*overrides: str, actor: str | None = None) -> JobSpec:
        data: dict[str, Any] = {
            "policy": {"model": str(make_model("qwen3", seed=1))},
            "actor": actor or {"model": str(make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1))},
            "task": {"name": "complement"},
            "learner": {"max_grad_norm": 1e9, "lr": 1e-3, "groups_per_batch": 4, "steps": 4},
        }
        return parse_job(data, overrides)

    return make


@pytest.fixture
def make_trainer() -> MakeTrainer:
    def make(job: JobSpec) -> Trainer:
        policy = load_causal_lm(job.policy.model, "float32", "cpu")
        actor = None if isinstance(job.actor, str) else load_causal_lm(job.actor.model, "float32", "cpu")
        return Trainer(job, policy, actor)

    return make


@pytest.fixture
def make_groups(make_model: Callable[..., Path]) -> MakeGroups:
    """Random groups of ragged lengths whose p_inf and p_ref are those of the two models, slightly disturbed."""

    def make(
        job: JobSpec, *, num_groups: int = 4, seed: int = 0, with_topk: bool = False, disturb: float = 0.3
    ) -> list[ScoredGroup]:
        random = np.random.default_rng(seed)
        policy = load_causal_lm(job.policy.model, "float32", "cpu")
        actor = load_causal_lm(job.rollout_model.model, "float32", "cpu")
        return [_group(random, job, policy, actor, (slot, seed), with_topk, disturb) for slot in range(num_groups)]

    return make


async def put(bus: TrajectoryBus, job_id: str, groups: list[ScoredGroup], slot: int) -> str:
    """Put a group of this slot on the bus, scored; its id."""
    group_id = GroupKey(slot, 0, slot).group_id(job_id)
    trajectories = tuple(
        replace(trajectory, trajectory_id=f"{group_id}#{index}")
        for index, trajectory in enumerate(groups[slot].group.trajectories)
    )
    scored = replace(groups[slot], group=replace(groups[slot].group, group_id=group_id, trajectories=trajectories))
    assert await bus.reserve(group_id, 10_000)
    assert await bus.publish(scored.group) == "published"
    (delivery,) = await bus.take_groups(1, 1.0)
    await bus.publish_scored(delivery, scored)
    return group_id


def log_error(trainer: Trainer, batch: Batch) -> float:
    """How far two float32 computations of log p of the batch's tokens may lie apart."""
    least = float(torch.minimum(batch.tokens.reference_logprobs, batch.tokens.actor_logprobs).min())
    return max(model_rounding(model.config, MOST_TOKENS, least) for model in trainer.models.values())


def same_figures(expected: dict[str, float], trainer: Trainer, batch: Batch) -> Any:
    """``pytest.approx`` of a step's figures, computed in another order."""
    return pytest.approx(expected, **figures_rounding(expected, log_error(trainer, batch)))


def full_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """[T, V] float64, the naive way: whole logits, whole log-softmax."""
    ids = torch.tensor([[int(token) for token in (*prompt, *completion)]])
    logits = model.double()(input_ids=ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, dim=-1)


@torch.no_grad()
def _group(
    random: np.random.Generator,
    job: JobSpec,
    policy: Any,
    actor: Any,
    place: tuple[int, int],
    with_topk: bool,
    disturb: float,
) -> ScoredGroup:
    slot, epoch = place
    group_id = GroupKey(slot, epoch, slot).group_id("job")
    prompt = random.integers(3, VOCABULARY, random.integers(2, 6))
    trajectories, scores = [], []
    for index in range(3):
        tokens = random.integers(3, VOCABULARY, random.integers(1, 12))
        places = np.arange(len(tokens))
        p_inf = full_logprobs(actor, prompt, tokens)
        p_ref = full_logprobs(policy, prompt, tokens)[places, tokens].numpy() + random.normal(0, disturb, len(tokens))
        sampled = p_inf[places, tokens].numpy()
        top = p_inf.topk(8)
        trajectory_id = f"{group_id}#{index}"
        trajectories.append(
            Trajectory(
                trajectory_id=trajectory_id,
                token_ids=tokens.astype(np.uint32),
                actor_logprobs=sampled.astype(np.float32),
                topk_ids=top.indices.numpy().astype(np.uint32) if with_topk else None,
                topk_logprobs=top.values.numpy().astype(np.float16) if with_topk else None,
                version_spans=(VersionSpan(0, 0, len(tokens)),),
                finish_reason="stop" if index else "length",
                reward=float(random.integers(0, 2)),
            )
        )
        scores.append(_scores(job, trajectory_id, p_ref, sampled, random))
    return ScoredGroup(
        group=Group(
            group_id=group_id,
            prompt_index=slot,
            prompt_token_ids=prompt.astype(np.uint32),
            trajectories=tuple(trajectories),
            temperature=TEMPERATURE,
            dispatch_version=0,
        ),
        scores=tuple(scores),
        obrs_lambda=1.0,
        policy_version=0,
        normalizer="tail",
    )


def rescored(job: JobSpec, group: ScoredGroup, obrs_lambda: float) -> ScoredGroup:
    """The group as a scorer with another λ would have scored it, but for the normalizer's ingredients."""
    scores = []
    for trajectory, score in zip(group.group.trajectories, group.scores, strict=True):
        target, actor = torch.from_numpy(score.target_logprobs), torch.from_numpy(trajectory.actor_logprobs)
        acceptance = acceptance_probs(target, actor, obrs_lambda)
        uniforms = acceptance_uniforms(job.seed, trajectory.trajectory_id, trajectory.num_tokens)
        mask = acceptance_mask(acceptance, uniforms)
        scores.append(replace(score, acceptance_probs=acceptance.numpy(), mask=mask.numpy()))
    return replace(group, scores=tuple(scores), obrs_lambda=obrs_lambda)


def _scores(
    job: JobSpec, trajectory_id: str, target: np.ndarray, sampled: np.ndarray, random: np.random.Generator
) -> TokenScores:
    acceptance = acceptance_probs(torch.tensor(target), torch.tensor(sampled), 1.0)
    mask = acceptance_mask(acceptance, acceptance_uniforms(job.seed, trajectory_id, len(target)))
    head = random.uniform(0.1, 0.5, len(target))
    return TokenScores(
        target_logprobs=target.astype(np.float32),
        acceptance_probs=acceptance.numpy().astype(np.float32),
        mask=mask.numpy(),
        normalizer_head=head.astype(np.float32),
        normalizer_tail=random.uniform(0.0, 0.5, len(target)).astype(np.float32),
        topk_mass=np.full(len(target), 0.9, np.float32),
    )
