"""Which error of many is reported."""

from jackpot.errors import ConfigError, DeadlineError
from jackpot.orchestrator.failures import first_error


def test_settings_come_first_then_our_own_errors_then_any():
    config = ConfigError("a", 1, "is wrong", "Fix it.")
    deadline = DeadlineError("b", 1.0)
    bug = KeyError("c")
    nested = ExceptionGroup("inner", [deadline, config])
    assert first_error(ExceptionGroup("outer", [bug, nested])) is config
    assert first_error(ExceptionGroup("outer", [bug, ExceptionGroup("inner", [deadline])])) is deadline
    assert first_error(ExceptionGroup("outer", [bug])) is bug
