"""Forward KL in slices against whole rows: values, gradients, memory."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import logprob_rounding, unit_roundoff
from torch import Tensor

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.output_head import OutputHead

# Wide enough for several slices of the smallest kind, see token_slices.
TOKENS, VOCABULARY = 80, 60_001


def make_model(width: int, kind: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, OutputHead]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((TOKENS, width), (VOCABULARY, width), (VOCABULARY,))
    )
    return hidden, OutputHead(weight, bias, 5.0, 0.7) if kind == "everything" else OutputHead(weight)


def whole_rows(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    return (head.logits(hidden) / temperature).log_softmax(-1)


def exact_rows(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    bias = None if head.bias is None else head.bias.double()
    return whole_rows(hidden.double(), OutputHead(head.weight.double(), bias, head.softcap, head.scale), temperature)


def literal_kl(policy: Tensor, actor: Tensor) -> Tensor:
    """Eq. 7: Σ_x SG(p_new(x)) (log SG(p_new(x)) − log p_ω(x)). Rows [T, V] → [T]."""
    policy = policy.detach()
    return (policy.exp() * (policy - actor)).sum(-1)


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradients_are_those_of_whole_rows(kind: str, temperature: float) -> None:
    (policy_hidden, policy_head), (hidden, head) = make_model(12, kind, 0), make_model(8, kind, 1)
    kl = forward_kl(policy_hidden, policy_head, hidden, head, temperature=temperature, chunk_tokens=70)
    assert kl.shape == (TOKENS,)
    exact = literal_kl(exact_rows(policy_hidden, policy_head, temperature), exact_rows(hidden, head, temperature))
    # An error e of log p is a relative error e of p, which weighs what is summed, and an absolute one of log p itself.
    error = sum(logprob_rounding(*one, temperature) for one in ((policy_hidden, policy_head), (hidden, head)))
    torch.testing.assert_close(kl, exact.float(), rtol=error, atol=error)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2))
    inputs = [hidden, head.weight] if head.bias is None else [hidden, head.weight, head.bias]
    found = torch.autograd.grad((weights * kl).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((weights * exact).sum(), inputs), strict=True):
        assert (one - other).abs().max() <= error * other.abs().max()


def test_gradients_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    policy_hidden, policy_weight, hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 5), (7, 5), (3, 4), (7, 4), (7,))
    )

    def kl(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return forward_kl(
            policy_hidden, OutputHead(policy_weight, softcap=3.0), h, OutputHead(w, b, 2.0, 0.5), temperature=0.7
        )

    inputs = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))
    assert torch.autograd.gradcheck(kl, inputs)


def test_the_policy_gets_no_gradient() -> None:
    (policy_hidden, policy_head), (hidden, head) = make_model(12, "plain", 0), make_model(8, "plain", 1)
    forward_kl(policy_hidden, policy_head, hidden, head).sum().backward()
    assert policy_hidden.grad is None
    assert policy_head.weight.grad is None
    assert hidden.grad is not None
    assert head.weight.grad is not None


def test_a_model_does_not_diverge_from_itself() -> None:
    hidden, head = make_model(12, "plain", 0)
    kl = forward_kl(hidden, head, hidden, head)
    error = 2 * logprob_rounding(hidden, head, 1.0)  # of both models' log p, even if they are not rounded alike
    torch.testing.assert_close(kl, torch.zeros(TOKENS), rtol=0, atol=error)
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    largest = float(head.weight.detach().abs().max())
    torch.testing.assert_close(gradient, torch.zeros_like(hidden), rtol=0, atol=error * largest)


def test_the_direction_is_forward() -> None:
    """KL(policy ‖ actor) by hand for two tokens."""
    one = torch.ones(1, 1)
    policy, actor = torch.tensor([[0.9], [0.1]]).log(), torch.tensor([[0.5], [0.5]]).log()
    kl = forward_kl(one, OutputHead(policy), one, OutputHead(actor))
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)  # 0.368; the reverse would be 0.511
    # Logarithms of at most 2.4, each weighed by its probability, and a sum of two.
    assert kl.item() == pytest.approx(expected, abs=8 * 2.4 * unit_roundoff())


def test_half_precision_actor_keeps_its_format() -> None:
    (policy_hidden, policy_head), (hidden, head) = make_model(12, "plain", 0), make_model(8, "plain", 1, torch.bfloat16)
    kl = forward_kl(policy_hidden, policy_head, hidden, head)
    assert kl.dtype == torch.float32
    exact = literal_kl(exact_rows(policy_hidden, policy_head, 1.0), exact_rows(hidden, head, 1.0))
    error = sum(logprob_rounding(*one, 1.0) for one in ((policy_hidden, policy_head), (hidden, head)))
    torch.testing.assert_close(kl, exact.float(), rtol=error, atol=error)
    found = torch.autograd.grad(kl.mean(), [hidden, head.weight])
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.bfloat16]


def test_no_token_and_different_vocabularies() -> None:
    head = OutputHead(torch.randn(9, 4, requires_grad=True))
    hidden = torch.zeros(0, 4, requires_grad=True)
    kl = forward_kl(torch.zeros(0, 4), head, hidden, head)
    kl.sum().backward()
    assert kl.shape == (0,)
    assert head.weight.grad is not None
    assert (head.weight.grad == 0).all()
    with pytest.raises(ValueError, match="9 and 8"):
        forward_kl(torch.zeros(1, 4), head, torch.zeros(1, 4), OutputHead(torch.zeros(8, 4)))
