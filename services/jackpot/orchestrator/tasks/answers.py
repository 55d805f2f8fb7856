"""Comparing a completion with the right answer. Pure functions; math-verify loads only where it is used."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping


def tagged_answer(completion: str, tag: str) -> str | None:
    """The text inside the last ``<tag>…</tag>`` of a completion, stripped; None where there is none."""
    answers = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", completion, flags=re.DOTALL)
    return answers[-1].strip() if answers else None


def final_answer(solution: str) -> str:
    """The answer at the end of a written solution in GSM8K's form (``… #### 42``); other texts are their own answer."""
    return solution.rpartition("####")[2].strip()


def exact_match(answer: str, completion: str) -> float:
    """1 if the completion is the answer, apart from white space around it."""
    return float(completion.strip() == final_answer(answer))


def math_verify(answer: str, completion: str) -> float:
    """1 if the last mathematical expression of the completion equals the answer.

    Without math-verify's own time limits: they rest on SIGALRM, which a service needs undisturbed. The caller bounds
    the time by running rewards in processes that it can end.

    Raises:
        ValueError: the answer itself holds no mathematics, so that nothing could ever match it.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time limit
    text = final_answer(answer)
    gold = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the answer {answer!r} holds no mathematical expression")
    parsed = parse(completion, parsing_timeout=None)
    return float(bool(verify(gold, parsed, timeout_seconds=None)))


REWARDS: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match, "math_verify": math_verify}
