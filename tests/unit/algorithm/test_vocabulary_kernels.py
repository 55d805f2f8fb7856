"""Both kernels of the vocabulary pass against log_softmax of whole rows in double precision: one interface, the same
tests. Without a GPU the Triton programs run in Triton's interpreter (see tests/conftest.py), where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_SECONDS, TEST_SECONDS
from tolerances import logprob_rounding, unit_roundoff
from torch import Tensor

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.output_head import OutputHead, uses_triton
from jackpot.algorithm.vocabulary import differentiable_token_logprobs, token_logprobs

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device"), needs_triton]
KERNELS = ["torch", pytest.param("triton", marks=needs_triton)]

# Not multiples of any tile: two rows of tiles, three columns, a rim on every side.
TOKENS, VOCABULARY, HIDDEN = 131, 300, 72
HEADS = ["plain", "everything"]


def make_inputs(
    kind: str, width: int = HIDDEN, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, OutputHead]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
        for shape in ((TOKENS, width), (VOCABULARY, width), (VOCABULARY,))
    )
    with torch.no_grad():
        weight *= 3 / width**0.5
    if kind == "plain":
        return hidden, OutputHead(weight)
    return hidden, OutputHead(weight, bias, 5.0, 0.7) if kind == "everything" else OutputHead(weight, bias)


def make_ids(n: int) -> Tensor:
    return torch.randint(VOCABULARY, (TOKENS, n), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def leaves(hidden: Tensor, head: OutputHead) -> list[Tensor]:
    return [hidden, head.weight] if head.bias is None else [hidden, head.weight, head.bias]


def exact_rows(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    """Log-probabilities [T, V] in double precision; gradients reach the given tensors."""
    bias = None if head.bias is None else head.bias.double()
    wide = OutputHead(head.weight.double(), bias, head.softcap, head.scale)
    return (wide.logits(hidden.double()) / temperature).log_softmax(-1)


def kl_rounding(
    policy_hidden: Tensor, policy_head: OutputHead, hidden: Tensor, head: OutputHead, temperature: float
) -> float:
    """Both models' errors of log p: relative ones of what weighs the differences, and absolute ones of these."""
    return logprob_rounding(policy_hidden, policy_head, temperature) + logprob_rounding(hidden, head, temperature)


def assert_gradients_match(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], error: float) -> None:
    """``error`` is that of log p, which is the relative one of a probability. Gradients are rounded to their format."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= (error + unit_roundoff(one.dtype)) * other.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", HEADS)
def test_scores_are_those_of_whole_rows(kernel: str, kind: str) -> None:
    hidden, head = make_inputs(kind)
    ids = make_ids(5)
    scores = token_logprobs(hidden, head, ids, temperature=0.6, top_k=6, entropy=True, kernel=kernel)
    rows, error = exact_rows(hidden, head, 0.6).detach(), logprob_rounding(hidden, head, 0.6)
    torch.testing.assert_close(scores.logprobs, rows.gather(1, ids).float(), rtol=0, atol=error)
    assert scores.topk_ids is not None
    assert torch.equal(scores.topk_ids, rows.topk(6).indices)
    torch.testing.assert_close(scores.topk_logprobs, rows.topk(6).values.float(), rtol=0, atol=error)
    torch.testing.assert_close(scores.entropy, -(rows.exp() * rows).sum(-1).float(), rtol=error, atol=error)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_whole_rows(kernel: str, kind: str) -> None:
    hidden, head = make_inputs(kind)
    ids = make_ids(2)
    ids[:, 1] = ids[:, 0]  # an id asked for twice counts twice
    factors = torch.randn(TOKENS, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    scores = differentiable_token_logprobs(hidden, head, ids, temperature=0.8, entropy=True, kernel=kernel)
    rows, error = exact_rows(hidden, head, 0.8), logprob_rounding(hidden, head, 0.8)
    expected = rows.gather(1, ids)
    torch.testing.assert_close(scores.logprobs, expected.float(), rtol=0, atol=error)
    assert scores.entropy is not None
    assert not scores.entropy.requires_grad
    assert_gradients_match(
        torch.autograd.grad((scores.logprobs * factors).sum(), leaves(hidden, head)),
        torch.autograd.grad((expected * factors).sum(), leaves(hidden, head)),
        error,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_forward_kl_is_that_of_whole_rows(kernel: str, kind: str) -> None:
    (policy_hidden, policy_head), (hidden, head) = make_inputs(kind, 40, 3), make_inputs(kind)
    kl = forward_kl(policy_hidden, policy_head, hidden, head, temperature=0.8, kernel=kernel)
    policy = exact_rows(policy_hidden, policy_head, 0.8).detach()
    expected = (policy.exp() * (policy - exact_rows(hidden, head, 0.8))).sum(-1)
    error = kl_rounding(policy_hidden, policy_head, hidden, head, 0.8)
    torch.testing.assert_close(kl, expected.float(), rtol=error, atol=error)
    factors = torch.randn(TOKENS, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert_gradients_match(
        torch.autograd.grad((kl * factors).sum(), leaves(hidden, head)),
        torch.autograd.grad((expected * factors).sum(), leaves(hidden, head)),
        error,
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_against_itself_diverges_by_nothing(kernel: str) -> None:
    hidden, head = make_inputs("bias")
    kl = forward_kl(hidden, head, hidden, head, kernel=kernel)
    assert kl.abs().max() <= kl_rounding(hidden, head, hidden, head, 1.0)


@needs_triton
def test_slices_of_tokens_and_columns_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long inputs go in slices, gradients in blocks of columns; sums over slices are those of one."""
    from jackpot.algorithm import vocabulary_triton

    monkeypatch.setattr(vocabulary_triton, "TOKENS", 100)
    monkeypatch.setattr(vocabulary_triton, "TOPK_TOKENS", 70)
    monkeypatch.setattr(vocabulary_triton, "BLOCK_ELEMENTS", 100 * 256)
    hidden, head = make_inputs("bias")
    ids = make_ids(1)[:, 0]
    rows, error = exact_rows(hidden, head, 1.0), logprob_rounding(hidden, head, 1.0)
    scores = token_logprobs(hidden, head, ids, top_k=3, kernel="triton")
    assert scores.topk_ids is not None
    assert torch.equal(scores.topk_ids, rows.topk(3).indices)
    torch.testing.assert_close(scores.topk_logprobs, rows.topk(3).values.detach().float(), rtol=0, atol=error)
    found = differentiable_token_logprobs(hidden, head, ids, kernel="triton").logprobs
    assert found.shape == (TOKENS,)
    assert_gradients_match(
        torch.autograd.grad(found.sum(), leaves(hidden, head)),
        torch.autograd.grad(rows.gather(1, ids[:, None]).sum(), leaves(hidden, head)),
        error,
    )
    policy_hidden, policy_head = make_inputs("bias", 40, 3)
    policy = exact_rows(policy_hidden, policy_head, 1.0).detach()
    rows = exact_rows(hidden, head, 1.0)
    kl = forward_kl(policy_hidden, policy_head, hidden, head, kernel="triton")
    expected = (policy.exp() * (policy - rows)).sum(-1)
    error = kl_rounding(policy_hidden, policy_head, hidden, head, 1.0)
    torch.testing.assert_close(kl, expected.float(), rtol=error, atol=error)
    assert_gradients_match(
        torch.autograd.grad(kl.sum(), leaves(hidden, head)),
        torch.autograd.grad(expected.sum(), leaves(hidden, head)),
        error,
    )


