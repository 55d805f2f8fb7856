import io
import logging
import re
from collections.abc import Iterator

import pytest

from jackpot.telemetry.logs import LineFormatter, redact_url, setup_logging

LOG = logging.getLogger("jackpot.test")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root, jackpot = logging.getLogger(), logging.getLogger("jackpot")
    before = (root.handlers[:], root.level, jackpot.level)
    stream = io.StringIO()
    setup_logging("rollout", "0", stream=stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    jackpot.setLevel(before[2])


def test_a_line_has_time_level_source_message_and_pairs(lines: io.StringIO) -> None:
    LOG.info("weights loaded", extra={"version": 3, "seconds": 0.25, "path": "a b"})
    pattern = (
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO rollout/0 jackpot\.test "
        r"weights loaded version=3 seconds=0\.25 path='a b'\n"
    )
    assert re.fullmatch(pattern, lines.getvalue())


def test_a_record_is_one_line_and_its_traceback_follows(lines: io.StringIO) -> None:
    LOG.info("first\nsecond")
    assert lines.getvalue().endswith("first\\nsecond\n")
    try:
        raise ValueError("no")
    except ValueError:
        LOG.exception("failed")
    assert lines.getvalue().endswith("ValueError: no\n")
    assert "failed\nTraceback" in lines.getvalue()


def test_other_packages_are_heard_from_warnings_on(lines: io.StringIO) -> None:
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("trouble")
    LOG.debug("detail")
    assert [line.split(" ", 4)[4] for line in lines.getvalue().splitlines()] == ["trouble"]


def test_passwords_never_reach_the_log(lines: io.StringIO) -> None:
    LOG.info("bus at %s", "redis://jackpot:s3cret@10.0.0.1:6379/0", extra={"url": "unix://:s3cret@/run/v.sock"})
    try:
        raise ValueError("unix:///run/v.sock?db=0&password=s3cret")
    except ValueError:
        LOG.exception("failed")
    assert "s3cret" not in lines.getvalue()
    assert "redis://jackpot:***@10.0.0.1:6379/0" in lines.getvalue()


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("redis://:pw@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:p@w:x@host", "rediss://user:***@host"),
        ("unix://user:pw@/run/valkey.sock", "unix://user:***@/run/valkey.sock"),
        ("unix:///run/v.sock?password=pw&db=1", "unix:///run/v.sock?password=***&db=1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user@host:6379", "redis://user@host:6379"),
        ("redis://a:6379,redis://u:pw@b:6379", "redis://a:6379,redis://u:***@b:6379"),
    ],
)
def test_redaction_hides_the_password_alone(url: str, redacted: str) -> None:
    assert redact_url(url) == redacted


def test_the_formatter_works_on_its_own() -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "hi %s", "args": ("there",), "created": 0})
    assert LineFormatter("p/1").format(record).startswith("1970-01-01T00:00:00.")
    assert LineFormatter("p/1").format(record).endswith("Z INFO p/1 x hi there")
