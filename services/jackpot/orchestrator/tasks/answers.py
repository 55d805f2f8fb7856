"""Where a solution or a completion states its answer, and the comparison of texts. Pure functions, standard library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Full-width letters, digits and punctuation lie at one distance from their ASCII twins; the rest is listed.
_ASCII_OF = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    {
        "。": ".",
        "、": ",",
        "【": "[",
        "】": "]",
        "「": '"',
        "」": '"',
        "　": " ",
        "\u00a0": " ",
        "\u2009": " ",
        "−": "-",
    }
)
_ANSWER_WORD = re.compile(
    r"(?:\banswers?\b|答案)[^\n.:=是为]{0,60}?(?:\bis\b|\bare\b|[:=是为])(?:\s*(?:is|are)\b)?[\s*:]*", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.;!?](?:\s|$)|\n")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
NEIGHBOURING_BOXES = 12  # characters between two boxes that state one answer together: "}$ and $"


def tagged_answer(completion: str, tag: str) -> str | None:
    """The text inside the last ``<tag>…</tag>`` of a completion, stripped; None where there is none."""
    answers = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", completion, flags=re.DOTALL)
    return answers[-1].strip() if answers else None


def final_answer(solution: str) -> str:
    """The answer that a written solution ends with: after ``####`` (GSM8K), or in its last ``\\boxed{…}`` (MATH).

    Other texts are their own answer.
    """
    before, mark, after = solution.rpartition("####")
    return after.strip() if mark else (boxed_answer(before or solution) or solution).strip()


def plain_punctuation(text: str) -> str:
    """The text with full-width and Chinese punctuation and digits as their ASCII twins."""
    return text.translate(_ASCII_OF)


def boxed_answer(text: str) -> str | None:
    """What stands in the last ``\\boxed{…}``; boxes close to each other state one answer and are joined by commas.

    None where there is no box; empty where the last box is never closed, for nobody knows what it would have held.
    """
    boxes = list(_boxes(text))
    if not boxes:
        return None
    contents = [boxes[-1][2]]
    if not contents[0]:
        return ""
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if start - end > NEIGHBOURING_BOXES or "\n" in text[end:start]:
            break
        contents.insert(0, content)
    return ",".join(dict.fromkeys(contents))


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and innermost content of each outermost box, in order."""
    position = 0
    while match := _BOX.search(text, position):
        end = _closing_brace(text, match.end())
        content = "" if end is None else text[match.end() : end]
        position = len(text) if end is None else end + 1
        inner = list(_boxes(content))
        yield match.start(), position, inner[-1][2] if inner else content.strip()


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def stated_answers(completion: str) -> Sequence[str]:
    """What a completion may state as its answer: by a box, else after ``####``, else after "answer is".

    The first of these marks decides, and a phrase may be read to the end of its line or of its sentence. Without any
    mark these are the whole text and what follows the last "=" or "is". Punctuation as :func:`plain_punctuation` has
    it.
    """
    if (boxed := boxed_answer(completion)) is not None:
        return [boxed] if boxed else []
    if "####" in completion:
        return _readings(completion.rpartition("####")[2])
    *_, last = [None, *_ANSWER_WORD.finditer(completion)]
    if last is not None:
        return _readings(completion[last.end() :])
    text = completion.strip()
    return [*_readings(text), *_readings(re.split(r"=|\bis\b|\bare\b|是|为", text)[-1])] if text else []


def _readings(text: str) -> list[str]:
    """The first line of a text, and its first sentence."""
    line = text.strip().split("\n", 1)[0]
    texts = (line, _SENTENCE_END.split(line, maxsplit=1)[0])
    return list(dict.fromkeys(reading for text in texts if (reading := text.strip(" *\t\r.,;!:\"'"))))


def exact_match(answer: str, completion: str) -> float:
    """1 if the completion is the answer, apart from white space around it."""
    return float(completion.strip() == final_answer(answer))
