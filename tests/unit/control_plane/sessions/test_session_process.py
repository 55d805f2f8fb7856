"""The lock that tells whether a session lives, and what it says about itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jackpot.control_plane.sessions.session_process import Session, SessionStatus
from jackpot.errors import JackpotError


def wait_for_end(session: Session) -> None:
    deadline = time.monotonic() + 60
    while session.alive():
        assert time.monotonic() < deadline, "the session does not end"
        time.sleep(0.02)


def test_a_session_without_a_job_fails_with_its_reason_and_lets_go_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    session = Session.start(tmp_path, 1, {})
    again = Session(tmp_path, 1)  # as a control plane sees it that was started since
    assert session.alive() and again.alive()
    with pytest.raises(JackpotError, match="still runs"):
        Session.start(tmp_path, 2, {})
    wait_for_end(session)
    assert not again.alive()
    status = again.status
    assert status is not None and (status.phase, status.state) == ("finished", "failed")
    assert status.error is not None and "run directory" in status.error
    assert SessionStatus.read(tmp_path, 2) is None  # what another session wrote says nothing


def test_a_session_that_is_asked_to_stop_ends(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    session = Session.start(tmp_path, 1, {})
    Session(tmp_path, 2).ask_to_stop(0.0)  # nothing is known of session 2: nobody is hit
    assert session.alive()
    session.ask_to_stop(5.0)
    wait_for_end(session)
    session.ask_to_stop(0.0)


def test_a_run_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JackpotError, match="gone"):
        Session(tmp_path / "nothing", 1).alive()
