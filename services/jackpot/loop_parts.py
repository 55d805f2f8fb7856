"""What serves :mod:`jackpot.loop`: past weights, requests, decoding to the end, views of a step, the check of a job."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.model_weights import apply_state
from jackpot.compute.models import output_head
from jackpot.config import JobSpec
from jackpot.errors import ConfigError, WeightMissingError
from jackpot.orchestrator.dispatch import sampling_seed
from jackpot.orchestrator.tasks import Item
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.rollout.engine import GroupRequest, Sampling
from jackpot.rollout.transformers.decode_batch import DecodeBatch
from jackpot.rollout.transformers.engine import eos_token_ids
from jackpot.rollout.transformers.rows import Row
from jackpot.scoring.batch import Batch
from jackpot.scoring.token_weights import TokenWeights
from jackpot.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run leaves. All times in seconds."""

    evaluations: tuple[tuple[int, float], ...]  # (optimizer step, the policy's held-out accuracy), step 0 first
    steps: tuple[Mapping[str, float], ...]  # the figures of each optimizer step, as in metrics.jsonl
    train_seconds: float  # without loading and evaluations
    num_trajectories: int  # trained on
    failure: str | None = None  # why training ended early; the last accuracy then stands for the rest


@dataclass(frozen=True, slots=True, eq=False)
class WeighedTokens:
    """The N tokens of an optimizer step and what multiplies their losses."""

    batch: Batch
    weights: TokenWeights

    def of(self, trajectory: Trajectory) -> TokenWeights:
        """Weight, mask, Z and the rest of one trajectory's T tokens, [T] each."""
        slices = [sequence for sequence in self.batch.sequences if sequence.trajectory_id == trajectory.trajectory_id]
        if not slices:
            raise KeyError(f"{trajectory.trajectory_id} is in another optimizer step of the batch, or in none")
        return self.weights.select(torch.arange(slices[0].start, slices[0].end))


@dataclass(slots=True, eq=False)
class Target:
    """Implements :class:`jackpot.scoring.group_scorer.Target`: the policy at the version that scores."""

    model: PreTrainedModel
    obrs_lambda: float
    version: int | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""
        return len(output_head(self.model).weight)


@dataclass(slots=True, eq=False)
class Sampler:
    """What samples, at one version. Implements :class:`jackpot.scoring.group_scorer.Actors`."""

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


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """Weights as they were after ``version`` optimizer steps; empty where nothing is ever stale."""

    version: int
    policy: Mapping[str, Tensor]
    sampler: Mapping[str, Tensor]
    obrs_lambda: float


class PastWeights:
    """θ and ω as they were some batches ago. With no staleness the models themselves serve, and nothing is copied.

    Args:
        policy: θ, which goes on learning.
        sampler: what samples: ω, or θ itself.
        staleness: how many batches old the weights are that sample.
        reference_age: how many batches old those are that score.
        obrs_lambda: λ of the initial weights.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        sampler: PreTrainedModel,
        staleness: int,
        reference_age: int,
        obrs_lambda: float,
    ) -> None:
        self._models = policy, sampler
        self._reference_age = reference_age
        self.sampler = Sampler(copy.deepcopy(sampler) if staleness else sampler)
        self.target = Target(copy.deepcopy(policy) if reference_age else policy, obrs_lambda)
        # The newest last; before the first update all are the initial weights.
        self._snapshots: deque[_Snapshot] = deque(maxlen=staleness + 1)
        for _ in range(staleness + 1):
            self.remember(0, obrs_lambda)

    def remember(self, version: int, obrs_lambda: float) -> None:
        """Note the models' weights as those of ``version``; the oldest are forgotten."""
        stale = self.sampler.model is not self._models[1]
        policy = _copied(self._models[0]) if stale else {}
        sampler = _copied(self._models[1]) if stale and self._models[1] is not self._models[0] else policy
        self._snapshots.append(_Snapshot(version, policy, sampler, obrs_lambda))

    def load_sampler(self) -> Sampler:
        """What samples the next batch."""
        old = self._snapshots[0]
        if old.sampler:
            apply_state(self.sampler.model, old.sampler)
        self.sampler.version = old.version
        return self.sampler

    def load_target(self) -> Target:
        """What scores the next batch."""
        old = self._snapshots[-1 - self._reference_age]
        if self._reference_age:
            apply_state(self.target.model, old.policy)
        self.target.version, self.target.obrs_lambda = old.version, old.obrs_lambda
        return self.target


def _copied(model: PreTrainedModel) -> Mapping[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Prompts:
    """A job's prompts as requests to sample, and completions as text.

    Args:
        job: the job as resolved.
        vocabulary: V, the number of token ids.
    """

    def __init__(self, job: JobSpec, vocabulary: int) -> None:
        self._job = job
        self._vocabulary = vocabulary
        self._tokenizer = PromptTokenizer.of_job(job)
        self._stop_ids = self._tokenizer.stop_token_ids(job.sampling.stop)

    def text(self, token_ids: NDArray[np.uint32]) -> str:
        """Tokens as text."""
        return self._tokenizer.decode(token_ids)

    def train_request(self, group_id: str, item: Item) -> GroupRequest:
        """For a group to train on."""
        sampling = self._job.sampling
        top_logprobs = min(self._job.rollout.top_logprobs, self._vocabulary)
        return self._request(group_id, item, group_id, sampling.group_size, sampling.temperature, top_logprobs)

    def eval_request(self, index: int, item: Item) -> GroupRequest:
        """For the answers to a held-out prompt."""
        evaluation = self._job.evaluation
        name, seed_name = f"evaluation.p{index}", f"evaluation {index}"
        return self._request(name, item, seed_name, evaluation.samples_per_prompt, self._job.evaluation_temperature, 0)

    def _request(
        self, group_id: str, item: Item, seed_name: str, count: int, temperature: float, top_logprobs: int
    ) -> GroupRequest:
        return GroupRequest(
            group_id=group_id,
            prompt_token_ids=self._tokenizer.encode_prompt(item.prompt),
            num_trajectories=count,
            sampling=Sampling(
                temperature=temperature,
                max_tokens=self._job.sampling.max_tokens,
                stop_token_ids=self._stop_ids,
                top_logprobs=top_logprobs,
                seed=sampling_seed(self._job.seed, seed_name),
            ),
        )


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
    trajectories: dict[str, Trajectory] = {}
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
        trajectories.update((trajectory.trajectory_id, trajectory) for _, trajectory in batch.step())
    return [[trajectories[f"{r.group_id}#{index}"] for index in range(r.num_trajectories)] for r in requests]


def check_job(job: JobSpec, staleness: int, reference_age: int) -> None:
    """Refuse what the services can do and this loop cannot, instead of quietly doing something else.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    if not 0 <= reference_age <= staleness:
        raise ConfigError("reference_age", reference_age, "is not between 0 and staleness", f"Use at most {staleness}.")
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
