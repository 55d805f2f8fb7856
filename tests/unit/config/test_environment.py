import json
from pathlib import Path

import pytest

from jackpot.config import InvalidJobError, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError


def test_what_a_launcher_sets_is_what_a_service_reads(tmp_path: Path) -> None:
    environment = ServiceEnvironment(
        run_dir=tmp_path,
        job_id="job-1",
        instance="evaluator",
        redis_url="unix://:secret@/tmp/v.sock",
        listen="unix:/tmp/r.sock",
        role="policy",
        rollout_addresses=("unix:/tmp/a.sock", "10.0.0.1:50051"),
        evaluator_address="unix:/tmp/e.sock",
        tls_dir="/etc/jackpot/tls",
        tls_peer_name="jackpot-worker",
        health_listen="0.0.0.0:50052",
        metrics_address="127.0.0.1:9100",
        threads=2,
    )
    variables = environment.to_env()
    assert all(name.startswith("JACKPOT_") for name in variables)
    assert variables["JACKPOT_ROLLOUT_ADDRESSES"] == "unix:/tmp/a.sock,10.0.0.1:50051"
    assert ServiceEnvironment.from_env(variables) == environment


def test_defaults_survive_the_round_trip_and_foreign_variables_are_ignored() -> None:
    environment = ServiceEnvironment(run_dir=Path("/run"), job_id="job")
    # Kubernetes adds JACKPOT_PORT and the like to pods beside a Service called jackpot.
    foreign = {"JACKPOT_PORT": "tcp://10.0.0.1:80", "PATH": "/bin"}
    assert ServiceEnvironment.from_env(environment.to_env() | foreign) == environment
    assert environment.rollout_addresses == ()


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACKPOT_RUN_DIR", "/run/j")
    monkeypatch.setenv("JACKPOT_JOB_ID", "j")
    assert ServiceEnvironment.from_env().run_dir == Path("/run/j")


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("JACKPOT_JOB_ID", "No Id", "= 'No Id': string should match pattern"),
        ("JACKPOT_ROLE", "critic", "= 'critic': input should be 'policy' or 'actor'"),
        ("JACKPOT_THREADS", "many", "= 'many': input should be a valid integer"),
    ],
)
def test_a_malformed_variable_is_named(variable: str, text: str, problem: str) -> None:
    variables = {"JACKPOT_RUN_DIR": "/run", "JACKPOT_JOB_ID": "job", variable: text}
    with pytest.raises(ConfigError) as caught:
        ServiceEnvironment.from_env(variables)
    assert str(caught.value).startswith(f"{variable} {problem}")
    assert str(caught.value).endswith("The launcher sets it; start services with `jackpot run`.")


def test_a_missing_variable_is_named_without_telling_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        ServiceEnvironment.from_env({"JACKPOT_RUN_DIR": "/run", "JACKPOT_REDIS_URL": "redis://:secret@h:1"})
    assert str(caught.value).startswith("JACKPOT_JOB_ID = None: is not set.")
    assert "secret" not in str(caught.value)


def test_the_job_is_read_from_the_run_directory(tmp_path: Path) -> None:
    job = parse_job({"policy": {"model": "/m"}, "actor": "policy", "task": {"name": "complement"}})
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert ServiceEnvironment(run_dir=tmp_path, job_id="job").load_job() == job


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "job.json cannot be read"), ("{", "job.json cannot be read"), ("[]", "job.json does not hold a job")],
)
def test_a_run_directory_without_a_job_is_a_configuration_error(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "job.json").write_text(text)
    with pytest.raises(ConfigError, match=f"JACKPOT_RUN_DIR = '{tmp_path}': {problem}"):
        ServiceEnvironment(run_dir=tmp_path, job_id="job").load_job()


def test_a_job_that_cannot_work_is_explained(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"policy": {"model": "/m"}, "actor": "policy"}))
    with pytest.raises(InvalidJobError, match="task = None: is required"):
        ServiceEnvironment(run_dir=tmp_path, job_id="job").load_job()
