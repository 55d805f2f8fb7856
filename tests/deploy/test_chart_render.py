"""The chart renders for every values file, to objects that Kubernetes 1.30 to 1.36 take."""

from __future__ import annotations

import functools
import re
import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from chart_world import CHART, ROOT, VALUES_FILES, Object, helm, of_kind, parse, render, render_text, values_id
from kubernetes_validate import utils as schemas
from referencing import Registry, Resource

KUBERNETES = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36")
# Kinds that no Kubernetes schema knows; their shape has tests of its own.
CUSTOM = {
    "cert-manager.io/v1": {"Certificate", "Issuer"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute"},
    "monitoring.coreos.com/v1": {"PodMonitor", "PrometheusRule", "ServiceMonitor"},
}
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "load balancer": (
        'controlPlane.service={"type":"LoadBalancer","loadBalancerClass":"x/y","loadBalancerSourceRanges":["10.0.0.0/8"]}',
    ),
    "ipv6": ('controlPlane.listenAddress="::"', 'networkPolicy.kubernetesApi.cidrs=["fd00::/8"]'),
    "no persistence": ("redis.persistence.enabled=false",),
    "claims of one's own": ('redis.persistence.existingClaim="bus"', 'storage.runs.existingClaim="runs"'),
    "names that look like numbers": (
        'image.pullSecrets=["17"]',
        'controlPlane.priorityClassName="1"',
        'controlPlane.serviceAccount.name="2"',
        'controlPlane.auth.existingSecret="3"',
        'controlPlane.tls.existingSecret="4"',
        'tls.workers.existingSecret="5"',
        'redis.auth.existingSecret="6"',
        'redis.tls.existingSecret="7"',
        'redis.persistence.existingClaim="8"',
        'storage.runs.existingClaim="9"',
        'storage.models.existingClaim="10"',
        'huggingFace.existingSecret="11"',
        'workers.serviceAccount.name="12"',
        'workers.queue="13"',
        'image.tag="1.0"',
    ),
    "redis": (
        'redis.flavor="redis"',
        'redis.image={"repository":"redis","tag":"8.2","registry":"registry.example.com:5000"}',
    ),
    "a url": ("redis.enabled=false", 'externalRedis.url="redis://bus.example.com:6379/0"'),
    "everything extra": (
        'controlPlane.extraEnv=[{"name":"A","value":"b"}]',
        'controlPlane.extraEnvFrom=[{"configMapRef":{"name":"more"}}]',
        'controlPlane.extraArgs=["--rate-limit=7"]',
        'controlPlane.extraVolumes=[{"name":"more","emptyDir":{}}]',
        'controlPlane.extraVolumeMounts=[{"name":"more","mountPath":"/more"}]',
        'controlPlane.podLabels={"a":"b"}',
        'controlPlane.podAnnotations={"a":"b"}',
        'controlPlane.topologySpreadConstraints=[{"maxSkew":1,"topologyKey":"zone","whenUnsatisfiable":"DoNotSchedule"}]',
        'redis.extraEnv=[{"name":"A","value":"b"}]',
        'redis.extraVolumes=[{"name":"more","emptyDir":{}}]',
        'redis.extraVolumeMounts=[{"name":"more","mountPath":"/more"}]',
        'redis.nodeSelector={"disk":"fast"}',
        'redis.tolerations=[{"key":"bus","operator":"Exists"}]',
        'redis.priorityClassName="platform"',
        'commonLabels={"cost-center":"17"}',
        'networkPolicy.workersExtraEgress=[{"to":[{"ipBlock":{"cidr":"10.1.0.0/16"}}],"ports":[{"port":443}]}]',
        'networkPolicy.clients=[{"namespaceSelector":{}}]',
        'extraObjects=[{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"{{ .Release.Name }}-mine"}}]',
    ),
}


def cases() -> list[Any]:
    """Values files, and settings on top of the defaults."""
    files = [pytest.param(path, (), id=values_id(path)) for path in VALUES_FILES]
    return files + [pytest.param(None, settings, id=name) for name, settings in COMBINATIONS.items()]


def objects_of(values: Path | None, settings: tuple[str, ...]) -> tuple[Object, ...]:
    return tuple(render(values, *settings))


@functools.cache
def validator(kind: str, api_version: str, version: str) -> jsonschema.Draft202012Validator:
    """Of one kind in one version of Kubernetes; unknown fields are errors."""
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = schemas.schema_contents(f"{folder(version)}/{kind.lower()}-{name}.json", version)
    registry: Registry[Any] = Resource.from_contents(definitions(version)) @ Registry()
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ registry)


def folder(version: str) -> str:
    exact = [each for each in schemas.all_versions() if schemas.major_minor(each) == version][-1]
    return f"kubernetes-json-schema/v{exact}-local-strict"


@functools.cache
def definitions(version: str) -> Any:
    return schemas.schema_contents(f"{folder(version)}/_definitions.json", version)


