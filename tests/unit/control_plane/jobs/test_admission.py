"""How much one job may ask a server for."""

from __future__ import annotations

from pathlib import Path

import pytest

from jackpot.config import parse_job
from jackpot.control_plane.jobs.admission import Admission
from jackpot.errors import JackpotError


def test_scorers_that_do_not_run_are_not_counted(tmp_path: Path) -> None:
    content = {"policy": {"model": str(tmp_path)}, "actor": "policy", "task": {"name": "complement"}}
    admission = Admission(max_processes=2)
    with pytest.raises(JackpotError, match="makes 3 replicas, too many for one job"):
        admission.check(parse_job(content, ["rollout.replicas=2"]))
    admission.check(parse_job(content, ["rollout.replicas=2", "scorer.reuse_reference=true"]))
