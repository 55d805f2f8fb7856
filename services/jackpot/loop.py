"""A whole job in one process: sample, score, learn, in turn. No services, no bus, no overlap.

The decoding loop, the scorer and the trainer are those of the services, called one after the other, on the same
prompts, with the same seeds. What the services leave to timing is exact here: a batch is sampled with weights that are
``staleness`` batches old and scored with weights that are ``scorer_staleness`` batches old. The result is a function of
the job alone (on one machine and with one number of threads).
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.model_weights import apply_state
from jackpot.compute.models import load_causal_lm, output_head
from jackpot.config import JobSpec
from jackpot.errors import ConfigError, PayloadError, ScoringError, WeightMissingError
from jackpot.learner.trainer import Trainer
from jackpot.orchestrator.dispatch import sampling_seed
from jackpot.orchestrator.evaluation import CORRECT
from jackpot.orchestrator.slots import PromptOrder
from jackpot.orchestrator.tasks import Item, build_task
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.rollout.engine import GroupRequest, Sampling
from jackpot.rollout.transformers.decode_batch import DecodeBatch
from jackpot.rollout.transformers.engine import eos_token_ids
from jackpot.rollout.transformers.rows import Row
from jackpot.scoring.batch import build_batch
from jackpot.scoring.group_scorer import GroupScorer, needs_actor
from jackpot.trajectory import Group, GroupKey, Trajectory

JOB_ID = "inline"
"""Of every inline job: trajectory ids, and with them masks and samples, are then the same under every setting."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run leaves. All times in seconds."""

    evaluations: tuple[tuple[int, float], ...]  # (optimizer step, the policy's held-out accuracy), step 0 first
    steps: tuple[Mapping[str, float], ...]  # the figures of each optimizer step, as in metrics.jsonl
    train_seconds: float  # without loading and evaluations
    num_trajectories: int  # trained on
    failure: str | None = None  # why training ended early; the last accuracy then stands for the rest


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """Weights as they were after ``version`` optimizer steps."""

    version: int
    policy: Mapping[str, Tensor]
    actor: Mapping[str, Tensor] | None  # None where the policy samples
    obrs_lambda: float


@dataclass(slots=True, eq=False)
class _Target:
    """Implements :class:`jackpot.scoring.group_scorer.Target`: the policy at the version that scores."""

    model: PreTrainedModel
    obrs_lambda: float
    version: int | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""
        return len(output_head(self.model).weight)


@dataclass(slots=True, eq=False)
class _Actors:
    """Implements :class:`jackpot.scoring.group_scorer.Actors`: the one version that sampled the batch."""

    model: PreTrainedModel
    version: int = 0

    def at(self, version: int) -> PreTrainedModel:
        """The model that sampled with ``version``.

        Raises:
            WeightMissingError: another version sampled.
        """
        if version != self.version:
            raise WeightMissingError(f"version {version} of the actor is gone; {self.version} is here.")
        return self.model


