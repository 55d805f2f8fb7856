"""A whole job in one process: sample, score, learn, in turn. Start reading Jackpot here.

This is Algorithm 1 of the paper, one batch per turn, with the sampler, scorer and trainer of the services:

1. ω, the actor, samples groups of completions and records log p_inf of each token: :meth:`Loop.sample`.
2. θ, the policy, scores them: log p_ref, the probability a = min(1, p_ref / (λ p_inf)) of accepting each token, its
   Mask ~ Bernoulli(a), and the ingredients of Z: :meth:`Loop.score`.
3. Both learn: each accepted token has the weight ρ = min(Z · max(λ, p_ref/p_inf), c1); the joint loss is
   L_ppo_obrs(θ) + L_ppo(ω) + λ_distill · L_distill(ω); an optimizer step moves θ and ω: :meth:`Loop.learn`.

There are no services, no bus and no overlap: what depends on timing in the services is exact here. A batch is sampled
with weights that are ``staleness`` batches old and scored with weights that are ``reference_age`` batches old. The
result depends only on the job (on one machine and with one number of threads).

A notebook can run the steps one by one and inspect the state in between. With ``job`` from
``prepare_job(load_job(Path("examples/demo.yaml")))`` of :mod:`jackpot.config` and
:mod:`jackpot.control_plane.sessions.preparation`, or any other whose models are directories:

>>> from jackpot.loop import Loop
>>> loop = Loop(job)
>>> groups = loop.sample()
>>> trajectory = groups[0].trajectories[0]
>>> len(loop.token_texts(trajectory)) == len(trajectory.actor_logprobs)
True
>>> scored = loop.score(groups)
>>> bool((scored[0].scores[0].acceptance_probs <= 1).all())
True
>>> rows = loop.learn(scored)
>>> [row["step"] for row in rows]
[1]
>>> tokens = loop.weighed[0].of(trajectory)
>>> tokens.weight.shape == tokens.mask.shape == (trajectory.num_tokens,)
True
>>> sorted(loop.gradients("policy")) == sorted(name for name, _ in loop.policy.named_parameters())
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.common_vocabulary import common_vocabulary
from jackpot.compute.model_loading import load_causal_lm
from jackpot.config import JobSpec, ModelConfig
from jackpot.learner.trainer import Trainer
from jackpot.loop_parts import PastWeights, WeighedTokens, check_job
from jackpot.orchestrator.dispatch import sampling_seed
from jackpot.orchestrator.evaluation import CORRECT
from jackpot.orchestrator.slots import PromptOrder
from jackpot.orchestrator.tasks import Item, build_task, finite_reward
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.rollout.engine import GroupRequest, Sampling
from jackpot.rollout.transformers.decode_batch import generate
from jackpot.scoring.batch import build_batch
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.trajectory import Group, GroupKey, Role, ScoredGroup, Trajectory

JOB_ID = "inline"
"""The same for every loop, so that trajectory ids, and with them masks and samples, do not depend on settings."""


class Loop:
    """All parts of a job, taking turns.

    Args:
        job: the job as resolved: models are directories.
        staleness: how many batches old the weights that sample are.
        reference_age: how many batches old the weights that score are; at most ``staleness``.

    Raises:
        ConfigError: the job needs something that only the services can do.
    """

    def __init__(self, job: JobSpec, *, staleness: int = 0, reference_age: int = 0) -> None:
        check_job(job, staleness, reference_age)
        torch.manual_seed(job.seed)
        self.job = job
        vocabulary = common_vocabulary(job)
        self.policy = _load(job.policy, "policy.model", vocabulary)
        self.actor: PreTrainedModel | None = None  # None where the policy samples for itself
        if not isinstance(job.actor, str):
            self.actor = _load(job.actor, "actor.model", vocabulary)
        self.trainer = Trainer(job, self.policy, self.actor)
        self.trainer.show_tokens = lambda batch, weights: self.weighed.append(WeighedTokens(batch, weights))
        self._task = build_task(job.task, job.seed)
        self._order = PromptOrder(self._task.num_prompts, job.seed)
        self._eval_items = self._task.eval_items(job.evaluation.prompts)
        self._past = PastWeights(
            self.policy, self.actor or self.policy, staleness, reference_age, self.trainer.lambda_control.obrs_lambda
        )
        self._tokenizer = PromptTokenizer.of_job(job)
        self._stop_ids = self._tokenizer.stop_token_ids(job.sampling.stop)
        self._scorer = GroupScorer(job, self._past.target, self._past.sampler)
        self.step = 0  # optimizer steps made
        self.batch = 0  # batches trained on
        self.weighed: list[WeighedTokens] = []
        """Tokens, weights ρ, masks and Z of each optimizer step of the latest batch."""

    def train_batch(self) -> list[dict[str, float]]:
        """One turn of Algorithm 1; the figures of each optimizer step, as in ``metrics.jsonl``. Errors as its parts."""
        groups = self.sample()
        scored = self.score(groups)
        return self.learn(scored)

    def sample(self) -> list[Group]:
        """The next batch's groups, sampled by ω and rewarded. The result is the same until :meth:`learn` is called."""
        size = self.job.learner.groups_per_batch
        keys = [GroupKey(slot, *self._order.prompt(slot)) for slot in range(self.batch * size, (self.batch + 1) * size)]
        items = [self._task.train_prompt(key.prompt_index) for key in keys]
        requests = [self._train_request(key.group_id(JOB_ID), item) for key, item in zip(keys, items, strict=True)]
        sampler = self._past.load_sampler()
        answers = generate(sampler.model, requests, sampler.version, self.job.rollout.max_batch_size)
        return [
            Group(
                group_id=request.group_id,
                prompt_index=key.prompt_index,
                prompt_token_ids=request.prompt_token_ids,
                trajectories=tuple(replace(t, reward=self._reward(item, t)) for t in trajectories),
                temperature=request.sampling.temperature,
                dispatch_version=sampler.version,
            )
            for key, item, request, trajectories in zip(keys, items, requests, answers, strict=True)
        ]

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """The scores of each token under θ: log p_ref, acceptance, mask, the ingredients of Z.

        Raises:
            ScoringError: the policy's probabilities are not finite any more.
            PayloadError: the actor's probabilities are not finite any more.
        """
        self._past.load_target()
        return self._scorer.score_groups(groups)

    def learn(self, scored: Sequence[ScoredGroup]) -> list[dict[str, float]]:
        """Weigh the tokens and take the optimizer steps of the joint loss; returns the figures of each step."""
        self.weighed.clear()
        batch = build_batch(scored, self.job.algorithm.advantage)
        rows = self.trainer.train_batch(batch, self.step)
        self.step += len(rows)
        self.batch += 1
        self._past.remember(self.step, self.trainer.lambda_control.obrs_lambda)
        return rows

    def gradients(self, role: Role) -> Mapping[str, Tensor]:
        """The gradients of the latest optimizer step by parameter, as applied: after ``max_grad_norm``."""
        model = self.trainer.models.learnables[role].model
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    def token_texts(self, trajectory: Trajectory) -> list[str]:
        """The text of each token of the completion."""
        return [self._tokenizer.decode(trajectory.token_ids[i : i + 1]) for i in range(trajectory.num_tokens)]

    def evaluate(self) -> float:
        """Accuracy of the policy's samples for the held-out prompts."""
        requests = [self._eval_request(index, item) for index, item in enumerate(self._eval_items)]
        answers = generate(self.policy, requests, self.step, self.job.rollout.max_batch_size)
        rewards = [self._reward(item, t) for item, ts in zip(self._eval_items, answers, strict=True) for t in ts]
        return float(np.mean([reward >= CORRECT for reward in rewards]))

    def _reward(self, item: Item, trajectory: Trajectory) -> float:
        return finite_reward(self._task.reward(item, self._tokenizer.decode(trajectory.token_ids)))

    def _train_request(self, group_id: str, item: Item) -> GroupRequest:
        sampling = self.job.sampling
        top_logprobs = min(self.job.rollout.top_logprobs, self._past.target.vocabulary)
        return self._request(group_id, item, group_id, sampling.group_size, sampling.temperature, top_logprobs)

    def _eval_request(self, index: int, item: Item) -> GroupRequest:
        name, seed_name = f"evaluation.p{index}", f"evaluation {index}"
        count, temperature = self.job.evaluation.samples_per_prompt, self.job.evaluation_temperature
        return self._request(name, item, seed_name, count, temperature, top_logprobs=0)

    def _request(
        self, group_id: str, item: Item, seed_name: str, count: int, temperature: float, top_logprobs: int
    ) -> GroupRequest:
        return GroupRequest(
            group_id=group_id,
            prompt_token_ids=self._tokenizer.encode_prompt(item.prompt),
            num_trajectories=count,
            sampling=Sampling(
                temperature=temperature,
                max_tokens=self.job.sampling.max_tokens,
                stop_token_ids=self._stop_ids,
                top_logprobs=top_logprobs,
                seed=sampling_seed(self.job.seed, seed_name),
            ),
        )


def _load(model: ModelConfig, field: str, vocabulary: int) -> PreTrainedModel:
    return load_causal_lm(
        model.model, model.dtype, "cpu", field=field, context_length=model.context_length, vocabulary=vocabulary
    )
