"""A stored batch under other settings: one row of figures for each λ, or one for a correction without λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jackpot.algorithm.corrections.jackpot import JackpotCorrection
from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.config import JobSpec
from jackpot.errors import ConfigError, WeightError
from jackpot.learner.reports.step_metrics import mismatch_figures
from jackpot.replay.stored_models import StoredModel, read_stored
from jackpot.scoring.batch import Batch, build_batch
from jackpot.scoring.score import LambdaReadings, Readings, accept_tokens, with_parts
from jackpot.scoring.token_weights import token_weights
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
    obrs = correction.obrs
    batch = replace(build_batch(groups, job.algorithm.advantage), exact_kl=None)
    if obrs is None:
        figures = mismatch_figures(batch, token_weights(batch.tokens, correction))
        return Replay(correction.name, batches, batch.num_tokens, "none", notes, [figures])
    if obrs.target == "policy":
        notes.append("target = policy is replayed as target = reference: the trajectories are scored, not trained on")
    readings = _read_models(run_dir, job, groups, lambdas, notes)
    rows = [_row(batch, obrs, each, job.seed, readings.at(each) if readings else None) for each in lambdas]
    name = obrs.normalizer if readings else BATCH_MEAN
    return Replay(correction.name, batches, batch.num_tokens, name, notes, rows)


def _read_models(
    run_dir: Path, job: JobSpec, groups: Sequence[ScoredGroup], lambdas: Sequence[float], notes: list[str]
) -> Readings | None:
    """What both models say; nothing, and a note, where they cannot be had."""
    try:
        policy, actor = StoredModel(job, run_dir, "policy"), StoredModel(job, run_dir, job.rollout_role)
        return Readings.join([read_stored(job, group, policy, actor, lambdas) for group in groups])
    except (WeightError, ConfigError) as error:
        notes.append(f"Z is the batch's mean acceptance, because the models cannot be had: {error}")
        return None


def _row(
    batch: Batch, obrs: JackpotCorrection, obrs_lambda: float, job_seed: int, readings: LambdaReadings | None
) -> dict[str, float]:
    """Figures of the batch as a scorer with another λ would have made it; by the very masks that it would have drawn,
    and the stored log p_t."""
    tokens = accept_tokens(batch.tokens, batch.sequences, obrs_lambda, job_seed)
    if readings is None:
        acceptance = tokens.acceptance_probs
        head = torch.full_like(acceptance, float(acceptance.double().mean()))
        tokens = replace(tokens, normalizer_head=head, normalizer_tail=torch.zeros_like(head))
        # The head is the mean acceptance everywhere, and complete.
        if obrs.normalizer != "none":
            obrs = obrs.model_copy(update={"normalizer": "full"})
    else:
        tokens = with_parts(tokens, readings.parts)
    weights = token_weights(tokens, obrs)
    row = {"obrs_lambda": obrs_lambda} | mismatch_figures(replace(batch, tokens=tokens), weights)
    if readings is not None and readings.exact is not None:
        row["rollout_corr/kl_before_exact"] = float(readings.exact.kl_before.double().mean())
        row["rollout_corr/kl_after_exact"] = float(readings.exact.kl_after.double().mean())
        row["normalizer_error"] = float((weights.normalizer - readings.exact.normalizer).abs().double().mean())
    return row
