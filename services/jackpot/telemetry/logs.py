"""Logs: plain lines on stderr, one per record, secrets redacted.

A line reads ``time level process/instance logger message key=value …``; the pairs are a call's ``extra``:
``LOG.info("weights loaded", extra={"version": 3})``. A traceback follows its line.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Passwords in scheme://user:password@host and in a password=… parameter (redis-py's unix:// addresses have that).
_SECRET = re.compile(r"(\w://[^\s/@:]*:)[^\s/]*(?=@)|([?&]password=)[^\s&]*")


def redact_url(text: str) -> str:
    """The text with the passwords of all URLs in it replaced by ``***``."""
    return _SECRET.sub(r"\1\2***", text)


def setup_logging(
    process: str, instance: str, *, level: int = logging.INFO, stream: TextIO | None = None
) -> logging.Handler:
    """Send this process's records to ``stream`` (stderr): Jackpot's from ``level`` on, other packages' warnings.

    Returns:
        The handler, so that a test can remove it.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(f"{process}/{instance}"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("jackpot").setLevel(level)
    logging.captureWarnings(True)
    return handler


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO rollout/0 jackpot.rollout.servicer weights loaded version=3``."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        """One line, followed by the record's traceback if it has one."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        pairs = [f"{key}={_value(value)}" for key, value in vars(record).items() if key not in _STANDARD]
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        stamp = f"{seconds}.{int(record.msecs):03d}Z"
        line = " ".join([stamp, record.levelname, self._source, record.name, message, *pairs])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + self.formatStack(record.stack_info)
        return redact_url(line)


def _value(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text
