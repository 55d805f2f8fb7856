"""The scoring kernel against log_softmax of whole rows: values, top-k, entropy, gradients, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import gamma, logprob_rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jackpot.algorithm.obrs import full_normalizer
from jackpot.algorithm.output_head import OutputHead, token_slices
from jackpot.algorithm.vocabulary import differentiable_token_logprobs, iterate_logprobs, token_logprobs

# Wide enough for several slices of the smallest kind, see token_slices.
TOKENS, VOCABULARY, HIDDEN = 80, 60_001, 8
HEADS = ["plain", "bias", "softcap", "everything"]


def make_inputs(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, OutputHead]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    return hidden, OutputHead(
        weight,
        bias if kind in ("bias", "everything") else None,
        5.0 if kind in ("softcap", "everything") else None,
        0.7 if kind == "everything" else 1.0,
    )


def make_ids(n: int) -> Tensor:
    return torch.randint(VOCABULARY, (TOKENS, n), generator=torch.Generator().manual_seed(1))


def leaves(hidden: Tensor, head: OutputHead) -> list[Tensor]:
    return [hidden, head.weight] if head.bias is None else [hidden, head.weight, head.bias]


def whole_rows(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    return (head.logits(hidden) / temperature).log_softmax(-1)


def exact_rows(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    return whole_rows(hidden.double(), OutputHead(*as_double(head)), temperature)


def as_double(head: OutputHead) -> tuple[Tensor, Tensor | None, float | None, float]:
    return head.weight.double(), None if head.bias is None else head.bias.double(), head.softcap, head.scale


def test_head_by_hand() -> None:
    head = OutputHead(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0]), softcap=4.0, scale=2.0)
    expected = 4.0 * torch.tanh(2.0 * torch.tensor([5.5, 2.0]) / 4.0)
    torch.testing.assert_close(head.logits(torch.tensor([1.0, 2.0])), expected)


def test_slices_cover_all_tokens_and_are_larger_for_small_vocabularies() -> None:
    assert list(token_slices(300, 151_936, 128)) == [slice(0, 128), slice(128, 256), slice(256, 300)]
    assert next(token_slices(300, 151_936, 1)) == slice(0, 27)
    assert list(token_slices(5000, 61, 128)) == [slice(0, 5000)]
    assert list(token_slices(0, 61, 128)) == []
    with pytest.raises(ValueError, match="chunk_tokens"):
        list(token_slices(5, 61, 0))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_whole_rows(kind: str, temperature: float) -> None:
    hidden, head = make_inputs(kind)
    ids = make_ids(3)
    scores = token_logprobs(hidden, head, ids, temperature=temperature, chunk_tokens=70, top_k=20, entropy=True)
    rows, error = exact_rows(hidden, head, temperature).detach(), logprob_rounding(hidden, head, temperature)
    assert scores.logprobs.dtype == torch.float32
    assert not scores.logprobs.requires_grad
    torch.testing.assert_close(scores.logprobs, rows.gather(1, ids).float(), rtol=0, atol=error)
    assert scores.topk_ids is not None
    assert scores.topk_logprobs is not None
    assert scores.entropy is not None
    torch.testing.assert_close(scores.topk_logprobs, rows.topk(20).values.float(), rtol=0, atol=error)
    torch.testing.assert_close(rows.gather(1, scores.topk_ids).float(), scores.topk_logprobs, rtol=0, atol=error)
    torch.testing.assert_close(scores.entropy, -(rows.exp() * rows).sum(-1).float(), rtol=error, atol=error)


def test_the_slice_size_does_not_show() -> None:
    hidden, head = make_inputs("plain")
    results = [token_logprobs(hidden, head, make_ids(2), chunk_tokens=size, top_k=5) for size in (1, 97, 1000)]
    twice = 2 * logprob_rounding(hidden, head, 1.0)  # a BLAS may sum one row in another order than several
    for result in results[1:]:
        torch.testing.assert_close(result.logprobs, results[0].logprobs, rtol=0, atol=twice)
        assert torch.equal(result.topk_ids, results[0].topk_ids)


def test_shapes_and_what_is_not_asked_for() -> None:
    hidden, head = make_inputs("plain")
    scores = token_logprobs(hidden, head, make_ids(1)[:, 0])
    assert scores.logprobs.shape == (TOKENS,)
    assert (scores.topk_ids, scores.topk_logprobs, scores.entropy) == (None, None, None)
    small = OutputHead(torch.randn(4, HIDDEN))
    nothing = token_logprobs(hidden[:0], small, torch.zeros(0, 3, dtype=torch.int64), top_k=20, entropy=True)
    assert nothing.logprobs.shape == (0, 3)
    assert nothing.topk_ids is not None
    assert nothing.topk_ids.shape == (0, 4)  # no more than there is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_lose_nothing_more(dtype: torch.dtype) -> None:
    """The products of rounded weights are accumulated in float32, not rounded again as the model's own logits are."""
    hidden, head = make_inputs("plain", dtype)
    ids = make_ids(1)
    exact = exact_rows(hidden, head, 1.0).gather(1, ids).float()
    scores = token_logprobs(hidden, head, ids, chunk_tokens=70)
    torch.testing.assert_close(scores.logprobs, exact, rtol=0, atol=logprob_rounding(hidden, head, 1.0))
    own = whole_rows(hidden, head, 1.0).gather(1, ids).float()
    assert (own - exact).abs().max() > 1e-3


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_whole_rows(kind: str) -> None:
    hidden, head = make_inputs(kind)
    ids = make_ids(2)
    ids[:, 1] = ids[:, 0]  # an id asked for twice counts twice
    factors = torch.randn(TOKENS, 2, generator=torch.Generator().manual_seed(2))
    sliced = differentiable_token_logprobs(hidden, head, ids, temperature=0.8, chunk_tokens=70, entropy=True)
    rows, error = exact_rows(hidden, head, 0.8), logprob_rounding(hidden, head, 0.8)
    torch.testing.assert_close(sliced.logprobs, rows.gather(1, ids).float(), rtol=0, atol=error)
    assert sliced.entropy is not None
    assert not sliced.entropy.requires_grad
    torch.testing.assert_close(sliced.entropy, -(rows.exp() * rows).sum(-1).detach().float(), rtol=error, atol=error)
    found = torch.autograd.grad((sliced.logprobs * factors).sum(), leaves(hidden, head))
    expected = torch.autograd.grad((rows.gather(1, ids) * factors).sum(), leaves(hidden, head))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= error * other.abs().max()


