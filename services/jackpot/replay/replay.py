"""A stored batch under other settings: one row of figures for each λ, or one for a correction without λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from jackpot.algorithm.obrs import acceptance_mask, acceptance_probs, acceptance_uniforms
from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.config import JackpotCorrection, JobSpec
from jackpot.errors import ConfigError, WeightError
from jackpot.learner.reports.step_metrics import mismatch_figures
from jackpot.replay.vocabulary_pass import PerLambda, StoredModel, VocabularyPass, vocabulary_pass
from jackpot.scoring.batch import Batch, TokenArrays, build_batch
from jackpot.scoring.token_weights import reference_target_weights
from jackpot.trajectory import DEFERRED, ScoredGroup

LAMBDAS = (0.25, 0.5, 1.0, 2.0, 4.0)

BATCH_MEAN = "batch mean"
"""Where the weights are gone, what stands for Z."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay found. Each row holds columns of ``metrics.jsonl``, and ``obrs_lambda`` where there is one."""

    correction: str
    batches: list[int]
    num_tokens: int
    normalizer: str  # where Z comes from: the estimator's name, or "batch mean" where the weights are gone
    notes: list[str]
    rows: list[dict[str, float]]


def replay(run_dir: Path, job: JobSpec, lambdas: Sequence[float] = LAMBDAS) -> Replay:
    """Recompute weights, acceptance and diagnostics of a run's kept trajectories.

    p_ref and p_inf of the sampled tokens are those stored. Z at another λ than the scorer's needs both models: they are
    loaded from the run's weight store. Where their versions have been deleted meanwhile, each token gets the mean
    acceptance as its Z, which is right on average over the batch only.

    Args:
        run_dir: the run directory.
        job: its job, with the settings to try; the target is always the reference.
        lambdas: for jackpot, every λ to try.

    Raises:
        ConfigError: the run kept no trajectories, or they lack what was asked for.
        PayloadError: a kept group is damaged.
    """
    kept = KeptTrajectories(run_dir, job.bus.max_payload_bytes)
    batches = kept.batches()
    groups = [group for batch in batches for group in kept.read(batch)]
    if not groups:
        raise ConfigError(
            "RUN_DIR", str(run_dir), "holds no trajectories", "Run the job with run.keep_trajectories of at least 1."
        )
    if any(group.normalizer == DEFERRED for group in groups):
        problem = "holds trajectories without scores (scorer.reuse_reference)"
        raise ConfigError("RUN_DIR", str(run_dir), problem, "Run the job without it, for as many steps as you look at.")
    correction, notes = job.algorithm.correction, list[str]()
    batch = replace(build_batch(groups, job.algorithm.advantage), exact_kl=None)
    if not isinstance(correction, JackpotCorrection):
        figures = mismatch_figures(batch, reference_target_weights(batch.tokens, correction))
        return Replay(correction.name, batches, batch.num_tokens, "none", notes, [figures])
    if correction.target == "policy":
        notes.append("target = policy is replayed as target = reference: the trajectories are scored, not trained on")
    found = _models_pass(run_dir, job, correction, groups, lambdas, notes)
    rows = [
        _row(batch, correction, each, job.seed, found.by_lambda[each] if found else None, found) for each in lambdas
    ]
    name = correction.normalizer if found else BATCH_MEAN
    return Replay(correction.name, batches, batch.num_tokens, name, notes, rows)


def _models_pass(
    run_dir: Path,
    job: JobSpec,
    correction: JackpotCorrection,
    groups: Sequence[ScoredGroup],
    lambdas: Sequence[float],
    notes: list[str],
) -> VocabularyPass | None:
    try:
        policy, actor = StoredModel(job, run_dir, "policy"), StoredModel(job, run_dir, job.rollout_role)
        return vocabulary_pass(job, groups, policy, actor, lambdas, correction.normalizer, correction.top_k)
    except (WeightError, ConfigError) as error:
        notes.append(f"Z is the batch's mean acceptance, because the models cannot be had: {error}")
        return None


def _row(
    batch: Batch,
    correction: JackpotCorrection,
    obrs_lambda: float,
    job_seed: int,
    found: PerLambda | None,
    models: VocabularyPass | None,
) -> dict[str, float]:
    tokens = _rescored(batch, obrs_lambda, job_seed, found)
    # Without models the head is the mean acceptance everywhere, and complete.
    setting = correction if found else correction.model_copy(update={"normalizer": "full"})
    weights = reference_target_weights(tokens, setting)
    row = {"obrs_lambda": obrs_lambda} | mismatch_figures(replace(batch, tokens=tokens), weights)
    if found is not None and models is not None:
        row["rollout_corr/kl_before_exact"] = float(models.kl_before.double().mean())
        row["rollout_corr/kl_after_exact"] = float(found.kl_after.double().mean())
        row["normalizer_error"] = float((weights.normalizer - found.exact_normalizer).abs().double().mean())
    return row


def _rescored(batch: Batch, obrs_lambda: float, job_seed: int, found: PerLambda | None) -> TokenArrays:
    """The batch's arrays as a scorer with another λ would have made them; the very masks that it would have drawn."""
    tokens = batch.tokens
    acceptance = acceptance_probs(tokens.reference_logprobs, tokens.actor_logprobs, obrs_lambda)
    uniforms = torch.cat([acceptance_uniforms(job_seed, s.trajectory_id, s.end - s.start) for s in batch.sequences])
    head: Tensor = torch.full_like(acceptance, float(acceptance.double().mean())) if found is None else found.head
    return replace(
        tokens,
        acceptance_probs=acceptance,
        mask=acceptance_mask(acceptance, uniforms).float(),
        normalizer_head=head,
        normalizer_tail=torch.zeros_like(head) if found is None else found.tail,
        topk_mass=tokens.topk_mass if found is None else found.mass,
        obrs_lambda=torch.full_like(acceptance, obrs_lambda),
    )
