"""The REST server over TLS: real handshakes, with the client, the command line and curl's kind of strangers."""

from __future__ import annotations

import os
import select
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from certificates import Authority
from job_world import JACKPOT
from patience import PATIENCE_SECONDS, TEST_SECONDS

from jackpot import Client
from jackpot.control_plane.tokens import Scope, TokenFile
from jackpot.errors import ApiError

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@contextmanager
def serving(directory: Path, tls_dir: Path) -> Iterator[tuple[int, str]]:
    """`jackpot serve` on every interface with that certificate; its port, and a token."""
    token = TokenFile(directory / "tokens.json").create("test", Scope.WRITE, None)
    options = ["--host", "0.0.0.0", "--port", "0", "--slots", "0", "--data-dir", str(directory)]
    options += ["--tls-cert", str(tls_dir / "tls.crt"), "--tls-key", str(tls_dir / "tls.key")]
    options += ["--allowed-host", "localhost", "--allowed-host", "127.0.0.1"]
    with (directory / "serve.log").open("wb") as log:
        process = subprocess.Popen([*JACKPOT, "serve", *options], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], PATIENCE_SECONDS)[0], (directory / "serve.log").read_text()
        line = process.stdout.readline()
        assert line.startswith("jackpot serves at https://0.0.0.0:"), line + (directory / "serve.log").read_text()
        port = int(line.split()[3].rpartition(":")[2])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _listens(port):  # bound when it says so, listening a moment later
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.05)
        yield port, token
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        process.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_clients_that_know_the_authority_are_served_and_others_turn_away(tmp_path: Path) -> None:
    authority = Authority()
    tls_dir = authority.issue(tmp_path / "tls", "localhost")
    (tmp_path / "data").mkdir()
    with serving(tmp_path / "data", tls_dir) as (port, token):
        url = f"https://localhost:{port}"
        with Client(url, token, ca=tls_dir / "ca.crt") as client:
            assert list(client.jobs()) == []
        listed = subprocess.run(
            [*JACKPOT, "jobs", "--json"],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env=os.environ | {"JACKPOT_URL": url, "JACKPOT_TOKEN": token, "JACKPOT_CA": str(tls_dir / "ca.crt")},
        )
        assert (listed.returncode, listed.stdout.strip()) == (0, "[]"), listed.stderr
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(tls_dir / "ca.crt")))
        with trusting:
            answer = trusting.get(f"{url}/v1/jobs")
            assert answer.status_code == 401 and "max-age" in answer.headers["strict-transport-security"]
            with pytest.raises(httpx.ConnectError, match=r"CERTIFICATE_VERIFY_FAILED.*IP address mismatch"):
                trusting.get(f"https://127.0.0.1:{port}/healthz")  # no name of its certificate
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/healthz")  # an authority that nobody knows
        other = Authority().issue(tmp_path / "other", "localhost")
        with Client(url, token, ca=other / "ca.crt") as client, pytest.raises(ApiError, match="CERTIFICATE_VERIFY"):
            list(client.jobs())
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/healthz")  # plaintext on the TLS port
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(tls_dir / "ca.crt")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        raw = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)
        with raw, old.wrap_socket(raw, server_hostname="localhost") as wrapped:
            assert wrapped.version() == "TLSv1.2"  # the oldest


@pytest.mark.parametrize("wrong", ["another's key", "not PEM"])
def test_a_certificate_that_cannot_work_is_refused_at_once(tmp_path: Path, wrong: str) -> None:
    tls_dir = Authority().issue(tmp_path / "tls", "localhost")
    if wrong == "not PEM":
        (tls_dir / "tls.crt").write_text("no")
    else:
        (tls_dir / "tls.key").write_bytes((Authority().issue(tmp_path / "other", "localhost") / "tls.key").read_bytes())
    files = ["--tls-cert", str(tls_dir / "tls.crt"), "--tls-key", str(tls_dir / "tls.key")]
    command = [*JACKPOT, "serve", "--port", "0", "--data-dir", str(tmp_path), *files]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert refused.returncode == 2 and "--tls-cert" in refused.stderr and "Traceback" not in refused.stderr