class Loop:
    """All parts of a job, taking turns.

    Args:
        job: the job as resolved: models are directories.
        staleness: how many batches old the weights are that sample.
        scorer_staleness: how many batches old those are that score, at most as old as the former.

    Raises:
        ConfigError: the job asks for what only the services do.
    """

    def __init__(self, job: JobSpec, *, staleness: int, scorer_staleness: int) -> None:
        check_job(job, staleness, scorer_staleness)
        torch.manual_seed(job.seed)
        self.job = job
        self._task = build_task(job.task, job.seed)
        self._order = PromptOrder(self._task.num_prompts, job.seed)
        self._tokenizer = PromptTokenizer.of_job(job)
        self._stop_ids = self._tokenizer.stop_token_ids(job.sampling.stop)
        policy = load_causal_lm(job.policy.model, job.policy.dtype, "cpu", field="policy.model")
        self.actor: PreTrainedModel | None = None
        if not isinstance(job.actor, str):
            self.actor = load_causal_lm(job.actor.model, job.actor.dtype, "cpu", field="actor.model")
        self.trainer = Trainer(job, policy, self.actor)
        self.policy = policy
        # Copies hold past weights; with no staleness the models themselves serve.
        self._sampler = copy.deepcopy(self.actor or policy) if staleness else self.actor or policy
        self._target = _Target(copy.deepcopy(policy) if scorer_staleness else policy, self.trainer.controls.obrs_lambda)
        self._actors = _Actors(self._sampler) if needs_actor(job) else None
        self._scorer = GroupScorer(job, self._target, self._actors)
        self._scorer_staleness = scorer_staleness
        self._eval_items = self._task.eval_items(job.evaluation.prompts)
        self.step = 0
        self.batch = 0
        # The newest last; before the first update all are the initial weights.
        self._past = deque([self._snapshot()] * (staleness + 1), maxlen=staleness + 1)

    def train_batch(self) -> list[dict[str, float]]:
        """Sample, score and train on the next batch; the figures of each optimizer step.

        Raises:
            ScoringError: the policy's probabilities are not finite any more.
            PayloadError: the same of the actor's.
        """
        old, scoring = self._past[0], self._past[-1 - self._scorer_staleness]
        if len(self._past) > 1:
            apply_state(self._sampler, old.policy if old.actor is None else old.actor)
        if self._scorer_staleness:
            apply_state(self._target.model, scoring.policy)
        self._target.version, self._target.obrs_lambda = scoring.version, scoring.obrs_lambda
        if self._actors is not None:
            self._actors.version = old.version
        groups = self._sample_batch(old.version)
        scored = self._scorer.score_groups(groups)
        rows = self.trainer.train_batch(build_batch(scored, self.job.algorithm.advantage), self.step)
        self.step += len(rows)
        self.batch += 1
        self._past.append(self._snapshot())
        return rows

    def evaluate(self) -> float:
        """Accuracy of the policy's own samples on the held-out prompts."""
        samples = self.job.evaluation.samples_per_prompt
        requests = [
            self._request(
                f"evaluation.p{index}", item, f"evaluation {index}", samples, self.job.evaluation.temperature, 0
            )
            for index, item in enumerate(self._eval_items)
        ]
        answers = generate(self.policy, requests, self.step, self.job.rollout.max_batch_size)
        rewards = [
            self._task.reward(item, self._tokenizer.decode(trajectory.token_ids))
            for item, trajectories in zip(self._eval_items, answers, strict=True)
            for trajectory in trajectories
        ]
        return float(np.mean([reward >= CORRECT for reward in rewards]))

    def _sample_batch(self, version: int) -> list[Group]:
        size, sampling = self.job.learner.groups_per_batch, self.job.sampling
        keys = [GroupKey(slot, *self._order.prompt(slot)) for slot in range(self.batch * size, (self.batch + 1) * size)]
        items = [self._task.train_prompt(key.prompt_index) for key in keys]
        ids = [key.group_id(JOB_ID) for key in keys]
        requests = [
            self._request(
                group_id, item, group_id, sampling.group_size, sampling.temperature, self.job.rollout.top_logprobs
            )
            for group_id, item in zip(ids, items, strict=True)
        ]
        answers = generate(self._sampler, requests, version, self.job.rollout.max_batch_size)
        return [
            Group(
                group_id=request.group_id,
                prompt_index=key.prompt_index,
                prompt_token_ids=request.prompt_token_ids,
                trajectories=tuple(
                    replace(t, reward=float(self._task.reward(item, self._tokenizer.decode(t.token_ids))))
                    for t in trajectories
                ),
                temperature=sampling.temperature,
                dispatch_version=version,
            )
            for key, item, request, trajectories in zip(keys, items, requests, answers, strict=True)
        ]

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
                top_logprobs=min(top_logprobs, self._target.vocabulary),
                seed=sampling_seed(self.job.seed, seed_name),
            ),
        )

    def _snapshot(self) -> _Snapshot:
        # Without staleness nobody reads the weights of a snapshot.
        def copied(model: PreTrainedModel) -> Mapping[str, Tensor]:
            return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} if stale else {}

        stale = self._sampler is not (self.actor or self.policy)
        actor = None if self.actor is None else copied(self.actor)
        return _Snapshot(self.step, copied(self.policy), actor, self.trainer.controls.obrs_lambda)