@needs_triton
def test_more_asked_for_than_there_is() -> None:
    """k beyond the vocabulary gives all of it, in order; frozen tensors get no gradient."""
    hidden, head = make_inputs("plain")
    for vocabulary, found in ((5, 5), (128, 20)):  # 128: eight groups of neighbours, fewer than the 20 asked for
        few = OutputHead(head.weight.detach()[:vocabulary])
        scores = token_logprobs(hidden, few, make_ids(1) % vocabulary, top_k=20, kernel="triton")
        rows, error = exact_rows(hidden, few, 1.0).detach(), logprob_rounding(hidden, few, 1.0)
        torch.testing.assert_close(scores.topk_logprobs, rows.topk(found).values.float(), rtol=0, atol=error)
    differentiable_token_logprobs(hidden, few, make_ids(1) % 128, kernel="triton").logprobs.sum().backward()
    assert few.weight.grad is None
    assert hidden.grad is not None


@needs_triton
def test_half_precision_is_accumulated_in_float32() -> None:
    hidden, head = make_inputs("bias", dtype=torch.float16)
    ids = make_ids(1)
    scores = differentiable_token_logprobs(hidden, head, ids, kernel="triton")
    rows = exact_rows(hidden, head, 1.0)
    error = logprob_rounding(hidden, head, 1.0)
    torch.testing.assert_close(scores.logprobs, rows.gather(1, ids).float(), rtol=0, atol=error)
    found = torch.autograd.grad(scores.logprobs.sum(), leaves(hidden, head))
    expected = torch.autograd.grad(rows.gather(1, ids).sum(), leaves(hidden, head), retain_graph=True)
    assert_gradients_match(found, expected, error + half_rounding(hidden, head, rows, rows.gather(1, ids), expected))


def half_rounding(
    hidden: Tensor, head: OutputHead, rows: Tensor, total: Tensor, gradients: tuple[Tensor, ...]
) -> float:
    """A block's gradient of the logits is rounded to 16 bits before it is summed up: the error of the sums, over the
    smallest of the gradients' largest elements. ``total`` [T, …] is what is differentiated, a function of ``rows``."""
    (in_rows,) = torch.autograd.grad(total.sum(), rows, retain_graph=True)
    in_logits = (in_rows - rows.exp() * in_rows.sum(-1, keepdim=True)).abs().detach()
    weight, states = head.weight.detach().double().abs(), hidden.detach().double().abs()
    sums = [in_logits @ weight, in_logits.T @ states, in_logits.sum(0)]
    ratios = [float(one.max() / gradient.abs().max()) for one, gradient in zip(sums, gradients, strict=False)]
    return unit_roundoff(hidden.dtype) * max(ratios)