def test_gradients_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (7, 4), (7,))
    )
    ids = torch.tensor([[0, 6], [3, 3], [5, 1]])

    def logprobs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return differentiable_token_logprobs(h, OutputHead(w, b, 2.0, 0.5), ids, temperature=0.7).logprobs

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_frozen_tensors_get_no_gradient_and_formats_are_kept() -> None:
    hidden, head = make_inputs("bias", torch.bfloat16)
    head.weight.requires_grad_(False)
    scores = differentiable_token_logprobs(hidden, head, make_ids(1)[:, 0])
    scores.logprobs.sum().backward()
    assert scores.logprobs.shape == (TOKENS,)
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    rows = exact_rows(hidden, head, 1.0)
    (expected,) = torch.autograd.grad(rows.gather(1, make_ids(1)).sum(), hidden)
    assert (hidden.grad - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_the_visitor_gives_the_full_normalizer_of_two_models() -> None:
    (target_hidden, target_head), (actor_hidden, actor_head) = make_inputs("plain"), make_inputs("softcap", seed=3)
    z = torch.empty(TOKENS)
    target = iterate_logprobs(target_hidden, target_head, temperature=0.9, chunk_tokens=70)
    actor = iterate_logprobs(actor_hidden, actor_head, temperature=0.9, chunk_tokens=70)
    for (tokens, target_rows), (same_tokens, actor_rows) in zip(target, actor, strict=True):
        assert tokens == same_tokens
        z[tokens] = full_normalizer(target_rows, actor_rows, 1.5).head
    p_t, p_inf = exact_rows(target_hidden, target_head, 0.9).exp(), exact_rows(actor_hidden, actor_head, 0.9).exp()
    # Every term is a probability, with the relative error of its logarithm; their sum rounds once more.
    error = gamma(VOCABULARY) + logprob_rounding(target_hidden, target_head, 0.9)
    exact = torch.minimum(p_inf, p_t / 1.5).sum(-1).detach().float()
    torch.testing.assert_close(z, exact, rtol=error, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_all_rows_at_once_never_exist() -> None:
    hidden, head = make_inputs("everything")
    with LargestTensor() as largest:
        token_logprobs(hidden, head, make_ids(3), chunk_tokens=1, top_k=20, entropy=True)
        scores = differentiable_token_logprobs(hidden, head, make_ids(1), chunk_tokens=1, entropy=True)
        scores.logprobs.sum().backward()
    assert largest.num_elements <= 1 << 22
    assert TOKENS * VOCABULARY > 1 << 22


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(dtype: torch.dtype) -> None:
    hidden, head = make_inputs("plain", dtype)
    device_hidden = hidden.detach().cuda().requires_grad_()
    device_head = OutputHead(head.weight.detach().cuda().requires_grad_())
    ids = make_ids(1)
    scores = differentiable_token_logprobs(device_hidden, device_head, ids.cuda(), chunk_tokens=70)
    exact = whole_rows(hidden.double(), OutputHead(head.weight.double()), 1.0).gather(1, ids)
    torch.testing.assert_close(scores.logprobs.cpu(), exact.float(), rtol=0, atol=logprob_rounding(hidden, head, 1.0))
    scores.logprobs.sum().backward()
    expected = torch.autograd.grad(exact.sum(), [hidden, head.weight])
    for one, other in zip((device_hidden.grad, device_head.weight.grad), expected, strict=True):
        assert one is not None
        assert (one.cpu() - other).abs().max() <= 2**-6 * other.abs().max()
