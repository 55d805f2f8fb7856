"""The canary: of each weight version a few sampled tokens, passed again through the very version that sampled them.

An engine that says that it has a version and computes with another, or with a version that arrived damaged, samples on
without an error, and importance ratios hide it. Here it shows: log p_inf as the engine recorded it must be what the
learner's own copy of that version says. A token's prefix may hold tokens of older versions: engines recompute their
attention cache at each swap, so that every log-probability is that of its version given all tokens before it.

The learner has the current version in its model. Older ones that may still be in flight stay in host memory, as many as
``orchestrator.max_staleness`` allows for; of a sharded model each rank keeps its shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.vocabulary import token_logprobs
from jackpot.compute.models import output_head
from jackpot.compute.pass_layout import PassLayout
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.held_tensors import HeldTensors
from jackpot.compute.ranks.partition import plan_share
from jackpot.compute.ranks.sharding import DTYPES, release
from jackpot.config import JobSpec
from jackpot.scoring.batch import Batch, SequenceSlice
from jackpot.scoring.passes import ModelPasses

TOKENS_PER_SEQUENCE = 32
"""Of a part that one version sampled this many are looked at: the later ones cost attention, and say no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is passed again through one version."""

    version: int
    parts: Sequence[SequenceSlice]  # their tokens are [start, end) of ``actor_logprobs``
    actor_logprobs: Tensor  # [n] float32, log p_inf as the engine recorded it


class Canary:
    """Holds sampled tokens against the version that sampled them.

    Args:
        job: the job as resolved.
        model: what the rollout service samples with, as the learner computes with it: ω, or θ where it samples.
        layout: of its passes.
        ranks: over which the model is sharded; all of them are to call :meth:`check` alike.
    """

    def __init__(self, job: JobSpec, model: PreTrainedModel, layout: PassLayout, ranks: Ranks = SOLO) -> None:
        self._job = job
        self._model = model
        self._layout = layout
        self._ranks = ranks
        self._held_tensors = HeldTensors(model)
        from_policy = isinstance(job.actor, str) or job.actor.weights == "policy"
        self._dtype = DTYPES[job.policy.dtype if from_policy else job.rollout_model.dtype]
        self._kept: dict[int, Mapping[str, Tensor]] = {}

    def check(self, batch: Batch, first_step: int) -> dict[str, float]:
        """The figures of a batch, before its first update; a collective.

        Args:
            batch: with every token on rank 0.
            first_step: the step that the batch begins with, which is the version that the model now holds.

        Returns:
            Columns of ``metrics.jsonl``; none where no version that sampled is at hand.
        """
        limit = self._job.alarms.canary_sequences
        if not limit:
            return {}
        samples: list[Sample] = []
        if self._ranks.rank == 0:
            samples = sampled_parts(batch, {*self._kept, first_step}, limit, first_step)
        with self._versions(first_step) as change:
            differences = []
            for sample in _on_all_ranks(samples, self._ranks):
                change(sample.version)
                differences.append(self._logprobs(sample, batch.temperature) - sample.actor_logprobs)
        self._keep(first_step)
        if not differences:
            return {}
        difference = torch.cat(differences).double()
        return {
            "rollout/canary_max_difference": float(difference.abs().max()),
            "rollout/canary_rms_difference": float(difference.square().mean().sqrt()),
            "rollout/canary_tokens": float(len(difference)),
        }

    def _keep(self, current: int) -> None:
        """Keep the current version as long as tokens that it samples may come, and no longer."""
        oldest = current + self._job.learner.updates_per_batch - self._job.orchestrator.max_staleness
        self._kept = {version: state for version, state in self._kept.items() if version >= oldest}
        if current >= oldest:
            self._kept[current] = self._held_tensors.copied(self._dtype)

    @torch.no_grad()
    def _logprobs(self, sample: Sample, temperature: float) -> Tensor:
        """log-probabilities of the sampled tokens under the version that the model holds, [n] float32."""
        lengths = [part.num_inputs for part in sample.parts]
        passes = plan_share(
            lengths, [range(len(lengths))], 0, self._job.learner.max_batch_tokens, packed=self._layout.packed
        )
        logprobs = torch.zeros(len(sample.actor_logprobs))
        ids = torch.from_numpy(np.concatenate([part.input_ids[part.prompt_length :] for part in sample.parts]))
        for places, hidden in ModelPasses(self._model, sample.parts, passes, self._layout.states).hidden():
            scores = token_logprobs(
                hidden,
                output_head(self._model),
                ids[places].to(hidden.device),
                temperature=temperature,
                chunk_tokens=self._job.scorer.chunk_tokens,
            )
            logprobs[places] = scores.logprobs.float().cpu()
        release(self._model)
        return logprobs

    @contextmanager
    def _versions(self, current: int) -> Iterator[Callable[[int], None]]:
        """Gives what brings a version into the model. Afterwards it has its own weights again, to the bit."""
        current_state: Mapping[str, Tensor] | None = None

        def change(version: int) -> None:
            nonlocal current_state
            if version == current and current_state is None:
                return
            if current_state is None:
                current_state = self._held_tensors.copied()
            self._held_tensors.apply(current_state if version == current else self._kept[version])

        try:
            yield change
        finally:
            if current_state is not None:
                release(self._model)
                self._held_tensors.apply(current_state)


def sampled_parts(batch: Batch, versions: set[int], limit: int, seed: int) -> list[Sample]:
    """What is passed again of each version: one short part of each of ``limit`` groups.

    One a group, since replicas sample whole groups, and one of them may be alone in its fault; in turn, since there may
    be more groups than are looked at.

    Args:
        batch: with all tokens.
        versions: those that are at hand.
        limit: groups looked at for each version.
        seed: which group comes first.
    """
    by_version: dict[int, list[SequenceSlice]] = {}
    bounds = [*batch.group_starts, len(batch.sequences)]
    num_groups = len(batch.group_starts)
    for group in ((seed * limit + index) % num_groups for index in range(num_groups)):
        shortest: dict[int, SequenceSlice] = {}
        for number in range(bounds[group], bounds[group + 1]):
            for span in batch.version_spans[number]:
                if span.version not in versions:
                    continue
                part = batch.sequences[number].part(span.start, min(span.end, span.start + TOKENS_PER_SEQUENCE))
                if span.version not in shortest or part.num_inputs < shortest[span.version].num_inputs:
                    shortest[span.version] = part
        for version, part in shortest.items():
            if len(by_version.setdefault(version, [])) < limit:
                by_version[version].append(part)
    return [_sample(version, parts, batch.tokens.actor_logprobs) for version, parts in sorted(by_version.items())]


def _sample(version: int, parts: Sequence[SequenceSlice], actor_logprobs: Tensor) -> Sample:
    """The parts with their tokens one after the other."""
    moved, end = [], 0
    for part in parts:
        start, end = end, end + part.end - part.start
        moved.append(SequenceSlice(part.trajectory_id, part.input_ids, part.prompt_length, start, end))
    return Sample(version, moved, torch.cat([actor_logprobs[part.start : part.end] for part in parts]))


def _on_all_ranks(samples: list[Sample], ranks: Ranks) -> list[Sample]:
    """Rank 0's samples on every rank."""
    if ranks.size == 1:
        return samples
    sent = [
        [
            sample.version,
            [[p.trajectory_id, p.input_ids.tolist(), p.prompt_length, p.start, p.end] for p in sample.parts],
            sample.actor_logprobs.tolist(),
        ]
        for sample in samples
    ]
    return [
        Sample(
            version,
            [SequenceSlice(name, np.array(ids, dtype=np.int64), *where) for name, ids, *where in parts],
            torch.tensor(logprobs),
        )
        for version, parts, logprobs in json.loads(ranks.broadcast(json.dumps(sent).encode()))
    ]
