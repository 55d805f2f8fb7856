"""What serves :mod:`jackpot.loop`: past weights, views of an optimizer step, the check of a job."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.model_weights import apply_state
from jackpot.compute.models import vocabulary_size
from jackpot.config import JobSpec
from jackpot.errors import ConfigError, WeightMissingError
from jackpot.scoring.batch import Batch
from jackpot.scoring.token_weights import TokenWeights
from jackpot.trajectory import Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class WeighedTokens:
    """The N tokens of an optimizer step and their weights."""

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
    """The policy at the version that scores. Implements :class:`jackpot.scoring.group_scorer.Target`."""

    model: PreTrainedModel
    obrs_lambda: float
    version: int | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""
        return vocabulary_size(self.model)


@dataclass(slots=True, eq=False)
class Sampler:
    """The model that samples, at one version. Implements :class:`jackpot.scoring.group_scorer.Actors`."""

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
    """θ and ω as they were some batches ago. Without staleness the models themselves are used and nothing is copied.

    Args:
        policy: θ, which continues learning.
        sampler: the model that samples: ω, or θ itself.
        staleness: how many batches old the weights that sample are.
        reference_age: how many batches old the weights that score are.
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
        """Keep the models' present weights as those of ``version``, and drop the oldest."""
        stale = self.sampler.model is not self._models[1]
        policy = _copied(self._models[0]) if stale else {}
        sampler = _copied(self._models[1]) if stale and self._models[1] is not self._models[0] else policy
        self._snapshots.append(_Snapshot(version, policy, sampler, obrs_lambda))

    def load_sampler(self) -> Sampler:
        """The model that samples the next batch."""
        old = self._snapshots[0]
        if old.sampler:
            apply_state(self.sampler.model, old.sampler)
        self.sampler.version = old.version
        return self.sampler

    def load_target(self) -> Target:
        """The model that scores the next batch."""
        old = self._snapshots[-1 - self._reference_age]
        if self._reference_age:
            apply_state(self.target.model, old.policy)
        self.target.version, self.target.obrs_lambda = old.version, old.obrs_lambda
        return self.target


def _copied(model: PreTrainedModel) -> Mapping[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_job(job: JobSpec, staleness: int, reference_age: int) -> None:
    """Refuse settings that only the services support.

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
