from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError

TLS_FILES = {"ca_certs": "ca.crt", "certfile": "tls.crt", "keyfile": "tls.key"}


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


def test_redis_over_tls_takes_the_files_of_the_tls_directory_unless_it_names_its_own(tmp_path: Path) -> None:
    def redis_url(url: str, tls_dir: str = str(tmp_path)) -> str:
        variables = {"JACKPOT_RUN_DIR": "/run", "JACKPOT_JOB_ID": "job", "JACKPOT_REDIS_URL": url}
        return ServiceEnvironment.from_env(variables | {"JACKPOT_TLS_DIR": tls_dir}).redis_url

    authority = quote(f"{tmp_path}/ca.crt", safe="")
    assert redis_url("rediss://u:p%40@h:1/0") == f"rediss://u:p%40@h:1/0?ssl_ca_certs={authority}"
    assert redis_url("rediss://h/0?ssl_ca_certs=/ca") == "rediss://h/0?ssl_ca_certs=%2Fca"
    (tmp_path / "tls.crt").touch()
    shown = parse_qs(urlsplit(redis_url("rediss://h/0")).query)
    assert shown == {f"ssl_{k}": [f"{tmp_path}/{v}"] for k, v in TLS_FILES.items()}
    for untouched in ("redis://u:p@h:1/0", "unix://:p@/tmp/s.sock", ""):
        assert redis_url(untouched) == untouched
    assert redis_url("rediss://h/0", "") == "rediss://h/0"
