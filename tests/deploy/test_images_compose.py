"""docker-compose.yml: what Compose makes of it, and its commands run without containers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
import yaml
from patience import PATIENCE_SECONDS, TEST_SECONDS
from server_world import tiny_job

from jackpot.bus.server import find_server_binary

pytestmark = pytest.mark.timeout(TEST_SECONDS)

ROOT = Path(__file__).parents[2]
PASSWORD = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
CPU_SERVICES = {"valkey", "platform", "prometheus", "grafana"}


def compose(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Compose on the file; of the environment only PATH and what is given."""
    binary = Path(sysconfig.get_path("scripts")) / "docker-compose"
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | variables
    command = [binary, "--env-file", os.devnull, "-f", ROOT / "docker-compose.yml", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environment)


def resolved(profile: str) -> dict[str, Any]:
    """The services as Compose resolves them."""
    variables = {"JACKPOT_REDIS_PASSWORD": PASSWORD, "GRAFANA_PASSWORD": "g", "COMPOSE_PROFILES": profile}
    result = compose("config", "--format", "json", **variables)
    assert result.returncode == 0, result.stderr
    project: dict[str, Any] = json.loads(result.stdout)
    return project


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = resolved("cpu")["services"]
    return found


def test_both_profiles_resolve_and_differ_in_the_platform_alone(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == CPU_SERVICES
    gpu = resolved("gpu")["services"]
    assert set(gpu) == CPU_SERVICES - {"platform"} | {"platform-gpu"}
    devices = gpu["platform-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"capabilities": ["gpu"], "driver": "nvidia", "count": -1}]
    assert services["platform"]["build"]["args"]["ACCELERATOR"] == "cpu"
    assert gpu["platform-gpu"]["build"]["args"]["ACCELERATOR"] == "cuda"
    for same in ("command", "environment", "volumes", "networks", "ports"):
        assert services["platform"][same] == gpu["platform-gpu"][same]


@pytest.mark.parametrize("missing", ["JACKPOT_REDIS_PASSWORD", "GRAFANA_PASSWORD"])
def test_without_a_password_nothing_starts_and_the_remedy_is_named(missing: str) -> None:
    given = {"JACKPOT_REDIS_PASSWORD": "x", "GRAFANA_PASSWORD": "y", "COMPOSE_PROFILES": "cpu"}
    result = compose("config", "-q", **{name: value for name, value in given.items() if name != missing})
    assert result.returncode != 0
    assert missing in result.stderr and "set it in .env, see .env.example" in result.stderr


def test_the_example_settings_hold_every_variable_and_no_password() -> None:
    text = (ROOT / ".env.example").read_text("utf-8")
    used = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text("utf-8")))
    shown = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", text, re.M))
    assert used - {"JACKPOT_IMAGE", "JACKPOT_GPU_IMAGE"} == set(shown) - {"COMPOSE_PROFILES"}
    assert shown["JACKPOT_REDIS_PASSWORD"] == shown["GRAFANA_PASSWORD"] == ""
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]+)\}", (ROOT / "docker-compose.yml").read_text("utf-8")))
    for name, value in shown.items():
        if value and name != "COMPOSE_PROFILES":
            assert defaults[name] == value, name
    assert ".env" in (ROOT / ".gitignore").read_text("utf-8").split()


def test_containers_are_unprivileged_and_ports_stay_on_this_machine(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service and service.get("network_mode") is None, name
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name
        if name != "grafana":  # it writes beside its data
            assert service["read_only"] is True, name
        image = service["image"]
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image), image
    assert not services["valkey"].get("ports")


def test_every_mounted_file_is_there_and_read_only(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                source = Path(volume["source"])
                assert volume["read_only"] is True and source.is_relative_to(ROOT)
                if not source.is_relative_to(ROOT / "helm"):
                    assert source.exists(), source


def test_prometheus_and_grafana_find_each_other_and_the_platform(services: dict[str, dict[str, Any]]) -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert services["platform"]["networks"]["default"]["aliases"] == ["platform"]
    assert scraped[0]["static_configs"][0]["targets"] == ["platform:8700"]
    assert scraped[1]["http_sd_configs"][0]["url"] == "http://platform:8700/v1/metrics-targets"
    directory = Path(scraped[0]["authorization"]["credentials_file"]).parent
    for name in ("platform", "prometheus"):
        assert any(volume["target"] == str(directory) for volume in services[name]["volumes"])
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text("utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/jackpot.yaml").read_text("utf-8"))
    path = provider["providers"][0]["options"]["path"]
    assert path in [volume["target"] for volume in services["grafana"]["volumes"]]


# ---- The same commands without containers ------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process group; ended in the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def no_session_left(data: Path) -> Iterator[None]:
    """Jobs outlive their server: end those that a failed test leaves."""
    try:
        yield
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(part.startswith(str(data / "runs")) for part in process.cmdline()):
                    process.kill()


