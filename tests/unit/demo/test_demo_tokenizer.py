"""The demo's vocabulary and the examples of its warm-up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jackpot.demo.examples import answer_tokens, example_batches, prompt_tokens, style_probabilities
from jackpot.demo.recipe import COMPLEMENT
from jackpot.demo.task import ComplementTask, complement, is_held_out
from jackpot.demo.tokenizer import VOCABULARY, build_tokenizer, save_tokenizer

TEXTS = ["999999-381592=", "6 1,8;4 0-7", " ,;.:-/_|+*~!?#$%&@^<>(){}", "  0  1  ", "= 9"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip_one_token_a_character(text: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert [VOCABULARY[index] for index in ids] == list(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens() -> None:
    tokenizer = build_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(VOCABULARY) == 40
    assert tokenizer("6x")["input_ids"] == [9, 2]
    assert tokenizer.decode([9, 1], skip_special_tokens=True) == "6"


def _texts(slip_rate: float, misread_rate: float) -> list[tuple[str, str]]:
    recipe = replace(COMPLEMENT, misread_rate=misread_rate)
    model = replace(recipe.policy, slip_rate=slip_rate)
    rows = next(example_batches(recipe, model, 512))
    assert rows.shape == (512, prompt_tokens(6) + answer_tokens(6))
    texts = ["".join(VOCABULARY[index] for index in row) for row in rows]
    return [(text[: prompt_tokens(6)], text[prompt_tokens(6) :]) for text in texts]


def test_examples_without_slips_are_right_and_never_held_out() -> None:
    task = ComplementTask({}, seed=0)
    for prompt, answer in _texts(slip_rate=0.0, misread_rate=0.0):
        number = prompt[7:-1]
        assert not is_held_out(number)
        assert answer.endswith("<eos>") and answer[:-5:2] == complement(number)
        item = replace(task.train_prompt(0), prompt=prompt, metadata={"answer": complement(number)})
        assert task.reward(item, answer.removesuffix("<eos>")) == 1.0


def test_misread_digits_become_ten_minus_the_digit_and_no_others_change() -> None:
    for prompt, answer in _texts(slip_rate=0.0, misread_rate=1.0):
        wrong = "".join(str(10 - int(d)) if d in COMPLEMENT.misread_digits else str(9 - int(d)) for d in prompt[7:-1])
        assert answer[:-5:2] == wrong


def test_slips_come_at_their_rate() -> None:
    pairs = _texts(slip_rate=0.5, misread_rate=0.0)
    wrong = np.mean(
        [a != b for prompt, answer in pairs for a, b in zip(answer[:-5:2], complement(prompt[7:-1]), strict=True)]
    )
    assert wrong == pytest.approx(0.45, abs=0.03)  # a tenth of the random digits are right by chance


def test_the_two_models_prefer_different_separators() -> None:
    policy, actor = style_probabilities(COMPLEMENT.policy), style_probabilities(COMPLEMENT.actor)
    assert policy.sum() == pytest.approx(1.0) and actor.sum() == pytest.approx(1.0)
    assert float((policy * np.log(policy / actor)).sum()) > 0.3  # KL in nats a separator


def test_examples_repeat_with_the_seed() -> None:
    first, second = example_batches(COMPLEMENT, COMPLEMENT.policy, 8), example_batches(COMPLEMENT, COMPLEMENT.policy, 8)
    assert (next(first) == next(second)).all() and (next(first) == next(second)).all()
