"""Both models over stored trajectories, once, for every λ at the same time.

The weights are those of the very versions that sampled and scored, from the run's weight store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from jackpot.compute.batching import ModelPass
from jackpot.compute.common_vocabulary import common_vocabulary
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import load_state
from jackpot.compute.models import resolve_device
from jackpot.config import JobSpec
from jackpot.scoring.batch import SequenceSlice, parts_by_version, sequences_of, token_arrays
from jackpot.scoring.passes import ModelPasses, ScoringRule
from jackpot.scoring.score import Readings, read_models
from jackpot.storage.job_storage import weight_store_of_run
from jackpot.storage.run_directory import RunFiles
from jackpot.trajectory import Role, ScoredGroup


class StoredModel:
    """One role's model with the weights of one version after the other.

    Args:
        job: the job as resolved.
        run_dir: its run directory.
        role: whose weights.
    """

    def __init__(self, job: JobSpec, run_dir: Path, role: Role) -> None:
        config = job.policy if role == "policy" else job.rollout_model
        device = resolve_device(job.scorer.device, field="scorer.device")
        self._model = load_causal_lm(
            config.model,
            config.dtype,
            device,
            field=f"{role}.model",
            context_length=config.context_length,
            vocabulary=common_vocabulary(job),
        )
        self._store = weight_store_of_run(run_dir, RunFiles(run_dir).scratch / f"weights-replay-{role}")
        self._role: Role = role
        self._version: int | None = None

    def at(self, version: int) -> PreTrainedModel:
        """The model as of ``version``, until the next call.

        Raises:
            WeightMissingError: the store does not hold that version any more.
            WeightCorruptError: its bytes are damaged.
        """
        if version != self._version:
            load_state(self._model, self._store.open(self._role, version))
            self._version = version
        return self._model


def read_stored(
    job: JobSpec, scored: ScoredGroup, policy: StoredModel, actor: StoredModel, lambdas: Sequence[float]
) -> Readings:
    """Look at whole rows of both models at every token of a group.

    Args:
        job: the job; its normalizer, top-k and slices.
        scored: the group.
        policy: the target.
        actor: who sampled.
        lambdas: every λ asked about.

    Raises:
        WeightMissingError: a version that sampled or scored is gone.
    """
    sequences = sequences_of([scored.group])

    def actors() -> Iterator[ModelPasses]:
        for version, parts in parts_by_version([scored.group], sequences).items():
            yield _in_one_pass(actor.at(version), [part for _, part in parts])

    return read_models(
        token_arrays([scored], np.zeros(scored.group.num_tokens)),
        _in_one_pass(policy.at(scored.policy_version), sequences),
        ScoringRule.of_job(job, scored.group.temperature, whole_rows=True),
        lambdas,
        actors(),
    )


def _in_one_pass(model: PreTrainedModel, sequences: Sequence[SequenceSlice]) -> ModelPasses:
    return ModelPasses(model, sequences, [ModelPass(tuple(range(len(sequences))), (1,) * len(sequences))])
