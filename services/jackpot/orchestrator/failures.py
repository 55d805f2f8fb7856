"""Picks the one error that explains the failure from the exception groups that concurrent tasks raise."""

from __future__ import annotations

from typing import Any

from jackpot.errors import ConfigError, JackpotError


def first_error(errors: BaseExceptionGroup[Any]) -> BaseException:
    """The error to report: preferably one about settings, then one of Jackpot's errors, then any other."""
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
