"""The README's REST section, followed literally: curl alone submits, follows, cancels, resumes and downloads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from patience import TEST_SECONDS
from server_world import running_server, tiny_job
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.timeout(TEST_SECONDS)

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_do_what_they_say(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## As a server") :].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "examples").mkdir()
    job = tiny_job(tmp_path, make_model, steps=60, checkpoint_every=2)
    (tmp_path / "examples" / "demo.yaml").write_text(yaml.safe_dump(job))
    with running_server(tmp_path / "data") as server:
        script = "\n".join(["set -eu", *blocks, 'echo "$ID" > id']).replace("http://127.0.0.1:8700", server.url)
        finished = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TEST_SECONDS,
            env=os.environ | {"no_proxy": "127.0.0.1"},
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr + server.log()
        job_id = (tmp_path / "id").read_text().strip()
        with server.client() as client:
            detail = client.job(job_id)
            ledger = client.ledger(job_id)
    assert detail.state == "succeeded" and detail.session == 2
    states = [step.state for step in detail.transitions]
    assert [state for state in states if state in ("cancelled", "succeeded")] == ["cancelled", "succeeded"]
    assert ledger["trained"] == 120 and ledger["open"] == 0
    assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values())
    assert json.loads((tmp_path / "job.json").read_text())["id"] == job_id
    AutoModelForCausalLM.from_pretrained(tmp_path / f"{job_id}-export-policy")
    assert AutoTokenizer.from_pretrained(tmp_path / f"{job_id}-export-policy")("7-3").input_ids