def test_auto_takes_triton_on_gpus_in_half_precision_alone() -> None:
    hidden, head = make_inputs("plain")
    assert not uses_triton("auto", head, hidden)
    assert uses_triton("triton", head, hidden)
    half = OutputHead(head.weight.detach().bfloat16())
    hopper = GPU and torch.cuda.get_device_capability() >= (9, 0)
    assert uses_triton("auto", half, hidden.bfloat16()) == (hopper and importlib.util.find_spec("triton") is not None)
    odd = OutputHead(half.weight[:, :-4].contiguous())
    assert not uses_triton("auto", odd, hidden[:, :-4].bfloat16())


@needs_triton
def test_the_most_probable_may_be_neighbours() -> None:
    """Groups of neighbours are looked into where more than their best is among the most probable."""
    hidden, head = make_inputs("plain")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        # For every second token the ids 32 to 47, one group, are far above the others.
        direction = torch.randn(HIDDEN, generator=generator, dtype=torch.float64).to(DEVICE, torch.float32)
        hidden[::2] += 2 * direction
        head.weight[32:48] += direction / HIDDEN**0.5
        head.weight[40] = head.weight[41]  # and two are equal
    scores = token_logprobs(hidden, head, make_ids(1), top_k=20, kernel="triton")
    rows = exact_rows(hidden, head, 1.0).detach()
    assert scores.topk_ids is not None
    found = torch.sort(scores.topk_ids).values
    expected = rows.topk(20).indices
    expected[expected == 40] = 41
    found[found == 40] = 41
    assert torch.equal(torch.sort(found).values, torch.sort(expected).values)
    error = logprob_rounding(hidden, head, 1.0)
    torch.testing.assert_close(scores.topk_logprobs, rows.topk(20).values.float(), rtol=0, atol=error)


@needs_triton
@pytest.mark.timeout(TEST_SECONDS)
@pytest.mark.parametrize("gpu", ["H100", "B200"])
def test_the_programs_compile_for_a_gpu_without_one(tmp_path: Path, gpu: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_vocabulary_kernels.py")), gpu],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    instruction = {"H100": "wgmma", "B200": "tcgen05.mma"}[gpu]
    assert {row["program"]: row["instruction"] for row in rows} == {
        "log_sum_kernel": instruction,
        "chosen_logits_kernel": None,  # products with one vector: bound by memory
        "candidates_kernel": None,
        "logprob_gradient_kernel": instruction,
        "forward_kl_kernel": instruction,
        "forward_kl_gradient_kernel": instruction,
    }
    assert all(row["fits"] for row in rows)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.bfloat16, torch.float16)])
def test_the_compiled_programs_in_half_precision(dtype: torch.dtype) -> None:
    (policy_hidden, policy_head), (hidden, head) = (
        make_inputs("everything", 40, 3, dtype),
        make_inputs("bias", dtype=dtype),
    )
    ids = make_ids(1)
    rows, policy = exact_rows(hidden, head, 0.8), exact_rows(policy_hidden, policy_head, 0.8).detach()
    error = kl_rounding(policy_hidden, policy_head, hidden, head, 0.8)
    scores = differentiable_token_logprobs(hidden, head, ids, temperature=0.8)
    kl = forward_kl(policy_hidden, policy_head, hidden, head, temperature=0.8)
    expected_kl = (policy.exp() * (policy - rows)).sum(-1)
    torch.testing.assert_close(scores.logprobs, rows.gather(1, ids).float(), rtol=0, atol=error)
    torch.testing.assert_close(kl, expected_kl.float(), rtol=error, atol=error)
    # Two kernels' gradients, each rounded, and their sum.
    total = rows.gather(1, ids)[:, 0] + expected_kl
    expected = torch.autograd.grad(total.sum(), leaves(hidden, head), retain_graph=True)
    assert_gradients_match(
        torch.autograd.grad(scores.logprobs.sum() + kl.sum(), leaves(hidden, head)),
        expected,
        error + 3 * half_rounding(hidden, head, rows, total, expected),
    )


@pytest.mark.parametrize("vocabulary", [pytest.param(v, marks=gpu) for v in (32_000, 152_000)])
def test_memory_does_not_grow_with_the_vocabulary(vocabulary: int) -> None:
    """Beyond inputs and gradients: the gradient of a block's logits in 16 bits, that of the states in float32, and
    three numbers a token and tile of the vocabulary."""
    from jackpot.algorithm import vocabulary_triton

    hidden = torch.randn(4096, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    differentiable_token_logprobs(hidden, OutputHead(weight), ids).logprobs.sum().backward()
    added = torch.cuda.max_memory_allocated() - before - weight.nbytes
    block, states, sums = 2 * vocabulary_triton.BLOCK_ELEMENTS, 4 * hidden.numel(), 12 * 4096 * (vocabulary // 256 + 1)
    assert added < 1.1 * (block + states + sums)
