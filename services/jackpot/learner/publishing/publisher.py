"""Publishes weight versions, and exports the final models."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from jackpot.compute.hub_format import HubFormat
from jackpot.compute.model_weights import hub_format, write_state
from jackpot.config import JobSpec, ModelConfig
from jackpot.learner.trainer import BatchTrainer
from jackpot.storage.model_configuration import export_factors
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.weight_probe import METADATA_KEY, WeightProbe
from jackpot.storage.weights import WeightStore
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)

# Files that make a weights file a Hugging Face directory; those that the initial model has are copied.
MODEL_FILES: Sequence[str] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A copy of one version's weights, separate from the models, which continue to learn."""

    version: int
    states: Mapping[Role, State]
    """Of every model, by the model's own names."""
    probes: Mapping[Role, WeightProbe]
    obrs_lambda: float


class WeightPublisher:
    """Writes versions of policy and actor to the weight store.

    Args:
        job: the job as resolved.
        store: the job's weight store.
        run_dir: parent of ``export/``.
        checkpointed: returns the versions of all checkpoints, finished or in progress: downloads need them, so that
            they are kept as long as the checkpoint.
        broadcast: sends a version to the rollout replicas at once; without it they read it from the store.
    """

    def __init__(
        self,
        job: JobSpec,
        store: WeightStore,
        run_dir: Path,
        checkpointed: Callable[[], Collection[int]],
        broadcast: Callable[[int, State, WeightProbe | None], object] | None = None,
    ) -> None:
        self._job = job
        self._store = store
        self._broadcast = broadcast
        self._export_dir = RunFiles(run_dir).export
        self._checkpointed = checkpointed
        self._names: dict[Role, HubFormat] = {}

    def snapshot(self, trainer: BatchTrainer, version: int) -> Snapshot:
        """A copy of every role's current weights, for :meth:`publish` concurrently with the next step; a collective."""
        for role in trainer.models.keys() - self._names.keys():
            self._names[role] = hub_format(trainer.models[role])
        states: dict[Role, State] = {role: trainer.weights(role) for role in trainer.models}
        probes = {role: trainer.probe(role) for role in trainer.models}
        return Snapshot(version, states, probes, trainer.lambda_control.obrs_lambda)

    def publish(self, snapshot: Snapshot) -> None:
        """Write a snapshot as a version of every role; a no-op for an intact version that exists already.

        A version is announced once its files are durable. Before that it is broadcast, so that the replicas need not
        read it there.

        Raises:
            OSError: the disk is full or gone.
            ObjectStoreError: an object store refuses, or is out of reach for too long.
        """
        published = {role: self._names[role].to_hub(state) for role, state in snapshot.states.items()}
        sources = self._sources(published)
        if self._broadcast is not None:
            source = sources[self._job.rollout_role]
            self._broadcast(snapshot.version, published[source], _finite(snapshot.probes[source]))
        for role, source in sources.items():

            def write(directory: Path, state: State = published[source]) -> None:
                write_state(state, directory)

            metadata: dict[str, Any] = {"obrs_lambda": snapshot.obrs_lambda}
            if (probe := _finite(snapshot.probes[source])) is not None:
                metadata[METADATA_KEY] = probe.as_json()
            self._store.publish(role, snapshot.version, write, metadata)
            self._store.prune(role, self._job.weights.keep_versions, self._checkpointed())

    def export(self, trainer: BatchTrainer) -> None:
        """Write both models as Hugging Face directories under ``export/``, atomically each."""
        models: dict[Role, ModelConfig] = {"policy": self._job.policy, "actor": self._job.rollout_model}
        for role, source in self._sources(trainer.models).items():
            aside = self._export_dir / f".{role}.{os.getpid()}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for name in MODEL_FILES:
                file = Path(models[role].model) / name
                if file.exists():
                    shutil.copyfile(file, aside / name)
            export_factors(aside, models[role].context_length)
            write_state(hub_format(trainer.models[source]).to_hub(trainer.weights(source)), aside)
            final = self._export_dir / role
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)

    def _sources(self, trained: Iterable[Role]) -> dict[Role, Role]:
        """The source of each role's weights: itself, or the policy if the actor is the policy in a cheaper format."""
        sources: dict[Role, Role] = {role: role for role in trained}
        if not isinstance(self._job.actor, str) and self._job.actor.weights == "policy":
            sources["actor"] = "policy"
        return sources


def _finite(probe: WeightProbe) -> WeightProbe | None:
    """The probe; None of weights that give no finite log-probabilities. They say so themselves when they sample."""
    if all(map(math.isfinite, probe.logprobs)):
        return probe
    LOG.error("the weights give log-probabilities that are not finite")
    return None
