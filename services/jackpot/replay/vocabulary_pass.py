"""Both models over stored trajectories, once, for every λ at the same time: Z and the divergences.

The weights are those of the very versions that sampled and scored, from the run's weight store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.diagnostics import exact_kl_before_and_after
from jackpot.algorithm.normalizer import Candidates, NormalizerName, estimate_normalizer, full_normalizer
from jackpot.algorithm.vocabulary import iterate_logprobs
from jackpot.compute.forward import completion_hidden
from jackpot.compute.model_weights import load_state
from jackpot.compute.models import load_causal_lm, output_head, resolve_device
from jackpot.config import JobSpec
from jackpot.storage.job_storage import weight_store_of_run
from jackpot.trajectory import Role, ScoredGroup


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PerLambda:
    """What one λ makes of N tokens; float32."""

    exact_normalizer: Tensor  # [N], over the whole vocabulary
    head: Tensor  # [N], of the estimator asked for
    tail: Tensor  # [N]
    mass: Tensor  # [N]
    kl_after: Tensor  # [N], KL(p_t ‖ p'_inf), exact


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class VocabularyPass:
    """N tokens of a batch, as both models see them."""

    kl_before: Tensor  # [N], KL(p_t ‖ p_inf), exact
    by_lambda: dict[float, PerLambda]


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
        self._model = load_causal_lm(config.model, config.dtype, device, field=f"{role}.model")
        self._store = weight_store_of_run(run_dir, run_dir / "scratch" / f"weights-replay-{role}")
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


@torch.no_grad()
def vocabulary_pass(
    job: JobSpec,
    groups: Sequence[ScoredGroup],
    policy: StoredModel,
    actor: StoredModel,
    lambdas: Sequence[float],
    normalizer: NormalizerName,
    target_top_k: int,
) -> VocabularyPass:
    """Look at whole rows of both models at every token of a batch.

    Args:
        job: the job; its top-k and slices.
        groups: the batch.
        policy: the target.
        actor: who sampled.
        lambdas: every λ asked about.
        normalizer: which estimator's ingredients to make beside the exact Z.
        target_top_k: how many of the target's own candidates the estimator looks at.

    Raises:
        WeightMissingError: a version that sampled or scored is gone.
    """
    num_tokens = sum(scored.group.num_tokens for scored in groups)
    kl_before = torch.empty(num_tokens)
    by_lambda = {
        each: PerLambda(**{name: torch.empty(num_tokens) for name in PerLambda.__dataclass_fields__})
        for each in lambdas
    }
    offset = 0
    for scored in groups:
        for own, p_target, p_actor in _rows(scored, policy, actor, job.scorer.chunk_tokens):
            where = offset + own
            candidates = None
            if normalizer != "full":
                candidates = _candidates(p_target, p_actor, job.rollout.top_logprobs, target_top_k)
            for each, found in by_lambda.items():
                before, after = exact_kl_before_and_after(p_target, p_actor, each)
                exact = full_normalizer(p_target, p_actor, each)
                parts = exact if candidates is None else estimate_normalizer(normalizer, candidates, each)
                found.exact_normalizer[where], found.kl_after[where] = exact.head.cpu(), after.cpu()
                found.head[where], found.tail[where] = parts.head.cpu(), parts.tail.cpu()
                found.mass[where], kl_before[where] = parts.mass.cpu(), before.cpu()
        offset += scored.group.num_tokens
    return VocabularyPass(kl_before=kl_before, by_lambda=by_lambda)


def _rows(
    scored: ScoredGroup, policy: StoredModel, actor: StoredModel, chunk_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Where in the group's tokens, and log-probabilities of both models there: [c], [c, V], [c, V], by slices."""
    group = scored.group
    prompt = group.prompt_token_ids.astype(np.int64)
    sequences = [np.concatenate([prompt, t.token_ids.astype(np.int64)]) for t in group.trajectories]
    lengths = [len(prompt)] * len(sequences)
    spans = [span for trajectory in group.trajectories for span in trajectory.version_spans]
    versions = torch.cat([torch.full((span.end - span.start,), span.version) for span in spans])
    target_model = policy.at(scored.policy_version)
    target_hidden, target_head = completion_hidden(target_model, sequences, lengths), output_head(target_model)
    for version in sorted({span.version for span in spans}):
        model = actor.at(version)
        own = torch.nonzero(versions == version)[:, 0]
        actor_hidden = completion_hidden(model, sequences, lengths)[own]
        by_slices = partial(iterate_logprobs, temperature=group.temperature, chunk_tokens=chunk_tokens)
        target_rows = by_slices(target_hidden[own], target_head)
        actor_rows = by_slices(actor_hidden, output_head(model))
        for (part, p_target), (_, p_actor) in zip(target_rows, actor_rows, strict=True):
            yield own[part], p_target, p_actor


def _candidates(p_target: Tensor, p_actor: Tensor, actor_top_k: int, target_top_k: int) -> Candidates:
    """What an estimator gets to see: the actor's top-k in the precision of the wire, and the target's own."""
    vocabulary = p_target.shape[-1]
    actor = p_actor.topk(min(actor_top_k, vocabulary), dim=-1)
    target = p_target.topk(min(target_top_k, vocabulary), dim=-1)
    return Candidates(
        actor_ids=actor.indices,
        actor_logprobs=actor.values.half().float(),
        target_logprobs_on_actor=p_target.gather(1, actor.indices),
        target_ids=target.indices,
        target_logprobs=target.values,
        actor_logprobs_on_target=p_actor.gather(1, target.indices),
    )
