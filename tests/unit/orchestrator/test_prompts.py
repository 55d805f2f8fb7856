"""Which prompts are used: what cannot be encoded, is too long or stands twice is left out, and said by its line."""

from __future__ import annotations

import numpy as np
import pytest

from jackpot.config import parse_job
from jackpot.errors import ConfigError, PromptError
from jackpot.orchestrator.preflight import survey_prompts
from jackpot.orchestrator.prompts import PromptEncoder, held_out
from jackpot.orchestrator.tasks import TaskItem
from jackpot.orchestrator.tokenizer import PromptTokenizer


@pytest.fixture
def encoder(make_model) -> PromptEncoder:
    model = str(make_model())  # 128 positions
    job = parse_job(
        {"policy": {"model": model}, "actor": {"model": model}, "task": {"name": "complement"}},
        ["sampling.max_tokens=100"],
    )
    return PromptEncoder.of_job(job, PromptTokenizer.of_job(job))


class Prompts:
    def __init__(self, *prompts: str) -> None:
        self.items = [TaskItem(prompt, {"line": number}) for number, prompt in enumerate(prompts, start=1)]
        self.num_prompts = len(prompts)

    def train_prompt(self, index):
        return self.items[index]

    def eval_items(self, count):
        return self.items[:count]

    def reward(self, item, completion):
        return 0.0


LONG = "1+" * 14 + "1"  # 29 tokens, and 100 more


def test_a_prompt_is_refused_by_its_line_where_it_cannot_be_encoded_or_is_too_long(encoder):
    assert len(encoder.encode(TaskItem(LONG[1:]))) == 28
    message = (
        r"the prompt of line 8 has 29 tokens: with sampling.max_tokens = 100 more it exceeds the 128 positions of "
    )
    with pytest.raises(PromptError, match=message + r"policy\.model"):
        encoder.encode(TaskItem(LONG, {"line": 8}))
    with pytest.raises(PromptError, match=r"the prompt of line 2 cannot be encoded"):
        encoder.encode(TaskItem("half an emoji \ud83d", {"line": 2}))
    with pytest.raises(PromptError, match=r"the prompt '1\+1\+1\+.*' has 29 tokens"):
        encoder.encode(TaskItem(LONG))


@pytest.mark.parametrize("text", ["nul \x00 1+1=", "line\u2028separator", "escape \x1b[31m red"])
def test_odd_characters_are_prompts_like_others(encoder, text):
    assert len(encoder.encode(TaskItem(text))) > 0


def test_held_out_prompts_are_distinct_and_fit(encoder):
    items = Prompts("1+1=", " 1+1= ", LONG, "2+2=", "\ud83d", "1+1=\n").eval_items(9)
    asked = held_out(items, encoder)
    assert [item.prompt for item in asked.items] == ["1+1=", "2+2="]
    assert [ids.tolist() for ids in asked.token_ids] == [
        encoder.tokenizer.encode_prompt(text).tolist() for text in ("1+1=", "2+2=")
    ]
    assert [reason.split(" of ")[1].split()[:3] for reason in asked.left_out] == [
        ["line", "2", "is"],
        ["line", "3", "has"],
        ["line", "5", "cannot"],
        ["line", "6", "is"],
    ]
    assert all(ids.dtype == np.uint32 for ids in asked.token_ids)


def test_an_evaluation_without_any_prompt_is_refused(encoder):
    with pytest.raises(ConfigError, match=r"no held-out prompt can be used; the prompt of line 1 has 29 tokens"):
        held_out(Prompts(LONG).eval_items(1), encoder)
    with pytest.raises(ConfigError, match="no prompt is held out"):
        held_out([], encoder)


def test_training_prompts_are_surveyed_and_one_that_fits_is_enough(encoder):
    survey = survey_prompts(Prompts(LONG, "1+1=", "\ud83d"), encoder)
    assert survey.num_prompts == 3
    assert [reason.split(" of ")[1].split()[:3] for reason in survey.unusable] == [
        ["line", "1", "has"],
        ["line", "3", "cannot"],
    ]
    with pytest.raises(ConfigError, match=r"no training prompt can be used: the prompt of line 1 has 29 tokens"):
        survey_prompts(Prompts(LONG, LONG), encoder)
