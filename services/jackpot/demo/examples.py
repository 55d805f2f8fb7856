"""Examples for the warm-up: prompts with partly wrong answers, in one model's style. numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jackpot.demo.recipe import ModelRecipe, Recipe
from jackpot.demo.task import DIGITS, HELD_OUT_MODULUS, SEPARATORS
from jackpot.demo.tokenizer import EOS, TOKEN_IDS


def prompt_tokens(num_digits: int) -> int:
    """Tokens of a prompt: all nines, the number, and two signs."""
    return 2 * num_digits + 2


def answer_tokens(num_digits: int) -> int:
    """Tokens of an answer: digits, the separators between them, and the end."""
    return 2 * num_digits


def style_probabilities(model: ModelRecipe) -> NDArray[np.float64]:
    """How often this model's examples use each separator: [separators], a softmax of normal logits."""
    logits = np.random.default_rng(model.style_seed).normal(size=len(SEPARATORS)) * model.style_spread
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def example_batches(recipe: Recipe, model: ModelRecipe, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Endless batches of token ids [batch, prompt_tokens + answer_tokens]. No held-out number occurs."""
    num_digits = recipe.num_digits
    prompt, length = prompt_tokens(num_digits), prompt_tokens(num_digits) + answer_tokens(num_digits)
    generator = np.random.default_rng([recipe.seed, model.style_seed])
    style = style_probabilities(model)
    digit_ids = np.array([TOKEN_IDS[digit] for digit in DIGITS])
    separator_ids = np.array([TOKEN_IDS[separator] for separator in SEPARATORS])
    while True:
        digits = _numbers(generator, batch_size, num_digits)
        rows = np.empty((batch_size, length), dtype=np.int64)
        rows[:, :num_digits] = digit_ids[9]
        rows[:, num_digits] = TOKEN_IDS["-"]
        rows[:, num_digits + 1 : prompt - 1] = digit_ids[digits]
        rows[:, prompt - 1] = TOKEN_IDS["="]
        rows[:, prompt::2] = digit_ids[_answers(generator, digits, recipe, model.slip_rate)]
        separators = generator.choice(separator_ids, p=style, size=(batch_size, num_digits - 1))
        rows[:, prompt + 1 : -1 : 2] = separators
        rows[:, -1] = TOKEN_IDS[EOS]
        yield rows


def _numbers(generator: np.random.Generator, count: int, num_digits: int) -> NDArray[np.int64]:
    # [count, num_digits]. A held-out number is moved off its digit sum by changing its last digit.
    digits = generator.integers(0, 10, size=(count, num_digits))
    held_out = digits.sum(axis=1) % HELD_OUT_MODULUS == 0
    shift = generator.integers(1, 10, size=count)
    digits[held_out, -1] = (digits[held_out, -1] + shift[held_out]) % 10
    return digits


def _answers(
    generator: np.random.Generator, digits: NDArray[np.int64], recipe: Recipe, slip_rate: float
) -> NDArray[np.int64]:
    answers = 9 - digits
    misread = np.isin(digits, [int(digit) for digit in recipe.misread_digits])
    misread &= generator.random(digits.shape) < recipe.misread_rate
    answers[misread] = 10 - digits[misread]
    slips = generator.random(digits.shape) < slip_rate
    answers[slips] = generator.integers(0, 10, size=int(slips.sum()))
    return answers
