"""Finds the answer in a solution or a completion, and compares texts. Pure functions, standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Full-width letters, digits and punctuation have a constant offset from their ASCII twins; the rest is listed.
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
NEIGHBOURING_BOXES = 12  # characters between two boxes that together state one answer: "}$ and $"


def tagged_answer(completion: str, tag: str) -> str | None:
    """The text inside the last ``<tag>…</tag>`` of a completion, stripped; None if there is none."""
    answers = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", completion, flags=re.DOTALL)
    return answers[-1].strip() if answers else None


def final_answer(solution: str) -> str:
    """The final answer of a written solution: after ``####`` (GSM8K), or in its last ``\\boxed{…}`` (MATH).

    In any other case the whole text is the answer.
    """
    before, mark, after = solution.rpartition("####")
    return after.strip() if mark else (boxed_answer(before or solution) or solution).strip()


def plain_punctuation(text: str) -> str:
    """The text with full-width and Chinese punctuation and digits replaced by their ASCII twins."""
    return text.translate(_ASCII_OF)


def boxed_answer(text: str) -> str | None:
    """The content of the last ``\\boxed{…}``. Boxes close to each other state one answer and are joined with commas.

    None if there is no box; empty if the last box is never closed, because its content is unknown.
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
    """The answers that a completion may state: in a box, else after ``####``, else after "answer is".

    The first of these marks decides. A phrase may extend to the end of its line or of its sentence. Without any mark
    the candidates are the whole text and the text after the last "=" or "is". Punctuation as in
    :func:`plain_punctuation`.
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
    """1 if the completion equals the answer, ignoring white space around it."""
    return float(completion.strip() == final_answer(answer))
