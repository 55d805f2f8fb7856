"""The joint objective of the sequences that go through a model together:
L = L_ppo_obrs(θ) + L_ppo(ω) + λ_distill · L_distill(ω) (paper §4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.objective import actor_loss_sum, kl_penalty, policy_loss_sum
from jackpot.algorithm.output_head import OutputHead
from jackpot.algorithm.vocabulary import VocabularyScores, differentiable_token_logprobs
from jackpot.compute.batching import ModelPass
from jackpot.compute.forward import CompletionStates
from jackpot.compute.models import output_head
from jackpot.compute.ranks.sharding import release
from jackpot.config import JobSpec
from jackpot.learner.kl_in_reward import sampled_logprobs
from jackpot.learner.lambda_control import LambdaControl
from jackpot.learner.reports.step_metrics import StepMeter
from jackpot.scoring.batch import Batch, TokenArrays
from jackpot.scoring.passes import model_inputs
from jackpot.scoring.token_weights import TokenWeights
from jackpot.trajectory import Role


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Sequences that go through a model together, and what the loss takes of their N tokens."""

    batch: Batch
    passed: ModelPass
    """Which sequences of the batch."""
    tokens: TokenArrays
    """On the models' device."""
    weights: TokenWeights
    shares: Tensor
    """What each token's loss of the policy is multiplied by, [N]."""
    actor_shares: Tensor
    """The same of the actor, [N]."""
    actor_reference: Tensor | None
    """log p_ω as the batch began, [N]; None is the actor's own, detached."""


class JointLoss:
    """The losses of a step's micro-batches; what a step measures goes to its meter.

    Args:
        job: the job as resolved.
        models: θ and, where it learns, ω.
        initial: the policy as the job began, for the penalty on KL to it; None without one.
        states: makes hidden states of sequences.
        lambda_control: λ_distill now.
        device: where the models compute.
    """

    def __init__(
        self,
        job: JobSpec,
        models: Mapping[Role, PreTrainedModel],
        initial: PreTrainedModel | None,
        states: CompletionStates,
        lambda_control: LambdaControl,
        device: torch.device,
    ) -> None:
        self._job = job
        self._models = models
        self._initial = initial
        self._states = states
        self._lambda_control = lambda_control
        self._device = device

    def policy(self, hidden: Tensor, micro: MicroBatch, meter: StepMeter) -> Tensor:
        """L_ppo_obrs(θ) (eq. 5) and the penalty on KL to the initial policy, from hidden states of θ, [N, H]."""
        tokens, shares = micro.tokens, micro.shares.to(self._device)
        scores = self._sampled(hidden, self._head("policy"), micro, entropy=True)
        weight, mask = micro.weights.weight.to(self._device), micro.weights.mask.to(self._device)
        loss = policy_loss_sum(
            scores.logprobs,
            tokens.reference_logprobs,
            tokens.advantages,
            weight,
            mask,
            clip_low=self._job.algorithm.clip_low,
            clip_high=self._job.algorithm.clip_high,
            dual_clip=self._job.algorithm.dual_clip,
            shares=shares,
        )
        assert scores.entropy is not None
        meter.policy(loss, scores.entropy)
        if self._initial is None:
            return loss.loss_sum
        penalty = self._job.algorithm.kl_penalty
        kl = kl_penalty(scores.logprobs, self._initial_logprobs(self._initial, micro), penalty.estimator)
        # Weighted as the policy's loss is, so that both are expectations under the policy.
        total = (kl.value * shares * weight * mask).masked_fill(mask == 0, 0.0).sum()
        meter.kl_to_initial(total, kl.clipped.sum())
        return loss.loss_sum if penalty.applied_to == "reward" else loss.loss_sum + penalty.weight * total

    def actor(self, policy_hidden: Tensor, micro: MicroBatch, meter: StepMeter) -> Tensor:
        """L_ppo(ω) + λ_distill · L_distill(ω) (eq. 6 and 7), from hidden states of θ, [N, H]."""
        algorithm, tokens = self._job.algorithm, micro.tokens
        hidden = self._states(self._models["actor"], *model_inputs(micro.batch.sequences, micro.passed))
        head = self._head("actor")
        divergence = forward_kl(
            policy_hidden,
            self._head("policy"),
            hidden,
            head,
            temperature=micro.batch.temperature,
            chunk_tokens=algorithm.distillation.chunk_tokens,
        )
        meter.distillation(divergence.detach())
        total = self._lambda_control.distillation_weight * divergence.sum() / micro.batch.num_tokens
        if not algorithm.actor_ppo:
            return total
        logprobs = self._sampled(hidden, head, micro, entropy=False).logprobs
        reference = micro.actor_reference
        loss = actor_loss_sum(
            logprobs,
            logprobs.detach() if reference is None else reference.to(self._device),
            tokens.actor_logprobs,
            tokens.advantages,
            cap=algorithm.actor_cap,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            shares=micro.actor_shares.to(self._device),
        )
        meter.actor(loss)
        return total + loss.loss_sum

    def _initial_logprobs(self, initial: PreTrainedModel, micro: MicroBatch) -> Tensor:
        if micro.tokens.initial_logprobs is not None:
            return micro.tokens.initial_logprobs
        chunk_tokens = self._job.scorer.chunk_tokens
        logprobs = sampled_logprobs(initial, self._states, micro.batch, micro.passed, chunk_tokens)
        release(initial)
        return logprobs

    def _head(self, role: Role) -> OutputHead:
        return output_head(self._models[role])

    def _sampled(self, hidden: Tensor, head: OutputHead, micro: MicroBatch, *, entropy: bool) -> VocabularyScores:
        return differentiable_token_logprobs(
            hidden,
            head,
            micro.tokens.token_ids,
            temperature=micro.batch.temperature,
            chunk_tokens=self._job.scorer.chunk_tokens,
            entropy=entropy,
        )
