"""The figures of one optimizer step, gathered over its micro-batches. Names are as in ``metrics.jsonl``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jackpot.algorithm.diagnostics import effective_sample_ratio, kl_before_and_after, ratio_quantiles
from jackpot.algorithm.objective import TokenLoss
from jackpot.compute.ranks.group import Ranks
from jackpot.scoring.batch import Batch
from jackpot.scoring.token_weights import TokenWeights
from jackpot.trajectory import Role

RATIO_QUANTILES = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}

_NONFINITE = "nonfinite"


class StepMeter:
    """Sums over a step's tokens; :meth:`row` divides once at the end.

    Args:
        batch: the step's trajectories.
        weights: their token weights.
        step: the optimizer step, 0-based.
        complete: whether this process has all tokens of the batch; otherwise the row lacks figures over all of them.
    """

    def __init__(self, batch: Batch, weights: TokenWeights, step: int, *, complete: bool = True) -> None:
        self._num_tokens = max(1, batch.num_tokens)
        self._row: dict[str, float] = {"step": step + 1}
        if complete:
            self._row |= _batch_figures(batch, step) | mismatch_figures(batch, weights)
        # Sums of the passes stay on the models' device: reading them after each pass would stall the GPU's queue.
        self._found: dict[str, Tensor] = {}
        self._sums: dict[str, float] = {}
        self._found_nonfinite = 0.0
        self._counted = True

    def begin_pass(self, counted: bool) -> None:
        """Set whether the next pass's figures are counted; a filler's are not.

        See :class:`jackpot.compute.batching.ModelPass`.
        """
        self._counted = counted

    def add_up(self, ranks: Ranks) -> None:
        """Read the passes' figures, and sum them over all ranks; a collective."""
        totals = torch.stack(list(self._found.values())).cpu()
        ranks.sum_(totals)
        self._sums = dict(zip(self._found, totals.tolist(), strict=True))
        self._found_nonfinite = self._sums.pop(_NONFINITE)

    def policy(self, loss: TokenLoss, entropy: Tensor) -> None:
        """Add a micro-batch of the policy; ``entropy`` is [n], in nats."""
        self._add("policy/loss", loss.loss_sum, 1)
        clipped = loss.num_clipped_low + loss.num_clipped_high
        self._add("policy/clip_fraction", clipped, self._num_tokens)
        self._add("policy/dual_clip_fraction", loss.num_dual_clipped, self._num_tokens)
        self._add("policy/entropy", entropy.sum(), self._num_tokens)
        self._add(_NONFINITE, loss.num_nonfinite, 1)

    def kl_to_initial(self, kl: Tensor, num_clipped: Tensor) -> None:
        """Add a micro-batch's part of KL(policy ‖ initial policy), in nats per token."""
        self._add("policy/kl_initial", kl, 1)
        self._add("policy/kl_initial_clipped_fraction", num_clipped, self._num_tokens)

    def actor(self, loss: TokenLoss) -> None:
        """Add a micro-batch of the actor's PPO loss."""
        self._add("actor/ppo_loss", loss.loss_sum, 1)
        self._add(_NONFINITE, loss.num_nonfinite, 1)

    def distillation(self, kl: Tensor) -> None:
        """Add a micro-batch of KL(policy ‖ actor), [n] nats per token."""
        self._add("actor/distill_loss", kl.sum(), self._num_tokens)
        self._add("kl/policy_actor", kl.sum(), self._num_tokens)

    def optimizer_step(self, role: Role, grad_norm: float, lr: float) -> None:
        """Record one model's update."""
        self._row[f"{role}/grad_norm"] = grad_norm
        self._row[f"{role}/lr"] = lr

    def lambdas(self, obrs_lambda: float, distillation_weight: float | None) -> None:
        """Record the λ published with the next weights, and the λ_distill of this step."""
        self._row["rollout_corr/obrs_lambda_next"] = obrs_lambda
        if distillation_weight is not None:
            self._row["actor/distill_weight"] = distillation_weight

    @property
    def kl_policy_actor(self) -> float | None:
        """Mean KL(policy ‖ actor) of the micro-batches, once summed; None without distillation."""
        return self._sums.get("kl/policy_actor")

    def row(self) -> dict[str, float]:
        """The finished row, once summed."""
        return (
            self._row
            | self._sums
            | {"rollout_corr/nonfinite": self._row.get("rollout_corr/nonfinite", 0.0) + self._found_nonfinite}
        )

    def _add(self, name: str, amount: Tensor, divisor: float) -> None:
        amount = amount.detach().double()
        # Selected, not multiplied: uncounted values may be NaN.
        share = amount / divisor if self._counted else torch.zeros_like(amount)
        self._found[name] = share + self._found[name] if name in self._found else share


