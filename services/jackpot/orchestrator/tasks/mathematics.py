"""Decides whether a completion's answer is mathematically equal to the right one. math-verify loads on first use."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jackpot.orchestrator.tasks.answers import final_answer, plain_punctuation, stated_answers

GREATEST_EXPONENT = 20_000  # of a number; sympy expands its powers
GREATEST_DEGREE = 60  # of an expression with symbols; sympy expands it
GREATEST_FACTORIAL = 2_000
SIGNIFICANT_DIGITS = 6  # that decimals must share

_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[.:)](?:\s.*)?|\s*)", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*")  # "odd", "Mary Ann", "not enough"
_CJK = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)"
_FRACTION = r"\\frac\s*\{[^{}]+\}\s*\{[^{}]+\}"
_QUANTITY = rf"-?(?:(?:{_NUMBER}|{_FRACTION}|\\sqrt\s*\{{[^{{}}]+\}}|\\pi|/)\s*)+"
_SUPERSCRIPT = r"(?:\^\{?-?\d\}?|[²³])?"
_UNIT_WORDS = re.compile(
    rf"(?P<quantity>{_QUANTITY})(?:(?<=\s)|(?<=\d)(?=[a-z]{{2}}))(?!(?:and|or|x|pi)\b)"
    rf"(?:[A-Za-z]{{2,}}|[mgshLlJNKWCF](?![A-Za-z])){_SUPERSCRIPT}(?:[ /]+(?:per )?[A-Za-z]+{_SUPERSCRIPT})*\.?"
)
_UNIT_TEXT = re.compile(
    r"(?P<quantity>.*[\d)}\]])\s*(?:\\[ ,;])*\\(?:text|mathrm|mbox|textrm|textbf|rm)\s*\{[^{}]*\}" + _SUPERSCRIPT
)
_UNIT_CJK = re.compile(rf"(?P<quantity>.*[\d)}}\]])\s*{_CJK.pattern}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|textrm|mbox|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|\bdegrees?\b)\s*[CF]?\s*$")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_MIXED = re.compile(r"(-?)(\d+)\s+(\d+)/(\d+)")
_MEMBERSHIP = re.compile(r"^[A-Za-z]\s*\\in\s*")
_NUMERAL_IN_BASE = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!; ]|,\\!|\{,\}|~|\s(?=\d{3}(?:\D|$)))+(?=\d{3}(?!\d))")
# The order matters: each works on the result of the previous ones.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:quad|qquad)(?![A-Za-z])|\\[;:]", " "),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\(?:le|leqslant)(?![A-Za-z])", r"\\leq"),
    (r"\\(?:ge|geqslant)(?![A-Za-z])", r"\\geq"),
    (r"[×]", r"\\times "),
    (r"√\s*(\d+)", r"\\sqrt{\1}"),
    (r"π", r"\\pi "),
    (r"∞", r"\\infty "),
    (r"∪", r"\\cup "),
    (r"[€£¥₹]|\\[€£¥]|\\\$|\$", ""),
    (r"(?<=\d)\s*(?:percent|per cent)\b", r"\\%"),
    (r"(?<![\\])%", r"\\%"),
    (r"(?<=\d)[eE]([-+]?\d+)$", r"\\times 10^{\1}"),
    (r"\s*\b(?:and|or)\b\s*|\s*[和或与]\s*", ","),
)


def math_verify(answer: str, completion: str) -> float:
    """1 if the completion's answer equals ``answer``: as mathematics, as a choice or as words.

    math-verify's time limits are off: they use SIGALRM, which must not disturb a service. Numbers too large to expand
    are refused. Otherwise the caller bounds the time by running rewards in processes that it can end.

    Raises:
        ValueError: the answer is blank, so nothing could ever match it.
    """
    gold = _tidy(plain_punctuation(final_answer(answer)))
    if not gold:
        raise ValueError("the answer is blank")
    text = plain_punctuation(completion)
    candidates = stated_answers(text)
    if any(_equal(gold, candidate) for candidate in candidates):
        return 1.0
    if "\\boxed" in text or "\\fbox" in text:  # only the box counts
        return 0.0
    return float(any(_equal(gold, expression) for expression in _expressions(text)))


def _equal(gold: str, candidate: str) -> bool:
    tidied = _tidy(candidate)
    if _canonical(tidied) == _canonical(gold):
        return True
    if choice := _CHOICE.fullmatch(_without_text(gold)):
        chosen = _CHOICE.fullmatch(_without_text(tidied))
        return chosen is not None and chosen[1].upper() == choice[1].upper()
    if _WORDS.fullmatch(words := _without_text(gold)):
        return _without_text(tidied).casefold().strip(".") == words.casefold()
    if _NUMERAL_IN_BASE.fullmatch(gold):  # the library would drop the base
        return False
    right, read = _expression(gold), _expression(tidied)
    if right is None or read is None or not (_is_small(right) and _is_small(read)):
        return False
    from math_verify import verify

    return bool(
        verify(
            right,
            read,
            float_rounding=SIGNIFICANT_DIGITS + _leading_zeros(right),
            allow_set_relation_comp=True,
            timeout_seconds=None,
        )
    )


def _tidy(text: str) -> str:
    """A normal form of the several ways in which LaTeX writes an expression, without units around a quantity."""
    text = text.strip().strip("`").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening) : -len(closing)].strip()
    text = _THOUSANDS.sub("", text)
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    text = _MEMBERSHIP.sub("", _DEGREES.sub("", text.strip().rstrip(".")))
    for units in (_UNIT_TEXT, _UNIT_WORDS, _UNIT_CJK):
        if (match := units.fullmatch(text)) and match["quantity"].strip():
            text = match["quantity"].strip()
    text = _MIXED.sub(r"\1\2\\frac{\3}{\4}", text) if _MIXED.fullmatch(text) else text
    return _REPEATING.sub(_as_fraction, text).strip()


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3]
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _canonical(text: str) -> str:
    numeral = _NUMERAL_IN_BASE.fullmatch(text)
    return f"{numeral[1]}_{numeral[2]}" if numeral else re.sub(r"\\[,! ]|\s", "", text)


def _without_text(text: str) -> str:
    """The words of ``\\text{…}`` and of bold type."""
    return _TEXT_COMMAND.sub(r"\1", text).strip(" *")


def _expression(text: str) -> Any:
    """A LaTeX text as a sympy object; None if the whole text is not an expression."""
    return next((parsed for parsed in _parsed(f"${text}$", "latex") if not isinstance(parsed, str)), None)


def _expressions(text: str) -> Sequence[str]:
    """The last mathematical expression in running text, as math-verify finds it; Chinese text counts as spaces."""
    return [parsed for parsed in _parsed(_CJK.sub(" ", text), "text") if isinstance(parsed, str)]


def _parsed(text: str, kind: str) -> list[Any]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # math-verify warns about the missing time limit
    parsed: list[Any] = parse(text, _extraction(kind), parsing_timeout=None)
    return parsed


@functools.cache
def _extraction(kind: str) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    # math-verify's units include single letters, which turn 3t into 3; boxes have been found already.
    normalization = replace(LatexExtractionConfig().normalization_config, units=False, boxed="none")
    latex = LatexExtractionConfig(normalization_config=normalization)
    return (latex,) if kind == "latex" else (latex, ExprExtractionConfig())


def _leading_zeros(expression: Any) -> int:
    """Zeros after the decimal point of a small number, which are not significant digits."""
    if not getattr(expression, "is_number", False):
        return 0
    size = abs(_size(expression))
    return max(0, math.ceil(-math.log10(size))) if 0 < size < 1 else 0


def _is_small(expression: Any) -> bool:
    """Whether sympy can compare the expression quickly, judging by its powers, factorials and binomials.

    An unevaluated integral, sum, product or limit is a task, not an answer, and may take sympy forever.
    """
    from sympy import Integral, Limit, Pow, Product, Sum
    from sympy.functions.combinatorial.factorials import CombinatorialFunction

    if expression.has(Integral, Limit, Product, Sum):
        return False
    for part in expression.atoms(Pow, CombinatorialFunction):
        if isinstance(part, Pow):
            greatest = GREATEST_DEGREE if part.base.free_symbols else GREATEST_EXPONENT
            fits = abs(_size(part.exp)) <= greatest
        else:
            fits = all(abs(_size(argument)) <= GREATEST_FACTORIAL for argument in part.args)
        if not fits:
            return False
    return True


def _size(expression: Any) -> float:
    """The approximate value of a number, in cheap floats; infinite if they overflow, 0 for symbols."""
    from sympy import Add, Mul, Pow, factorial

    try:
        if isinstance(expression, Add):
            return math.fsum(_size(part) for part in expression.args)
        if isinstance(expression, Mul):
            return math.prod(_size(part) for part in expression.args)
        if isinstance(expression, factorial):
            argument = _size(expression.args[0])
            return math.gamma(argument + 1) if 0 <= argument <= 170 else math.inf
        if isinstance(expression, Pow):
            return float(abs(_size(expression.base)) ** _size(expression.exp))
        return 0.0 if expression.free_symbols else float(expression)
    except (ArithmeticError, TypeError, ValueError):
        return math.inf