def run_loop(loop: Loop, on_evaluation: Callable[[int, float], object] = lambda step, accuracy: None) -> Curve:
    """Train a job from its first to its last step.

    Args:
        loop: not trained yet.
        on_evaluation: told of each evaluation.
    """
    job = loop.job
    evaluations, steps, seconds = list[tuple[int, float]](), list[dict[str, float]](), 0.0
    failure: str | None = None

    def evaluate(accuracy: float) -> None:
        evaluations.append((loop.step, accuracy))
        on_evaluation(*evaluations[-1])

    evaluate(loop.evaluate())
    while loop.batch < job.num_batches:
        before, started = loop.step, time.perf_counter()
        try:
            steps += loop.train_batch()
        except (ScoringError, PayloadError) as error:  # numbers that are not finite any more
            failure = str(error)
            evaluations.append((job.learner.steps, evaluations[-1][1]))
            break
        seconds += time.perf_counter() - started
        if loop.step // job.evaluation.every > before // job.evaluation.every or loop.batch == job.num_batches:
            evaluate(loop.evaluate())
    trained = loop.batch * job.learner.groups_per_batch * job.sampling.group_size
    return Curve(tuple(evaluations), tuple(steps), seconds, trained, failure)


@torch.inference_mode()
def generate(
    model: PreTrainedModel, requests: Sequence[GroupRequest], version: int, max_rows: int
) -> list[list[Trajectory]]:
    """Sample groups to their ends; the trajectories of each request, in order.

    Args:
        model: what samples.
        requests: the groups.
        version: stamped on every token.
        max_rows: trajectories decoded together, whole groups at a time.
    """
    found: dict[str, Trajectory] = {}
    batch = DecodeBatch(model, eos_token_ids(model))
    waiting = deque(requests)
    while waiting or batch.rows:
        joining: list[Row] = []
        while waiting and (
            not batch.rows + joining or len(batch.rows) + len(joining) + waiting[0].num_trajectories <= max_rows
        ):
            request = waiting.popleft()
            joining += [Row(request, index, [(version, 0)]) for index in range(request.num_trajectories)]
        if joining:
            batch.add(joining)
        found.update((trajectory.trajectory_id, trajectory) for _, trajectory in batch.step())
    return [[found[f"{r.group_id}#{index}"] for index in range(r.num_trajectories)] for r in requests]


def check_job(job: JobSpec, staleness: int, scorer_staleness: int) -> None:
    """Refuse what the services can do and this loop cannot, instead of quietly doing something else.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    if not 0 <= scorer_staleness <= staleness:
        raise ConfigError(
            "scorer_staleness", scorer_staleness, "is not between 0 and staleness", f"Use at most {staleness}."
        )
    actor = None if isinstance(job.actor, str) else job.actor
    settings: dict[str, tuple[object, object]] = {
        "algorithm.advantage.filter_zero_variance": (job.algorithm.advantage.filter_zero_variance, False),
        "actor.weights": (actor.weights if actor else "own", "own"),
        "actor.quantization": (actor.quantization if actor else None, None),
        "actor.kv_cache_dtype": (actor.kv_cache_dtype if actor else "auto", "auto"),
    }
    for name, (value, known) in settings.items():
        if value != known:
            raise ConfigError(name, value, "needs the services", f"Leave it at {known!r}, or use execution: pipeline.")
