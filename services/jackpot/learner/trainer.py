"""Batches into optimizer steps: weights of the tokens, passes with their losses, gradients, updates, control of λ."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.objective import token_shares
from jackpot.algorithm.vocabulary import token_logprobs
from jackpot.compute.batching import ModelPass
from jackpot.compute.models import output_head
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.partition import plan_passes
from jackpot.compute.ranks.sharding import release
from jackpot.config import JobSpec
from jackpot.learner.canary import Canary
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, PendingCheckpoint, Progress
from jackpot.learner.joint_loss import JointLoss, MicroBatch
from jackpot.learner.kl_in_reward import InitialPass, kl_in_reward
from jackpot.learner.lambda_control import LambdaControl
from jackpot.learner.models.optimizer import clip_gradients
from jackpot.learner.models.trained_models import TrainedModels
from jackpot.learner.reports.profiling import StepProfiler
from jackpot.learner.reports.step_metrics import StepMeter
from jackpot.learner.schedule import learning_rate_factor
from jackpot.scoring.batch import Batch
from jackpot.scoring.passes import ModelPasses, model_inputs, token_places
from jackpot.scoring.step_scores import learner_scores, score_step
from jackpot.scoring.token_weights import TokenWeights, token_weights
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)


class BatchTrainer(Protocol):
    """What the learner's loop asks of its trainer: of a :class:`Trainer`, or of the rank that leads several."""

    @property
    def models(self) -> TrainedModels:
        """This process's models."""

    @property
    def lambda_control(self) -> LambdaControl:
        """λ and what else follows measurements."""

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        """Train on one batch, in ``updates_per_batch`` optimizer steps; the figures of each step."""

    def weights(self, role: Role) -> dict[str, Tensor]:
        """As :meth:`TrainedModels.weights`."""

    def probe(self, role: Role) -> WeightProbe:
        """As :meth:`TrainedModels.probe`."""

    def begin_checkpoint(self, store: CheckpointStore, progress: Progress) -> PendingCheckpoint:
        """As :meth:`TrainedModels.begin_checkpoint`."""

    def restore(self, store: CheckpointStore, path: Path) -> Progress:
        """As :meth:`TrainedModels.restore`, the state of λ's control included."""


