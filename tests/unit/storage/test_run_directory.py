"""Run directories: made once, held by one, read while they grow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jackpot.config import InvalidJobError, JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError, JackpotError
from jackpot.storage.run_directory import (
    MAX_JOB_ID_LENGTH,
    RunDirectory,
    RunFiles,
    last_lines,
    load_service_job,
    new_job_id,
    scratch_directory,
)


@pytest.fixture
def job() -> JobSpec:
    return parse_job(
        {"name": "tiny", "policy": {"model": "/m/p"}, "actor": {"model": "/m/a"}, "task": {"name": "complement"}}
    )


def test_a_job_id_says_what_and_when_and_never_comes_twice() -> None:
    ids = {new_job_id("demo") for _ in range(50)}
    assert len(ids) > 45  # four random digits: a repetition is a start in the same second with bad luck
    assert all(re.fullmatch(r"demo-\d{4}-\d{6}-[0-9a-f]{4}", one) for one in ids)


@pytest.mark.parametrize("name", ["x", "a" * 40, "b" * 40 + "-on-policy", "c" * 45 + "-" + "d" * 20])
def test_a_job_id_can_be_a_label_however_long_the_name(name: str) -> None:
    job_id = new_job_id(name)
    assert len(job_id) <= MAX_JOB_ID_LENGTH
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job_id)
    assert "--" not in job_id


def test_what_was_created_can_be_opened_again(tmp_path: Path, job: JobSpec) -> None:
    created = RunDirectory.create(tmp_path / "deep" / "run", "tiny-1", job)
    opened = RunDirectory.open(tmp_path / "deep" / "run")
    assert opened == created and opened.job_id == "tiny-1"
    assert opened.load_job() == job
    environment = ServiceEnvironment(run_dir=opened.path, job_id="tiny-1")
    assert load_service_job(environment) == job
    assert scratch_directory(environment) == opened.path / "scratch"
    elsewhere = environment.model_copy(update={"scratch_dir": "/fast"})
    assert scratch_directory(elsewhere) == Path("/fast/tiny-1")


def test_a_directory_that_holds_something_is_not_taken(tmp_path: Path, job: JobSpec) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"is not empty\. Name another, or continue it with --resume"):
        RunDirectory.create(tmp_path, "tiny-1", job)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be created"):
        RunDirectory.create(tmp_path / "file" / "run", "tiny-1", job)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_only_run_directories_can_be_opened(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a run directory"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "has no job.json"),
        ("{", "job.json cannot be read (Expecting"),
        ("[]", "job.json cannot be read (it is not a JSON object)"),
    ],
)
def test_a_damaged_job_is_named(tmp_path: Path, job: JobSpec, content: str | None, problem: str) -> None:
    run = RunDirectory.create(tmp_path / "run", "tiny-1", job)
    run.files.job.unlink()
    if content is not None:
        run.files.job.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"run directory = '{run.path}': {problem}")):
        run.load_job()
    with pytest.raises(ConfigError, match=re.escape(f"JACKPOT_RUN_DIR = '{run.path}': {problem}")):
        load_service_job(ServiceEnvironment(run_dir=run.path, job_id="tiny-1"))


def test_a_job_that_cannot_work_is_explained(tmp_path: Path) -> None:
    RunFiles(tmp_path).job.write_text(json.dumps({"policy": {"model": "/m"}, "actor": "policy"}))
    with pytest.raises(InvalidJobError, match="task = None: is required"):
        RunFiles(tmp_path).load_job("RUN_DIR")


def test_one_launcher_at_a_time_holds_a_run(tmp_path: Path, job: JobSpec) -> None:
    run = RunDirectory.create(tmp_path / "run", "tiny-1", job)
    again = RunDirectory.open(run.path)
    with run.locked(), pytest.raises(JackpotError, match="is running already"), again.locked():
        pass
    with again.locked():
        pass


def test_the_end_of_a_log_is_its_last_error_or_else_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "learner.log"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(20)))
    assert last_lines(log, count=2) == "line 18\nline 19"
    with log.open("a") as file:
        file.write("error: the first\nsomething else\nerror: the last\nfinished\n")
    assert last_lines(log) == "error: the last"
