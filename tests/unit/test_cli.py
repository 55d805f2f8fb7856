"""The command line, up to where processes would start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import jackpot

MakeModel = Callable[..., Path]


def jackpot_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from jackpot.cli import main; main()", *arguments]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(program, capture_output=True, text=True, timeout=90, cwd=cwd, env=environment)


@pytest.fixture
def job_file(tmp_path: Path, make_model: MakeModel) -> Path:
    model = str(make_model("qwen3", seed=1))
    job = {"policy": {"model": model}, "actor": {"model": model}, "task": {"name": "complement"}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "sampling": {"max_tokens": 8}}))
    return path


def test_version_and_help_come_at_once_without_heavy_imports() -> None:
    assert jackpot_command("--version").stdout == f"jackpot {jackpot.__version__}\n"
    shown = jackpot_command("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("run", "demo", "validate", "schema"))
    heavy = "{'torch', 'transformers', 'matplotlib', 'fastapi', 'vllm'}"
    modules = "jackpot.cli, jackpot.control_plane.sessions.preparation"
    program = f"import sys, {modules}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_the_schema_is_json_schema_of_the_job_file() -> None:
    schema = json.loads(jackpot_command("schema").stdout)
    assert schema["$schema"].endswith("2020-12/schema")
    assert {"policy", "actor", "task", "learner", "bus"} <= set(schema["properties"])


def test_a_job_can_be_validated_with_overrides(job_file: Path) -> None:
    good = jackpot_command("validate", str(job_file), "learner.steps=3")
    *report, last = good.stdout.splitlines()
    assert good.returncode == 0 and last == f"{job_file} is a valid job"
    assert report == [
        "training prompts         1000 of 1000 looked at, from all over the 4096, can be used",
        "held-out prompts         128 of 128 are asked",
        "the right answer         1.00 on average, 8 of 8 earn 1",
        "the right answer, boxed  1.00 on average, 8 of 8 earn 1",
        "an empty text            0.00 on average, 0 of 8 earn 1",
        "wrong texts              0.00 on average, 0 of 152 earn 1",
    ]
    bad = jackpot_command("validate", str(job_file), "sampling.max_tokens=128")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: sampling.max_tokens = 128: ") and bad.stderr.count("\n") == 1


REFUSALS = {
    "no job file": (["run"], "JOB.yaml"),
    "a job file that is not there": (["run", "nowhere.yaml"], "cannot be read"),
    "an override that is none": (["run", "job.yaml", "learner.steps"], "is not of the form key=value"),
    "resuming and starting": (["run", "job.yaml", "--resume", "."], "takes no job file"),
    "resuming what is no run": (["run", "--resume", "."], "is not a run directory"),
    "resuming a damaged run": (["run", "--resume", "damaged"], "job.json"),
    "resuming a finished run": (["run", "--resume", "finished"], "has finished already"),
    "a bus that is none": (["run", "job.yaml", "bus.url=localhost"], "bus.url"),
    "a demo with a slip": (["demo", "learner.stepz=3"], "Did you mean 'steps'?"),
    "a comparison with a slip": (["demo", "--compare", "learner.stepz=3"], "Did you mean 'steps'?"),
}


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_what_cannot_work_is_one_line_and_exit_code_2(job_file: Path, case: str) -> None:
    arguments, words = REFUSALS[case]
    for name in ("damaged", "finished"):
        (job_file.parent / name).mkdir()
        (job_file.parent / name / "run.json").write_text('{"job_id": "x-1"}')
    (job_file.parent / "finished" / "summary.json").write_text('{"state": "succeeded"}')
    finished = jackpot_command(*arguments, cwd=job_file.parent)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith("error: ") and words in finished.stderr
    assert "Traceback" not in finished.stderr and finished.stdout == ""
    assert not (job_file.parent / "runs").exists()


def test_an_unknown_option_is_a_usage_error() -> None:
    finished = jackpot_command("run", "--resumee", "x")
    assert finished.returncode == 2 and "--resumee" in finished.stderr


def test_a_missing_package_is_named_with_the_remedy(job_file: Path) -> None:
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    program = "import sys; sys.modules['tokenizers'] = None\nfrom jackpot.cli import main; main()"
    arguments = [sys.executable, "-c", program, "validate", str(job_file)]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert finished.stderr.startswith("error: tokenizers is not installed. ") and "jackpot[local]" in finished.stderr


def test_what_the_system_refuses_is_one_line(tmp_path: Path, job_file: Path) -> None:
    (tmp_path / "runs").write_text("a file where the runs would go")
    finished = jackpot_command("run", str(job_file), cwd=tmp_path)
    assert finished.returncode == 2 and "cannot be created" in finished.stderr and "Traceback" not in finished.stderr