def _batch_figures(batch: Batch, step: int) -> dict[str, float]:
    staleness = step - batch.oldest_versions
    # The learner's own pass scores by the policy as it is at this step.
    reference_age = np.where(batch.reference_versions < 0, 0, step - batch.reference_versions)
    return {
        "reward/mean": float(batch.rewards.mean()),
        "reward/std": float(batch.rewards.std()),
        "response/length_mean": batch.num_tokens / max(1, len(batch.sequences)),
        "response/truncated_fraction": float(batch.truncated.mean()),
        "response/cut_tokens": float(batch.num_cut_tokens),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
        "reference/age": float(reference_age.mean()),
        "reference/age_max": float(reference_age.max()),
    }


def mismatch_figures(batch: Batch, weights: TokenWeights) -> dict[str, float]:
    """Figures of the mismatch from a batch's token weights: the columns ``rollout_corr/*``."""
    target, actor = weights.target_logprobs, batch.tokens.actor_logprobs
    log_ratio = (target - actor).double()
    divergence = kl_before_and_after(target, actor, weights.normalizer, weights.obrs_lambda)
    figures = {
        "rollout_corr/kl": float(-log_ratio.mean()),
        "rollout_corr/k3_kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
        "rollout_corr/rollout_is_eff_sample_size": effective_sample_ratio(weights.weight * weights.mask),
        "rollout_corr/rollout_is_max": float(log_ratio.max().exp()),
        "rollout_corr/kl_before": divergence.before,
        "rollout_corr/kl_after": divergence.after,
        "rollout_corr/obrs_acceptance_rate": float(weights.acceptance_probs.double().mean()),
        "rollout_corr/obrs_accepted_fraction": float(weights.mask.double().mean()),
        "rollout_corr/obrs_normalizer": float(weights.normalizer.double().mean()),
        "rollout_corr/obrs_bias_correction": weights.bias_correction,
        "rollout_corr/obrs_topk_mass": float(weights.topk_mass.double().mean()),
        "rollout_corr/obrs_lambda": float(weights.obrs_lambda.double().mean()),
        "rollout_corr/weight_mean": float(weights.weight.double().mean()),
        "rollout_corr/weight_raw_max": float(weights.raw_weight.max()),
        "rollout_corr/clipped_fraction_c1": float(weights.clipped_c1.double().mean()),
        "rollout_corr/clipped_fraction_c2": float(weights.clipped_c2.double().mean()),
        "rollout_corr/nonfinite": float((~(log_ratio.isfinite() & weights.weight.isfinite())).sum()),
    }
    quantiles = ratio_quantiles(target, actor, list(RATIO_QUANTILES.values()))
    figures |= {f"rollout_corr/target_ratio_{n}": q for n, q in zip(RATIO_QUANTILES, quantiles, strict=True)}
    if batch.exact_kl is not None:
        before, after = batch.exact_kl.sum(axis=0) / max(1, batch.num_tokens)
        figures |= {"rollout_corr/kl_before_exact": float(before), "rollout_corr/kl_after_exact": float(after)}
    return figures
