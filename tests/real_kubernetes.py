"""A real kube-apiserver with etcd and RBAC, and no controllers: what they would do, tests do in their place.

Opt-in: ``JACKPOT_TEST_KUBE_APISERVER`` names the binary, of any version from 1.20 on; etcd is looked for in PATH.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from chart_world import NAMESPACE, Object, of_kind, render
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from patience import PATIENCE_SECONDS

BINARY = "JACKPOT_TEST_KUBE_APISERVER"
ADMIN, LAUNCHER = "admin-token", "launcher-token"
JOBSETS = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"

# Structural, as the API server asks of every definition; of the fields it knows no more than that they are there.
_JOBSET_DEFINITION: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "jobsets.jobset.x-k8s.io",
        "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/jobset"},
    },
    "spec": {
        "group": "jobset.x-k8s.io",
        "names": {"kind": "JobSet", "listKind": "JobSetList", "plural": "jobsets", "singular": "jobset"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1alpha2",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            part: {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
                            for part in ("spec", "status")
                        },
                    }
                },
            }
        ],
    },
}


class ApiServer:
    """The API server, and an administrator's connection to it."""

    def __init__(self, port: int, directory: Path) -> None:
        self.url = f"https://127.0.0.1:{port}"
        self.kubeconfig = directory / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(_kubeconfig(self.url)), encoding="utf-8")
        # Its certificate is one that it made for itself just now.
        self._http = httpx.Client(
            base_url=self.url, verify=False, timeout=PATIENCE_SECONDS, headers={"Authorization": f"Bearer {ADMIN}"}
        )

    def ready(self) -> bool:
        """Whether it serves."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def minor_version(self) -> int:
        """24 for Kubernetes 1.24."""
        return int(str(self.get("/version")["minor"]).rstrip("+"))

    def close(self) -> None:
        """Close the administrator's connection."""
        self._http.close()

    def get(self, path: str) -> Object:
        """An object or a list."""
        return self._answer(self._http.get(path))

    def create(self, path: str, content: Object) -> Object:
        """Make an object."""
        return self._answer(self._http.post(path, json=content))

    def patch(self, path: str, content: Object) -> Object:
        """Merge into an object."""
        headers = {"Content-Type": "application/merge-patch+json"}
        return self._answer(self._http.patch(path, json=content, headers=headers))

    def as_launcher(self, method: str, path: str) -> int:
        """The status of a request that the control plane's account makes."""
        headers = {"Authorization": f"Bearer {LAUNCHER}"}
        return self._http.request(method, path, headers=headers, json={} if method == "POST" else None).status_code

    def collect_garbage(self, path: str) -> None:
        """Let go of what is deleted in the foreground, as the garbage collector does once nothing depends on it."""
        for one in self.get(path)["items"]:
            if one["metadata"].get("deletionTimestamp"):
                self.patch(f"{path}/{one['metadata']['name']}", {"metadata": {"finalizers": None}})

    def grant(self) -> None:
        """Give the control plane's account what the chart gives it."""
        rendered = render()
        rbac = "/apis/rbac.authorization.k8s.io/v1"
        for kind, plural in (("Role", "roles"), ("RoleBinding", "rolebindings")):
            for one in of_kind(rendered, kind):
                self.create(f"{rbac}/namespaces/{NAMESPACE}/{plural}", one)

    @staticmethod
    def _answer(response: httpx.Response) -> Object:
        assert response.is_success, response.text
        content: Object = response.json()
        return content


@contextmanager
def real_api_server(directory: Path, launcher_account: str) -> Iterator[ApiServer]:
    """Start etcd and the API server; a namespace and the definition of JobSets are made.

    Args:
        directory: for their data.
        launcher_account: the service account whose token the kubeconfig has.
    """
    binary, etcd = os.environ.get(BINARY), shutil.which("etcd")
    if not binary:
        pytest.skip(f"{BINARY} names no kube-apiserver")
    if etcd is None:
        pytest.skip("etcd is not in PATH")
    key = rsa.generate_private_key(65537, 2048)
    (directory / "sa.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    account = f"system:serviceaccount:{NAMESPACE}:{launcher_account}"
    tokens = f'{ADMIN},admin,1,"system:masters"\n{LAUNCHER},{account},2,"system:serviceaccounts"\n'
    (directory / "tokens.csv").write_text(tokens)
    store, peers, port = _free_port(), _free_port(), _free_port()
    commands = [
        [
            etcd, f"--data-dir={directory / 'etcd'}", f"--listen-client-urls=http://127.0.0.1:{store}",
            f"--advertise-client-urls=http://127.0.0.1:{store}", f"--listen-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-cluster=default=http://127.0.0.1:{peers}",
        ],
        [
            binary, f"--etcd-servers=http://127.0.0.1:{store}", "--bind-address=127.0.0.1", f"--secure-port={port}",
            f"--cert-dir={directory / 'certificates'}", "--authorization-mode=RBAC",
            f"--token-auth-file={directory / 'tokens.csv'}", "--service-cluster-ip-range=10.0.0.0/24",
            f"--service-account-key-file={directory / 'sa.key'}",
            f"--service-account-signing-key-file={directory / 'sa.key'}",
            "--service-account-issuer=https://kubernetes.default.svc", "--disable-admission-plugins=ServiceAccount",
        ],
    ]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    server = ApiServer(port, directory)
    try:
        for command in commands:
            with (directory / f"{Path(command[0]).name}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory))
        _wait_until(server.ready, "the API server", directory)
        server.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        server.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", _JOBSET_DEFINITION)
        _wait_until(lambda: server._http.get(JOBSETS).is_success, "JobSets to be known", directory)
        yield server
    finally:
        server.close()
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _wait_until(condition: Any, what: str, directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        logs = "".join(path.read_text(errors="replace")[-2000:] for path in directory.glob("*.log"))
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:g} s for {what}:\n{logs}"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kubeconfig(url: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "test", "user": {"token": LAUNCHER}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
    }
