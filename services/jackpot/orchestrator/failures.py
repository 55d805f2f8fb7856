"""Out of the exception groups that concurrent tasks raise, the one error that says what went wrong."""

from __future__ import annotations

from typing import Any

from jackpot.errors import ConfigError, JackpotError


def first_error(errors: BaseExceptionGroup[Any]) -> BaseException:
    """The error to report: settings that cannot work first, then Jackpot's own errors, then any."""
    leaves = _leaves(errors)
    for kind in (ConfigError, JackpotError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _leaves(errors: BaseExceptionGroup[Any]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in errors.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
