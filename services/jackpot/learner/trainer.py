"""One batch through the joint objective: L = L_ppo_obrs(θ) + L_ppo(ω) + λ_distill · L_distill(ω) (paper §4.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.objective import actor_loss_sum, policy_loss_sum, token_denominator
from jackpot.algorithm.output_head import OutputHead
from jackpot.algorithm.vocabulary import VocabularyScores, differentiable_token_logprobs, token_logprobs
from jackpot.config import JobSpec
from jackpot.learner.batch import Batch, TokenArrays
from jackpot.learner.checkpoint import Learnable
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
        correction = job.algorithm.correction
        self.obrs_lambda = correction.obrs_lambda if correction.name == "jackpot" else 1.0

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
        weights = reference_target_weights(batch.tokens, correction, batch.obrs_lambda)
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
        denominator = float(token_denominator(weights.mask, self._job.algorithm.denominator))
        meter = StepMeter(batch, weights, denominator, step)
        for learnable in self.learnables.values():
            learnable.optimizer.zero_grad(set_to_none=True)
        for rows in self._micro_batches(batch):
            index = batch.token_index(rows)
            tokens = batch.tokens.select(index).to(self._device)
            hidden = self._hidden("policy", batch, rows)
            loss = self._policy_loss(hidden, batch, tokens, weights.select(index), meter) / denominator
            if self._actor_learns:
                reference = None if actor_reference is None else actor_reference[index]
                loss = loss + self._actor_loss(hidden, batch, rows, tokens, reference, meter) / batch.num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
        self._update(step, meter)
        return meter.row()

    def _policy_weights(self, batch: Batch) -> TokenWeights:
        correction = self._job.algorithm.correction
        assert correction.name == "jackpot"
        return policy_target_weights(
            self.models["policy"],
            batch,
            self._micro_batches(batch),
            correction,
            self._job.seed,
            self._job.scorer.chunk_tokens,
        )

    def _policy_loss(
        self, hidden: Tensor, batch: Batch, tokens: TokenArrays, weights: TokenWeights, meter: StepMeter
    ) -> Tensor:
        """L_ppo_obrs(θ), a sum over the micro-batch; eq. 5."""
        scores = self._sampled(hidden, self._head("policy"), tokens, batch, entropy=True)
        loss = policy_loss_sum(
            scores.logprobs,
            tokens.reference_logprobs,
            tokens.advantages,
            weights.weight.to(self._device),
            weights.mask.to(self._device),
            clip_low=self._job.algorithm.clip_low,
            clip_high=self._job.algorithm.clip_high,
        )
        assert scores.entropy is not None
        meter.policy(loss, scores.entropy)
        return loss.loss_sum

    def _actor_loss(
        self,
        policy_hidden: Tensor,
        batch: Batch,
        rows: Sequence[int],
        tokens: TokenArrays,
        reference: Tensor | None,
        meter: StepMeter,
    ) -> Tensor:
        """L_ppo(ω) + λ_distill · L_distill(ω), a sum over the micro-batch; eq. 6 and 7."""
        algorithm = self._job.algorithm
        hidden, head = self._hidden("actor", batch, rows), self._head("actor")
        divergence = forward_kl(
            policy_hidden,
            self._head("policy"),
            hidden,
            head,
            temperature=batch.temperature,
            chunk_tokens=algorithm.distillation.chunk_tokens,
        )
        meter.distillation(divergence.detach())
        total = algorithm.distillation.weight * divergence.sum()
        if not algorithm.actor_ppo:
            return total
        logprobs = self._sampled(hidden, head, tokens, batch, entropy=False).logprobs
        loss = actor_loss_sum(
            logprobs,
            logprobs.detach() if reference is None else reference.to(self._device),
            tokens.actor_logprobs,
            tokens.advantages,
            cap=algorithm.actor_cap,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
        )
        meter.actor(loss)
        return total + loss.loss_sum

    def _update(self, step: int, meter: StepMeter) -> None:
        factor = learning_rate_factor(self._job.learner.schedule, step, self._job.learner.steps)
        for role, learnable in self.learnables.items():
            lr = self._peak_lr[role] * factor
            norm = torch.nn.utils.clip_grad_norm_(learnable.model.parameters(), self._job.learner.max_grad_norm)
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

    def _sampled(
        self, hidden: Tensor, head: OutputHead, tokens: TokenArrays, batch: Batch, *, entropy: bool
    ) -> VocabularyScores:
        return differentiable_token_logprobs(
            hidden,
            head,
            tokens.token_ids,
            temperature=batch.temperature,
            chunk_tokens=self._job.scorer.chunk_tokens,
            entropy=entropy,
        )