def until(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def test_its_commands_bring_up_a_platform_that_trains_a_job(
    services: dict[str, dict[str, Any]], tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Valkey with its users, the platform with its token for Prometheus, a job over REST; only paths, ports and host
    names are this machine's."""
    data, run, valkey_port, api_port = tmp_path / "data", tmp_path / "run", free_port(), free_port()
    for directory in (data, run, tmp_path / "valkey", tmp_path / "bin", data / "models"):
        directory.mkdir()
    jackpot = tmp_path / "bin" / "jackpot"
    jackpot.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from jackpot.cli import main; main()" "$@"\n')
    jackpot.chmod(0o755)

    def here(text: str) -> str:
        moved = {
            "/etc/jackpot/start.sh": "deploy/redis/start.sh",
            "/etc/jackpot/platform.sh": "deploy/compose/platform.sh",
        }
        for inside, outside in moved.items():
            text = text.replace(inside, str(ROOT / outside))
        text = text.replace("/var/lib/jackpot", str(data)).replace("@valkey:6379", f"@127.0.0.1:{valkey_port}")
        return "localhost" if text == "platform" else text

    def command_of(name: str) -> list[str]:
        service = services[name]
        return [here(part) for part in (*service["entrypoint"], *(service.get("command") or ()))]

    def environment_of(name: str, **more: str) -> dict[str, str]:
        inherited = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return inherited | {key: here(value) for key, value in services[name]["environment"].items()} | more

    paths = {
        "REDIS_SERVER": str(find_server_binary()),
        "REDIS_DATA_DIR": str(tmp_path / "valkey"),
        "REDIS_RUN_DIR": str(run),
        "REDIS_USERS": str(ROOT / "deploy/redis/users.acl"),
    }
    users = {"SCRAPE_TOKEN_FILE": str(run / "token"), "JACKPOT_DATA_DIR": str(data)}
    valkey_log, log = tmp_path / "valkey.log", tmp_path / "platform.log"
    valkey = started([*command_of("valkey"), "--port", str(valkey_port)], environment_of("valkey", **paths), valkey_log)
    serve = [*command_of("platform"), "--port", str(api_port)]
    with valkey, started(serve, environment_of("platform", **users), log), no_session_left(data):
        url = f"http://127.0.0.1:{api_port}"

        def ready() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{url}/readyz", timeout=PATIENCE_SECONDS).status_code == 200
            return False

        until(ready, "the platform", log)
        assert httpx.get(f"{url}/v1/jobs").status_code == 401
        created = subprocess.run(
            [jackpot, "token", "create", "--scope", "write"],
            env=environment_of("platform", **users),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {created.stdout.strip()}"}, timeout=PATIENCE_SECONDS
        )
        prometheus = {"Authorization": f"Bearer {(run / 'token').read_text().strip()}"}
        with client:
            job = tiny_job(
                tmp_path, lambda *a, **k: shutil.copytree(make_model(*a, **k), data / "models" / f"{k}"), scorer=True
            )
            answer = client.post("/v1/jobs", json=job)
            assert answer.status_code == 201, answer.text
            job_id = answer.json()["id"]
            assert httpx.post(f"{url}/v1/jobs", json=job, headers=prometheus).status_code == 403  # it may read alone
            targets: dict[str, str] = {}

            def found() -> bool:
                groups = httpx.get(f"{url}/v1/metrics-targets", headers=prometheus).json()
                targets.update({group["labels"]["service"]: group["targets"][0] for group in groups})
                return {"learner", "rollout", "scorer", "orchestrator"} <= set(targets)

            until(found, "processes to scrape", log)
            assert all(address.startswith("localhost:") for address in targets.values())
            until(
                lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] not in ("queued", "starting"), "a start", log
            )
            until(lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] != "running", "the end", log)
            final = client.get(f"/v1/jobs/{job_id}").json()
            assert final["state"] == "succeeded", final
            assert 'jackpot_jobs{state="succeeded"} 1.0' in httpx.get(f"{url}/metrics", headers=prometheus).text
        _check_users(valkey_port, job_id)
        _check_secrets(data / "runs" / job_id)


def _check_users(port: int, job_id: str) -> None:
    """The job's bus is on this server, and nobody gets in without a name or beyond its role."""
    with redis.Redis(port=port, username="scorer", password=PASSWORD) as scorer:
        assert int(scorer.hget(f"jackpot:{{{job_id}}}:counters", "trained") or 0) > 0
        for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("GET", "jackpot:{control}:sequence")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                scorer.execute_command(*command)
    with redis.Redis(port=port) as nobody, pytest.raises(redis.exceptions.AuthenticationError):
        nobody.ping()


def _check_secrets(run_dir: Path) -> None:
    for path in run_dir.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".log"):
            assert PASSWORD.encode() not in path.read_bytes(), path