@pytest.mark.parametrize("values", VALUES_FILES, ids=values_id)
def test_lint_finds_nothing(values: Path) -> None:
    done = helm("lint", "--strict", str(CHART), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout and "ERROR" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_fits_its_schema(version: str) -> None:
    seen: set[str] = set()
    for case in cases():
        for each in objects_of(*case.values):
            kind, api_version = each["kind"], each["apiVersion"]
            if kind in CUSTOM.get(api_version, ()):
                continue
            text = yaml.dump(each, Dumper=yaml.CSafeDumper)
            if text in seen:
                continue
            seen.add(text)
            errors = [
                f"{error.json_path}: {error.message}"
                for error in validator(kind, api_version, version).iter_errors(each)
            ]
            assert not errors, f"{case.id}: {kind}/{each['metadata']['name']}: {errors}"
    assert len(seen) > 100


@pytest.mark.parametrize(("values", "settings"), cases())
def test_objects_have_short_names_one_namespace_and_our_labels(values: Path | None, settings: tuple[str, ...]) -> None:
    objects = [each for each in objects_of(values, settings) if not each["metadata"]["name"].endswith("-mine")]
    keys = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(keys) == len(set(keys))
    for each in objects:
        meta = each["metadata"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", meta["name"])
        assert meta["namespace"] == "ml"
        assert meta["labels"]["app.kubernetes.io/name"] == "jackpot"
        assert meta["labels"]["app.kubernetes.io/instance"] == "jp"
        assert meta["labels"]["app.kubernetes.io/managed-by"] == "Helm"


def test_names_stay_short_whatever_the_release_is_called() -> None:
    long = "a-release-whose-name-is-as-long-as-helm-permits-53-ch"
    done = helm("template", long[:53], str(CHART), "--values", str(CHART / "ci" / "gpu-cluster-values.yaml"))
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^  name: (\S+)$", done.stdout, re.MULTILINE)
    assert names
    assert all(len(name) <= 63 for name in names)


def test_the_chart_carries_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == project["version"]
    assert chart["kubeVersion"].startswith(f">={KUBERNETES[0]}.")
    images = {image for each in render(VALUES_FILES[-1]) for image in re.findall(r"jackpot-[a-z-]+:\S+", str(each))}
    assert all(f":{project['version']}" in image for image in images)


@pytest.mark.parametrize("values", VALUES_FILES, ids=values_id)
def test_a_second_rendering_differs_in_secrets_alone(values: Path) -> None:
    first, second = (
        [each for each in yaml.load_all(render_text(values), yaml.CSafeLoader) if each and each["kind"] != "Secret"]
        for _ in range(2)
    )
    assert first == second


def test_with_secrets_made_elsewhere_nothing_is_random() -> None:
    values = CHART / "ci" / "external-redis-tls-values.yaml"
    assert not of_kind(render(values), "Secret")
    assert render_text(values) == render_text(values)


def test_the_packaged_chart_renders_like_its_sources(tmp_path: Path) -> None:
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("jackpot-*.tgz")
    with tarfile.open(package) as archive:
        names = {name.removeprefix("jackpot/") for name in archive.getnames()}
    assert {"Chart.yaml", "values.schema.json", "README.md", "files/users.acl", "templates/NOTES.txt"} <= names
    assert not [name for name in names if name.startswith("ci/")]
    # This values file makes no secret, so that nothing is random.
    values = CHART / "ci" / "external-redis-tls-values.yaml"
    assert render_text(values, chart=package) == render_text(values)


@pytest.mark.parametrize("values", VALUES_FILES, ids=values_id)
def test_the_notes_name_objects_that_there_are(values: Path) -> None:
    done = helm("install", "jp", str(CHART), "--namespace", "ml", "--dry-run=client", "--values", str(values))
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:\n")[2]
    objects = render(values)
    names = {each["metadata"]["name"] for each in objects}
    names |= {each["spec"]["secretName"] for each in of_kind(objects, "Certificate")}
    told = set(re.findall(r"\bjp-jackpot[a-z0-9-]*", notes))
    assert "jp-jackpot-control-plane" in told and told <= names
    assert "{{" not in notes and "<no value>" not in notes
    assert ("Any pod of the cluster" in notes) == ("no-monitoring" in values.name)


def test_a_new_version_restarts_the_control_plane_and_leaves_the_bus_alone(tmp_path: Path) -> None:
    newer = tmp_path / "jackpot"
    shutil.copytree(CHART, newer)
    chart = (newer / "Chart.yaml").read_text(encoding="utf-8")
    (newer / "Chart.yaml").write_text(chart.replace("0.1.0", "0.2.0"), encoding="utf-8")
    before, after = (
        {each["kind"]: each.get("spec") for each in objects} for objects in (render(), parse(render_text(chart=newer)))
    )
    assert before["StatefulSet"] == after["StatefulSet"]
    assert before["Deployment"]["template"] != after["Deployment"]["template"]
    assert before["Deployment"]["selector"] == after["Deployment"]["selector"]
