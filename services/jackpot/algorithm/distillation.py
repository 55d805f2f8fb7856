"""L_distill: forward KL from policy to actor over the full vocabulary (paper eq. 7), one slice of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jackpot.algorithm.output_head import (
    DEFAULT_CHUNK_TOKENS,
    HeadGradients,
    OutputHead,
    VocabularyKernel,
    log_normalize_,
    slice_logits,
    softcap_slope,
    token_slices,
    uses_triton,
    widened,
)


def forward_kl(
    policy_hidden: Tensor,
    policy_head: OutputHead,
    actor_hidden: Tensor,
    actor_head: OutputHead,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    kernel: VocabularyKernel = "auto",
) -> Tensor:
    """KL(SG(p_new) ‖ p_ω) = Σ_x p_new(x) (log p_new(x) − log p_ω(x)) at each token, in nats; eq. 7.

    A tensor of [tokens, vocabulary] is never held: the backward pass recomputes each slice of both models. The loss is
    the (weighted) mean of the result; the detached result is the per-token record.

    Args:
        policy_hidden: [T, H_policy], states that predict the trajectories' tokens; receives no gradient.
        policy_head: receives no gradient.
        actor_hidden: [T, H_actor]; receives a gradient.
        actor_head: its weight and bias receive a gradient.
        temperature: divides both models' logits.
        chunk_tokens: tokens per slice, see :func:`token_slices`.
        kernel: the implementation; see :func:`uses_triton`.

    Returns:
        [T], float32.

    Raises:
        ValueError: the two vocabularies differ in size.
    """
    if len(policy_head.weight) != len(actor_head.weight):
        raise ValueError(
            f"policy and actor must share a vocabulary: they have {len(policy_head.weight)} and "
            f"{len(actor_head.weight)} entries"
        )
    if uses_triton(kernel, policy_head, policy_hidden, actor_head, actor_hidden):
        from jackpot.algorithm import vocabulary_triton

        return vocabulary_triton.forward_kl(
            policy_hidden, policy_head, actor_hidden, actor_head, temperature=temperature
        )
    teacher = (policy_hidden.detach(), policy_head, temperature, chunk_tokens)
    result: Tensor = _ForwardKl.apply(  # type: ignore[no-untyped-call]
        actor_hidden, actor_head.weight, actor_head.bias, actor_head, *teacher
    )
    return result


class _ForwardKl(torch.autograd.Function):
    """Σ p (log p − log q), whose gradient in the actor's logits is q − p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        policy_hidden: Tensor,
        policy_head: OutputHead,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        wide_head, wide_hidden = widened(head, hidden)
        wide_policy_head, wide_policy_hidden = widened(policy_head, policy_hidden)
        divergence = wide_hidden.new_empty(len(hidden), dtype=torch.promote_types(wide_hidden.dtype, torch.float32))
        for tokens in token_slices(len(hidden), len(head.weight), chunk_tokens):
            policy = log_normalize_(slice_logits(wide_policy_head, wide_policy_hidden[tokens], temperature))
            actor = log_normalize_(slice_logits(wide_head, wide_hidden[tokens], temperature))
            difference = torch.sub(policy, actor, out=actor)
            divergence[tokens] = policy.exp_().mul_(difference).sum(-1)
        policy_bias = () if policy_head.bias is None else (policy_head.bias,)
        actor_bias = () if bias is None else (bias,)
        ctx.num_actor_tensors = 2 + len(actor_bias)
        ctx.save_for_backward(hidden, weight, *actor_bias, policy_hidden, policy_head.weight, *policy_bias)
        ctx.scales = ((head.softcap, head.scale), (policy_head.softcap, policy_head.scale))
        ctx.settings = (temperature, chunk_tokens)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        actor_tensors = ctx.saved_tensors[: ctx.num_actor_tensors]
        policy_tensors = ctx.saved_tensors[ctx.num_actor_tensors :]
        head, hidden = _restored(actor_tensors, ctx.scales[0])
        policy_head, policy_hidden = _restored(policy_tensors, ctx.scales[1])
        temperature, chunk_tokens = ctx.settings
        gradients = HeadGradients(head, hidden, ctx.needs_input_grad[:3])
        for tokens in token_slices(len(hidden), len(head.weight), chunk_tokens):
            logits = slice_logits(head, hidden[tokens], temperature)
            slope = softcap_slope(head, logits, temperature)
            in_logits = log_normalize_(logits).exp_()
            policy = log_normalize_(slice_logits(policy_head, policy_hidden[tokens], temperature)).exp_()
            in_logits.sub_(policy).mul_(gradient[tokens, None])
            gradients.add(tokens, in_logits, slope, temperature)
        return (*gradients.like(*actor_tensors), None, None, None, None, None)


def _restored(saved: tuple[Tensor, ...], scales: tuple[float | None, float]) -> tuple[OutputHead, Tensor]:
    hidden, weight, *bias = saved
    return widened(OutputHead(weight, bias[0] if bias else None, *scales), hidden)