class Trainer:
    """Trains policy and actor on batches: a :class:`BatchTrainer`.

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
        self._job = job
        self._ranks = ranks
        self.models = TrainedModels(job, policy, actor, ranks)
        self.lambda_control = LambdaControl(job.algorithm)
        self._states = self.models.layout.states
        self._loss = JointLoss(
            job, self.models, self.models.initial, self._states, self.lambda_control, self.models.device
        )
        sampling = self.models.sampling
        self._canary = None if sampling is None else Canary(job, sampling, self.models.layout, ranks)
        self.profiler = profiler or StepProfiler(Path(), steps=0)
        self.show_tokens: Callable[[Batch, TokenWeights], None] | None = None
        """Given each step's tokens and their weights before the gradients: for metrics, and to look at."""

    @property
    def job(self) -> JobSpec:
        """The job as resolved."""
        return self._job

    def weights(self, role: Role) -> dict[str, Tensor]:
        """As :meth:`TrainedModels.weights`."""
        return self.models.weights(role)

    def probe(self, role: Role) -> WeightProbe:
        """As :meth:`TrainedModels.probe`."""
        return self.models.probe(role)

    def begin_checkpoint(self, store: CheckpointStore, progress: Progress) -> PendingCheckpoint:
        """As :meth:`TrainedModels.begin_checkpoint`."""
        return self.models.begin_checkpoint(store, progress)

    def restore(self, store: CheckpointStore, path: Path) -> Progress:
        """As :meth:`TrainedModels.restore`, the state of λ's control included."""
        progress = self.models.restore(store, path)
        self.lambda_control.restore(progress.obrs_lambda, progress.controls)
        return progress

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        """Train on one batch, in ``updates_per_batch`` optimizer steps; the figures of each step."""
        with self.profiler.batch(first_step, self._job.learner.updates_per_batch):
            return self._train_parts(batch, first_step)

    def _train_parts(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        seen = {} if self._canary is None else self._canary.check(batch, first_step)
        parts = batch.split(self._job.learner.updates_per_batch)
        passes = [self._plan(part) for part in parts]
        if not self._job.scorer.reuse_reference:
            parts = self._penalised(batch, parts, passes)
        weights = self._reference_weights(batch, parts)
        references = [
            self._actor_reference(part, part_passes) if len(parts) > 1 else None
            for part, part_passes in zip(parts, passes, strict=True)
        ]
        rows = [
            self._step(first_step + index, part, passes[index], weights[index], references[index])
            for index, part in enumerate(parts)
        ]
        return [rows[0] | seen, *rows[1:]]

    def _reference_weights(self, batch: Batch, parts: Sequence[Batch]) -> Sequence[TokenWeights | None]:
        """κ and τ are calibrated over the whole batch, and only then is it split: more tokens, less noise."""
        correction = self._job.algorithm.correction
        if learner_scores(self._job):
            return [None] * len(parts)
        weights = token_weights(batch.tokens, correction, ranks=self._ranks)
        return weights.split([part.num_tokens for part in parts])

    def _penalised(self, batch: Batch, parts: list[Batch], passes: Sequence[Sequence[ModelPass]]) -> list[Batch]:
        """The batch's parts with advantages of rewards less the KL penalty, where it belongs to the reward."""
        algorithm = self._job.algorithm
        if self.models.initial is None or algorithm.kl_penalty.applied_to == "loss":
            return parts
        how = InitialPass(self.models.initial, self._states, self._job.scorer.chunk_tokens, self._ranks)
        return kl_in_reward(batch, list(zip(parts, passes, strict=True)), algorithm, how).split(len(parts))

    def _actor_reference(self, batch: Batch, passes: Sequence[ModelPass]) -> Tensor | None:
        """log p_ω as the batch begins, [N]; with a single update it is the actor's own, detached: no pass needed."""
        if not self.models.actor_learns or not self._job.algorithm.actor_ppo:
            return None
        logprobs = torch.zeros(batch.num_tokens)  # another rank's sequences stay 0 and unused
        actor = ModelPasses(self.models["actor"], batch.sequences, passes, self._states)
        with torch.no_grad():
            for index, hidden in actor.hidden():
                ids = batch.tokens.token_ids[index].to(self.models.device)
                scores = token_logprobs(hidden, output_head(actor.model), ids, temperature=batch.temperature)
                logprobs[index] = scores.logprobs.float().cpu()
        release(self.models["actor"])
        return logprobs

    def _step(
        self,
        step: int,
        batch: Batch,
        passes: Sequence[ModelPass],
        weights: TokenWeights | None,
        actor_reference: Tensor | None,
    ) -> dict[str, float]:
        hidden_of_only_pass: Tensor | None = None
        if weights is None:
            policy = ModelPasses(self.models["policy"], batch.sequences, passes, self._states)
            step_scores = score_step(self._job, batch, policy, self.lambda_control.obrs_lambda, self._ranks)
            batch, weights, hidden_of_only_pass = step_scores.batch, step_scores.weights, step_scores.hidden
            if self._job.scorer.reuse_reference:  # before, nobody knew p_ref
                (batch,) = self._penalised(batch, [batch], [passes])
        meter = StepMeter(batch, weights, step, complete=self._ranks.rank == 0)
        if self.show_tokens is not None:
            self.show_tokens(batch, weights)
        for learnable in self.models.learnables.values():
            learnable.optimizer.zero_grad(set_to_none=True)
        self._add_gradients(batch, passes, weights, actor_reference, hidden_of_only_pass, meter)
        meter.add_up(self._ranks)
        self._update(step, meter)
        self._control(weights, batch, meter)
        return meter.row()

    def _add_gradients(
        self,
        batch: Batch,
        passes: Sequence[ModelPass],
        weights: TokenWeights,
        actor_reference: Tensor | None,
        hidden_of_only_pass: Tensor | None,
        meter: StepMeter,
    ) -> None:
        """The gradient of the batch's loss, summed up over passes."""
        shares = self._shares(batch, weights.mask)
        actor_shares = self._shares(batch, torch.ones_like(weights.mask))
        for model_pass in passes:
            meter.begin_pass(model_pass.counted)
            index = token_places(batch.sequences, model_pass)
            micro = MicroBatch(
                batch,
                model_pass,
                batch.tokens.select(index).to(self.models.device),
                weights.select(index),
                shares[index],
                actor_shares[index],
                None if actor_reference is None else actor_reference[index],
            )
            hidden = hidden_of_only_pass
            if hidden is None:
                hidden = self._states(self.models["policy"], *model_inputs(batch.sequences, model_pass))
            _backward(self._loss.policy(hidden, micro, meter), model_pass)
            if self.models.actor_learns:
                # What the policy's pass kept is gone by now: one model's activations are in memory at a time.
                _backward(self._loss.actor(hidden.detach(), micro, meter), model_pass)
        for learnable in self.models.learnables.values():
            release(learnable.model)

    def _control(self, weights: TokenWeights, batch: Batch, meter: StepMeter) -> None:
        """Let λ and λ_distill follow what this step measured: over all tokens, which rank 0 alone has."""
        distillation_weight = self.lambda_control.distillation_weight if self.models.actor_learns else None
        if self._ranks.rank == 0:
            self.lambda_control.observe_tokens(weights.target_logprobs, batch.tokens.actor_logprobs)
            if meter.kl_policy_actor is not None:
                self.lambda_control.observe_kl(meter.kl_policy_actor)
        if self._ranks.size > 1:
            state = json.loads(
                self._ranks.broadcast(
                    json.dumps([self.lambda_control.obrs_lambda, self.lambda_control.state()]).encode()
                )
            )
            self.lambda_control.restore(*state)
        meter.lambdas(self.lambda_control.obrs_lambda, distillation_weight)

    def _shares(self, batch: Batch, mask: Tensor) -> Tensor:
        """What each token's loss is multiplied by, [N]: alike within a sequence, and rank 0's, which has all masks."""
        algorithm = self._job.algorithm
        shares = token_shares(
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

    def _update(self, step: int, meter: StepMeter) -> None:
        learner = self._job.learner
        for role, learnable in self.models.learnables.items():
            schedule = learner.schedule if role == "policy" else learner.actor_schedule or learner.schedule
            pace = self.lambda_control.actor_pace if role == "actor" else 1.0
            lr = self.models.peak_lr[role] * learning_rate_factor(schedule, step, learner.steps) * pace
            norm = clip_gradients(learnable.model, learner.max_grad_norm)
            meter.optimizer_step(role, norm, lr)
            if not math.isfinite(norm):
                LOG.error("step %d: the %s's gradient is not finite; its update is skipped", step + 1, role)
                continue
            for group in learnable.optimizer.param_groups:
                group["lr"] = lr
            learnable.optimizer.step()
            self.models.refresh(role)

    def _plan(self, batch: Batch) -> list[ModelPass]:
        lengths = [len(sequence.input_ids) for sequence in batch.sequences]
        attention = self.models.layout.attention
        return plan_passes(
            lengths,
            self._job.learner.max_batch_tokens,
            group_starts=batch.group_starts,
            rank=self._ranks.rank,
            size=self._ranks.size,
            packed=self.models.layout.packed,
            siblings=None if attention is None else batch.siblings(attention),
        )


def _backward(loss: Tensor, model_pass: ModelPass) -> None:
    """Add a pass's gradient; nothing for one that another rank counts, but FSDP's collectives are made."""
    (loss if model_pass.counted else 0.0 * loss).backward()  # type: ignore[no-untyped-call]
