"""One batch through the joint objective: L = L_ppo_obrs(θ) + L_ppo(ω) + λ_distill · L_distill(ω) (paper §4.2)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.objective import actor_loss_sum, kl_penalty, loss_shares, policy_loss_sum
from jackpot.algorithm.output_head import OutputHead
from jackpot.algorithm.vocabulary import VocabularyScores, differentiable_token_logprobs, token_logprobs
from jackpot.config import JobSpec
from jackpot.learner.batch import Batch, TokenArrays
from jackpot.learner.checkpoint import Learnable
from jackpot.learner.controls import Controls
from jackpot.learner.optimizer import build_optimizer
from jackpot.learner.policy_target import policy_target_weights
from jackpot.learner.schedule import learning_rate_factor
from jackpot.learner.step_metrics import StepMeter
from jackpot.learner.token_weights import TokenWeights, reference_target_weights
from jackpot.runtime.batching import length_buckets
from jackpot.runtime.forward import completion_hidden
from jackpot.runtime.models import output_head
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _MicroBatch:
    """Sequences that go through a model together, and their tokens on its device."""

    rows: Sequence[int]
    tokens: TokenArrays
    temperature: float


class Trainer:
    """Policy, actor and their optimizers.

    Args:
        job: the job as resolved.
        policy: θ.
        actor: ω, or None when the policy samples for itself.
    """

    def __init__(self, job: JobSpec, policy: PreTrainedModel, actor: PreTrainedModel | None) -> None:
        self._job = job
        self._device = policy.device
        self.models: dict[Role, PreTrainedModel] = {"policy": policy}
        if actor is not None:
            self.models["actor"] = actor
        # What a checkpoint restores later goes into the policy alone: this stays the job's initial model.
        self._initial = copy.deepcopy(policy) if job.algorithm.kl_penalty.weight > 0 else None
        if self._initial is not None:
            self._initial.eval()  # type: ignore[no-untyped-call]
            self._initial.requires_grad_(False)
        self._actor_learns = actor is not None and not isinstance(job.actor, str) and job.actor.train
        self._peak_lr: dict[Role, float] = {"policy": job.learner.lr}
        if self._actor_learns:
            self._peak_lr["actor"] = job.learner.actor_lr or job.learner.lr
        for role, model in self.models.items():
            # Dropout would make the policy differ from its own reference.
            model.eval()  # type: ignore[no-untyped-call]
            model.requires_grad_(role in self._peak_lr)
        self.learnables: dict[Role, Learnable] = {
            role: Learnable(self.models[role], build_optimizer(self.models[role], lr, job.learner))
            for role, lr in self._peak_lr.items()
        }
        self.controls = Controls(job.algorithm)

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        """Train on one batch, in ``updates_per_batch`` optimizer steps; the figures of each step."""
        parts = batch.split(self._job.learner.updates_per_batch)
        weights = self._reference_weights(batch, parts)
        references = [self._actor_reference(part) if len(parts) > 1 else None for part in parts]
        return [
            self._step(first_step + index, part, weights[index], references[index]) for index, part in enumerate(parts)
        ]

    def _reference_weights(self, batch: Batch, parts: Sequence[Batch]) -> Sequence[TokenWeights | None]:
        """κ and τ are calibrated over the whole batch, and only then is it split: more tokens, less noise."""
        correction = self._job.algorithm.correction
        if correction.name == "jackpot" and correction.target == "policy":
            return [None] * len(parts)
        weights = reference_target_weights(batch.tokens, correction)
        return weights.split([part.num_tokens for part in parts])

    def _actor_reference(self, batch: Batch) -> Tensor | None:
        """log p_ω as the batch begins, [N]; with a single update it is the actor's own, detached: no pass needed."""
        if not self._actor_learns or not self._job.algorithm.actor_ppo:
            return None
        logprobs = torch.empty(batch.num_tokens)
        for rows in self._micro_batches(batch):
            index = batch.token_index(rows)
            with torch.no_grad():
                hidden = self._hidden("actor", batch, rows)
                ids = batch.tokens.token_ids[index].to(self._device)
                scores = token_logprobs(hidden, self._head("actor"), ids, temperature=batch.temperature)
            logprobs[index] = scores.logprobs.float().cpu()
        return logprobs

    def _step(
        self, step: int, batch: Batch, weights: TokenWeights | None, actor_reference: Tensor | None
    ) -> dict[str, float]:
        weights = weights or self._policy_weights(batch)
        meter = StepMeter(batch, weights, step)
        shares = self._shares(batch, weights.mask)
        actor_shares = self._shares(batch, torch.ones_like(weights.mask))
        for learnable in self.learnables.values():
            learnable.optimizer.zero_grad(set_to_none=True)
        for rows in self._micro_batches(batch):
            index = batch.token_index(rows)
            micro = _MicroBatch(rows, batch.tokens.select(index).to(self._device), batch.temperature)
            hidden = self._hidden("policy", batch, rows)
            loss = self._policy_loss(hidden, batch, micro, weights.select(index), shares[index], meter)
            if self._actor_learns:
                reference = None if actor_reference is None else actor_reference[index]
                loss = loss + self._actor_loss(hidden, batch, micro, reference, actor_shares[index], meter)
            loss.backward()  # type: ignore[no-untyped-call]
        self._update(step, meter)
        self._control(weights, batch, meter)
        return meter.row()

    def _control(self, weights: TokenWeights, batch: Batch, meter: StepMeter) -> None:
        """Let λ and λ_distill follow what this step measured."""
        distillation_weight = self.controls.distillation_weight if self._actor_learns else None
        self.controls.observe_tokens(weights.target_logprobs, batch.tokens.actor_logprobs)
        if meter.kl_policy_actor is not None:
            self.controls.observe_kl(meter.kl_policy_actor)
        meter.controls(self.controls.obrs_lambda, distillation_weight)

    def _policy_weights(self, batch: Batch) -> TokenWeights:
        correction = self._job.algorithm.correction
        assert correction.name == "jackpot"
        return policy_target_weights(
            self.models["policy"],
            batch,
            self._micro_batches(batch),
            correction,
            self.controls.obrs_lambda,
            self._job.seed,
            self._job.scorer.chunk_tokens,
        )

    def _shares(self, batch: Batch, mask: Tensor) -> Tensor:
        algorithm = self._job.algorithm
        return loss_shares(
            mask,
            batch.tokens.sequence_index,
            denominator=algorithm.denominator,
            normalization=algorithm.loss_normalization,
            constant_length=algorithm.loss_constant_length or self._job.sampling.max_tokens,
        )

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
        tokens, shares = micro.tokens, shares.to(self._device)
        scores = self._sampled(hidden, self._head("policy"), micro, entropy=True)
        weight, mask = weights.weight.to(self._device), weights.mask.to(self._device)
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
        sequences = [batch.sequences[row] for row in micro.rows]
        with torch.no_grad():
            hidden = completion_hidden(
                self._initial, [s.input_ids for s in sequences], [s.prompt_length for s in sequences]
            )
            initial = token_logprobs(
                hidden,
                output_head(self._initial),
                micro.tokens.token_ids,
                temperature=micro.temperature,
                chunk_tokens=self._job.scorer.chunk_tokens,
            ).logprobs
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
            logprobs.detach() if reference is None else reference.to(self._device),
            tokens.actor_logprobs,
            tokens.advantages,
            cap=algorithm.actor_cap,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            shares=shares.to(self._device),
        )
        meter.actor(loss)
        return total + loss.loss_sum

    def _update(self, step: int, meter: StepMeter) -> None:
        learner = self._job.learner
        for role, learnable in self.learnables.items():
            schedule = learner.schedule if role == "policy" else learner.actor_schedule or learner.schedule
            pace = self.controls.actor_pace if role == "actor" else 1.0
            lr = self._peak_lr[role] * learning_rate_factor(schedule, step, learner.steps) * pace
            norm = torch.nn.utils.clip_grad_norm_(learnable.model.parameters(), learner.max_grad_norm)
            meter.optimizer_step(role, float(norm), lr)
            if not torch.isfinite(norm):
                LOG.error("step %d: the %s's gradient is not finite; its update is skipped", step + 1, role)
                continue
            for group in learnable.optimizer.param_groups:
                group["lr"] = lr
            learnable.optimizer.step()

    def _micro_batches(self, batch: Batch) -> list[list[int]]:
        lengths = [len(sequence.input_ids) for sequence in batch.sequences]
        return length_buckets(lengths, self._job.learner.max_batch_tokens)

    def _hidden(self, role: Role, batch: Batch, rows: Sequence[int]) -> Tensor:
        sequences = [batch.sequences[row] for row in rows]
        return completion_hidden(
            self.models[role], [s.input_ids for s in sequences], [s.prompt_length for s in sequences]
        )

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
