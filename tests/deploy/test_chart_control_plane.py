"""The control plane runs with the arguments, files and variables of its pod, and the chart's own test passes on it."""

from __future__ import annotations

import base64
import os
import select
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from certificates import Authority
from chart_world import Object, named, pods, render, start_bus
from job_world import JACKPOT
from patience import PATIENCE_SECONDS, TEST_SECONDS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

# Everything else is as in the pod. A cluster is looked for only when a job starts.
LEFT_OUT = ("--port=",)


class Pod:
    """`jackpot serve` as the Deployment starts it, with the pod's directories under one of ours."""

    def __init__(self, objects: tuple[Object, ...], directory: Path) -> None:
        self.objects = objects
        self.directory = directory
        ((_, _, spec),) = [each for each in pods(objects) if each[0] == "Deployment/jp-jackpot-control-plane"]
        (self.container,) = spec["containers"]
        secret = named(objects, "Secret", "jp-jackpot-control-plane-tokens")["data"]
        self.secret = {key: base64.b64decode(value).decode() for key, value in secret.items()}
        mounts = {each["mountPath"] for each in self.container["volumeMounts"]}
        assert {"/etc/jackpot/tls", "/etc/jackpot/tokens", "/var/lib/jackpot"} <= mounts
        (directory / "etc/jackpot/tokens").mkdir(parents=True)
        (directory / "etc/jackpot/tokens/tokens.json").write_text(self.secret["tokens.json"])
        names = named(objects, "Certificate", "jp-jackpot-control-plane-tls")["spec"]["dnsNames"]
        Authority().issue(directory / "etc/jackpot/tls", *names)
        cluster = named(objects, "ConfigMap", "jp-jackpot-cluster")["data"]["cluster.yaml"]
        (directory / "etc/jackpot/cluster.yaml").write_text(cluster)
        self.process = self._start()
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 60)[0]:
            raise AssertionError("the server does not say where it listens")
        line = self.process.stdout.readline()
        assert line.startswith("jackpot serves at https://0.0.0.0:"), line
        self.url = "https://localhost:" + line.split()[3].rpartition(":")[2]
        self.ca = str(directory / "etc/jackpot/tls/ca.crt")

    def inside(self, text: str) -> str:
        """A text of the pod with its paths where they are here."""
        return text.replace("/etc/jackpot", f"{self.directory}/etc/jackpot").replace(
            "/var/lib/jackpot", f"{self.directory}/data"
        )

    def _start(self) -> subprocess.Popen[str]:
        arguments = [self.inside(each) for each in self.container["args"] if not each.startswith(LEFT_OUT)]
        (self.directory / "bus").mkdir()
        self.bus, socket = start_bus(self.objects, self.directory / "bus")
        password = base64.b64decode(
            named(self.objects, "Secret", "jp-jackpot-redis")["data"]["control-plane-password"]
        ).decode()
        variables = {"JACKPOT_STORE_URL": f"unix://control-plane:{password}@{socket}"} | {
            each["name"]: self.inside(each["value"]) for each in self.container["env"] if each.get("value") is not None
        }
        return subprocess.Popen(
            [*JACKPOT, *arguments, "--port=0"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        )

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate(timeout=PATIENCE_SECONDS)
        self.bus.terminate()
        self.bus.communicate(timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """One for all tests of this file."""
    running = Pod(tuple(render(None, "redis.tls.enabled=false")), tmp_path_factory.mktemp("pod"))
    try:
        yield running
    finally:
        running.stop()


def test_the_charts_own_test_passes(pod: Pod) -> None:
    ((_, _, spec),) = [each for each in pods(pod.objects) if each[0].startswith("Pod/")]
    (container,) = spec["containers"]
    python, option, script = container["command"]
    assert (python, option) == ("python", "-c")
    done = subprocess.run(
        [sys.executable, "-c", pod.inside(script)],
        env={"URL": pod.url, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/v1/jobs without a token 401" in done.stdout


def test_probes_come_by_address_and_prometheus_with_its_token(pod: Pod) -> None:
    port = pod.url.rpartition(":")[2]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = pod.container[probe]["httpGet"]
        assert request["scheme"] == "HTTPS"
        # The kubelet checks no certificate and names the pod's address.
        answer = httpx.get(f"https://127.0.0.1:{port}{request['path']}", verify=False)
        assert answer.status_code == 200, probe
    headers = {"Authorization": f"Bearer {pod.secret['metrics-token']}", "Host": "10.1.2.3:8700"}
    scraped = httpx.get(f"https://127.0.0.1:{port}/metrics", verify=False, headers=headers)
    assert scraped.status_code == 200 and "jackpot_jobs" in scraped.text
    refused = httpx.delete(f"https://127.0.0.1:{port}/v1/jobs/a-1", verify=False, headers=headers)
    assert refused.status_code == 403


def test_the_command_line_reaches_it_as_the_notes_say(pod: Pod) -> None:
    environ = os.environ | {"JACKPOT_URL": pod.url, "JACKPOT_CA": pod.ca, "JACKPOT_TOKEN": pod.secret["admin-token"]}
    done = subprocess.run(
        [*JACKPOT, "jobs", "--json"], env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr


def test_models_outside_of_the_roots_are_refused(pod: Pod) -> None:
    headers = {"Authorization": f"Bearer {pod.secret['admin-token']}"}
    job = {
        "policy": {"model": "/etc"},
        "actor": {"model": "builtin:complement/actor"},
        "task": {"name": "complement"},
    }
    port = pod.url.rpartition(":")[2]
    answer = httpx.post(f"https://127.0.0.1:{port}/v1/jobs?dry_run=true", verify=False, headers=headers, json=job)
    assert answer.status_code == 422
    assert "does not lie where this server takes models" in answer.text and "data/models" in answer.text


def test_a_renewed_certificate_is_served_without_a_restart(pod: Pod) -> None:
    directory = pod.directory / "etc/jackpot/tls"
    old = directory.joinpath("tls.crt").read_bytes()
    Authority("renewed").issue(directory, "localhost")  # also the authority: whoever trusts it sees the new one
    assert directory.joinpath("tls.crt").read_bytes() != old
    context = ssl.create_default_context(cafile=pod.ca)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            assert httpx.get(f"{pod.url}/healthz", verify=context).status_code == 200
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "the old certificate is still served"
            time.sleep(0.2)
