"""One batch through the joint objective: L = L_ppo_obrs(θ) + L_ppo(ω) + λ_distill · L_distill(ω) (paper §4.2)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.objective import actor_loss_sum, kl_penalty, loss_shares, policy_loss_sum
from jackpot.algorithm.output_head import OutputHead
from jackpot.algorithm.vocabulary import VocabularyScores, differentiable_token_logprobs, token_logprobs
from jackpot.config import JobSpec
from jackpot.learner.batch import Batch, TokenArrays
from jackpot.learner.optimizer import clip_gradients
from jackpot.learner.policy_target import ScoringPass, policy_target_weights
from jackpot.learner.profiling import StepProfiler
from jackpot.learner.reused_reference import OwnReference, own_reference
from jackpot.learner.schedule import learning_rate_factor
from jackpot.learner.step_metrics import StepMeter
from jackpot.learner.token_weights import TokenWeights, reference_target_weights
from jackpot.learner.trained_models import TrainedModels
from jackpot.runtime.models import output_head
from jackpot.runtime.ranks.group import SOLO, Ranks
from jackpot.runtime.ranks.partition import MicroRows, plan_passes
from jackpot.runtime.ranks.sharding import release
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _MicroBatch:
    """Sequences that go through a model together, and their tokens on its device."""

    rows: Sequence[int]
    tokens: TokenArrays
    temperature: float


class Trainer(TrainedModels):
    """Trains policy and actor on batches.

    Args:
        job: the job as resolved.
        policy: θ.
        actor: ω, or None when the policy samples for itself.
        ranks: the processes that train together; with a mesh, models that learn are sharded over it.
        profiler: records what the job asks for; None records nothing.
    """

    def __init__(
        self,
        job: JobSpec,
        policy: PreTrainedModel,
        actor: PreTrainedModel | None,
        ranks: Ranks = SOLO,
        profiler: StepProfiler | None = None,
    ) -> None:
        super().__init__(job, policy, actor, ranks)
        self.profiler = profiler or StepProfiler(Path(), steps=0)
        self.show_tokens: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """Given each step's acceptance probabilities, p_target/p_inf and Z, [N] each, for the metrics."""

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        """Train on one batch, in ``updates_per_batch`` optimizer steps; the figures of each step."""
        with self.profiler.batch(first_step, self._job.learner.updates_per_batch):
            return self._train_parts(batch, first_step)

    def _train_parts(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        parts = batch.split(self._job.learner.updates_per_batch)
        weights = self._reference_weights(batch, parts)
        references = [self._actor_reference(part) if len(parts) > 1 else None for part in parts]
        return [
            self._step(first_step + index, part, weights[index], references[index]) for index, part in enumerate(parts)
        ]

    def _reference_weights(self, batch: Batch, parts: Sequence[Batch]) -> Sequence[TokenWeights | None]:
        """κ and τ are calibrated over the whole batch, and only then is it split: more tokens, less noise."""
        correction = self._job.algorithm.correction
        if self._job.scorer.reuse_reference or (correction.name == "jackpot" and correction.target == "policy"):
            return [None] * len(parts)
        weights = reference_target_weights(batch.tokens, correction, self._ranks)
        return weights.split([part.num_tokens for part in parts])

    def _actor_reference(self, batch: Batch) -> Tensor | None:
        """log p_ω as the batch begins, [N]; with a single update it is the actor's own, detached: no pass needed."""
        if not self._actor_learns or not self._job.algorithm.actor_ppo:
            return None
        logprobs = torch.zeros(batch.num_tokens)  # another rank's sequences stay 0 and unused
        for one in self._passes(batch):
            index = batch.token_index(one.rows)
            with torch.no_grad():
                hidden = self._hidden("actor", batch, one.rows)
                ids = batch.tokens.token_ids[index].to(self.device)
                scores = token_logprobs(hidden, self._head("actor"), ids, temperature=batch.temperature)
            logprobs[index] = scores.logprobs.float().cpu()
        release(self.models["actor"])
        return logprobs

    def _step(
        self, step: int, batch: Batch, weights: TokenWeights | None, actor_reference: Tensor | None
    ) -> dict[str, float]:
        hidden_of_only_pass: Tensor | None = None
        if self._job.scorer.reuse_reference:
            own = self._own_reference(batch)
            batch, weights, hidden_of_only_pass = own.batch, own.weights, own.hidden
        weights = weights or self._policy_weights(batch)
        meter = StepMeter(batch, weights, step, complete=self._ranks.rank == 0)
        if self.show_tokens is not None:
            ratio = (weights.target_logprobs - batch.tokens.actor_logprobs).exp()
            self.show_tokens(weights.acceptance_probs, ratio, weights.normalizer)
        shares = self._shares(batch, weights.mask)
        actor_shares = self._shares(batch, torch.ones_like(weights.mask))
        for learnable in self.learnables.values():
            learnable.optimizer.zero_grad(set_to_none=True)
        for one in self._passes(batch):
            meter.begin_pass(one.counted)
            index = batch.token_index(one.rows)
            micro = _MicroBatch(one.rows, batch.tokens.select(index).to(self.device), batch.temperature)
            hidden = hidden_of_only_pass
            if hidden is None:
                hidden = self._hidden("policy", batch, one.rows)
            loss = self._policy_loss(hidden, batch, micro, weights.select(index), shares[index], meter)
            if self._actor_learns:
                reference = None if actor_reference is None else actor_reference[index]
                loss = loss + self._actor_loss(hidden, batch, micro, reference, actor_shares[index], meter)
            (loss if one.counted else 0.0 * loss).backward()  # type: ignore[no-untyped-call]
        meter.add_up(self._ranks)
        self._update(step, meter)
        self._control(weights, batch, meter)
        return meter.row()

    def _control(self, weights: TokenWeights, batch: Batch, meter: StepMeter) -> None:
        """Let λ and λ_distill follow what this step measured: over all tokens, which rank 0 alone has."""
        distillation_weight = self.controls.distillation_weight if self._actor_learns else None
        if self._ranks.rank == 0:
            self.controls.observe_tokens(weights.target_logprobs, batch.tokens.actor_logprobs)
            if meter.kl_policy_actor is not None:
                self.controls.observe_kl(meter.kl_policy_actor)
        if self._ranks.size > 1:
            told = json.loads(
                self._ranks.broadcast(json.dumps([self.controls.obrs_lambda, self.controls.state()]).encode())
            )
            self.controls.restore(*told)
        meter.controls(self.controls.obrs_lambda, distillation_weight)

    def _policy_weights(self, batch: Batch) -> TokenWeights:
        correction = self._job.algorithm.correction
        assert correction.name == "jackpot"
        return policy_target_weights(
            self.models["policy"],
            batch,
            self._passes(batch),
            correction,
            self.controls.obrs_lambda,
            self._job.seed,
            self._job.scorer.chunk_tokens,
            states=self._states,
            ranks=self._ranks,
        )

    def _own_reference(self, batch: Batch) -> OwnReference:
        return own_reference(
            self.models["policy"],
            batch,
            self._passes(batch),
            self._job.algorithm.correction,
            self.controls.obrs_lambda,
            self._job.seed,
            self._job.scorer.chunk_tokens,
            ScoringPass(self._states, self._ranks),
        )

    def _shares(self, batch: Batch, mask: Tensor) -> Tensor:
        """What each token's loss is multiplied by, [N]: alike within a sequence, and rank 0's, which has all masks."""
        algorithm = self._job.algorithm
        shares = loss_shares(
            mask,
            batch.tokens.sequence_index,
            denominator=algorithm.denominator,
            normalization=algorithm.loss_normalization,
            constant_length=algorithm.loss_constant_length or self._job.sampling.max_tokens,
        )
        if self._ranks.size == 1:
            return shares
        of_sequences = shares[torch.tensor([sequence.start for sequence in batch.sequences])].contiguous()
        self._ranks.of_rank_0_(of_sequences)
        return of_sequences[batch.tokens.sequence_index]

    def _policy_loss(
        self,
        hidden: Tensor,
        batch: Batch,
        micro: _MicroBatch,
        weights: TokenWeights,
        shares: Tensor,
        meter: StepMeter,
    ) -> Tensor:
        """L_ppo_obrs(θ) of the micro-batch (eq. 5), and the penalty on KL to the initial policy."""
        tokens, shares = micro.tokens, shares.to(self.device)
        scores = self._sampled(hidden, self._head("policy"), micro, entropy=True)
        weight, mask = weights.weight.to(self.device), weights.mask.to(self.device)
        loss = policy_loss_sum(
            scores.logprobs,
            tokens.reference_logprobs,
            tokens.advantages,
            weight,
            mask,
            clip_low=self._job.algorithm.clip_low,
            clip_high=self._job.algorithm.clip_high,
            shares=shares,
        )
        assert scores.entropy is not None
        meter.policy(loss, scores.entropy)
        if self._initial is None:
            return loss.loss_sum
        # Weighted as the policy's loss is, so that both are expectations under the policy.
        penalty = self._kl_to_initial(batch, micro, scores.logprobs) * shares * weight * mask
        total = penalty.masked_fill(mask == 0, 0.0).sum()
        meter.kl_to_initial(total)
        return loss.loss_sum + self._job.algorithm.kl_penalty.weight * total

    def _kl_to_initial(self, batch: Batch, micro: _MicroBatch, policy_logprobs: Tensor) -> Tensor:
        assert self._initial is not None
        with torch.no_grad():
            hidden = self._states(self._initial, *batch.inputs(micro.rows))
            initial = token_logprobs(
                hidden,
                output_head(self._initial),
                micro.tokens.token_ids,
                temperature=micro.temperature,
                chunk_tokens=self._job.scorer.chunk_tokens,
            ).logprobs
        release(self._initial)
        return kl_penalty(policy_logprobs, initial, self._job.algorithm.kl_penalty.estimator)

    def _actor_loss(
        self,
        policy_hidden: Tensor,
        batch: Batch,
        micro: _MicroBatch,
        reference: Tensor | None,
        shares: Tensor,
        meter: StepMeter,
    ) -> Tensor:
        """L_ppo(ω) + λ_distill · L_distill(ω) of the micro-batch; eq. 6 and 7."""
        algorithm, tokens = self._job.algorithm, micro.tokens
        hidden, head = self._hidden("actor", batch, micro.rows), self._head("actor")
        divergence = forward_kl(
            policy_hidden,
            self._head("policy"),
            hidden,
            head,
            temperature=micro.temperature,
            chunk_tokens=algorithm.distillation.chunk_tokens,
        )
        meter.distillation(divergence.detach())
        total = self.controls.distillation_weight * divergence.sum() / batch.num_tokens
        if not algorithm.actor_ppo:
            return total
        logprobs = self._sampled(hidden, head, micro, entropy=False).logprobs
        loss = actor_loss_sum(
            logprobs,
            logprobs.detach() if reference is None else reference.to(self.device),
            tokens.actor_logprobs,
            tokens.advantages,
            cap=algorithm.actor_cap,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            shares=shares.to(self.device),
        )
        meter.actor(loss)
        return total + loss.loss_sum

    def _update(self, step: int, meter: StepMeter) -> None:
        learner = self._job.learner
        for role, learnable in self.learnables.items():
            schedule = learner.schedule if role == "policy" else learner.actor_schedule or learner.schedule
            pace = self.controls.actor_pace if role == "actor" else 1.0
            lr = self._peak_lr[role] * learning_rate_factor(schedule, step, learner.steps) * pace
            norm = clip_gradients(learnable.model, learner.max_grad_norm)
            meter.optimizer_step(role, norm, lr)
            if not math.isfinite(norm):
                LOG.error("step %d: the %s's gradient is not finite; its update is skipped", step + 1, role)
                continue
            for group in learnable.optimizer.param_groups:
                group["lr"] = lr
            learnable.optimizer.step()

    def _passes(self, batch: Batch) -> list[MicroRows]:
        lengths = [len(sequence.input_ids) for sequence in batch.sequences]
        return plan_passes(
            lengths,
            self._job.learner.max_batch_tokens,
            group_starts=batch.group_starts,
            rank=self._ranks.rank,
            size=self._ranks.size,
            packed=self._packed,
        )

    def _hidden(self, role: Role, batch: Batch, rows: Sequence[int]) -> Tensor:
        return self._states(self.models[role], *batch.inputs(rows))

    def _head(self, role: Role) -> OutputHead:
        return output_head(self.models[role])

    def _sampled(self, hidden: Tensor, head: OutputHead, micro: _MicroBatch, *, entropy: bool) -> VocabularyScores:
        return differentiable_token_logprobs(
            hidden,
            head,
            micro.tokens.token_ids,
            temperature=micro.temperature,
            chunk_tokens=self._job.scorer.chunk_tokens,
            entropy=entropy,
        )
