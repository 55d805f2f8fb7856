"""The chart's values: wrong ones are refused by name, and each is documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart_world import CHART, refusal

REFUSED = [
    ('controlPlane.replicas="two"', "/controlPlane/replicas", "want integer"),
    ("controlPlane.replicas=0", "/controlPlane/replicas", "minimum"),
    ("replicas=2", "at ''", "'replicas' not allowed"),
    ("controlPlane.replica=2", "/controlPlane", "'replica' not allowed"),
    ('image.pullPolicy="Sometimes"', "/image/pullPolicy", "'IfNotPresent'"),
    ('image.registry="https://registry.example.com"', "/image/registry", "does not match"),
    ('controlPlane.image.digest="latest"', "/controlPlane/image/digest", "sha256"),
    ('controlPlane.roots=["models"]', "/controlPlane/roots/0", "^/"),
    ('controlPlane.service.type="Ingress"', "/controlPlane/service/type", "'LoadBalancer'"),
    ('workers.roles.rollout.resources.limits={"memory":"64 GB"}', "/workers/roles/rollout/resources/limits/memory", ""),
    ('workers.roles.trainer={"shmSize":"1Gi"}', "/workers/roles", "'trainer' not allowed"),
    ('workers.roles.learner.env={"NCCL_DEBUG":1}', "/workers/roles/learner/env/NCCL_DEBUG", "want string"),
    ('workers.roles.learner.shmSize="lots"', "/workers/roles/learner/shmSize", "does not match"),
    ('redis.maxMemory="3Gi"', "/redis/maxMemory", "mb|gb"),
    ('redis.appendFsync="no"', "/redis/appendFsync", "'everysec'"),
    ('redis.persistence.size="10"', "/redis/persistence/size", "does not match"),
    ('externalRedis.url="redis://user:password@host:6379"', "/externalRedis/url", "does not match"),
    ('storage.runs.accessModes=["RWX"]', "/storage/runs/accessModes/0", "'ReadWriteMany'"),
    ('storage.objects.url="https://s3.example.com/jackpot"', "/storage/objects/url", "does not match"),
    ('storage.objects.endpoint="s3.example.com"', "/storage/objects/endpoint", "does not match"),
    ('networkPolicy.kubernetesApi.cidrs=["10.0.0.1"]', "/networkPolicy/kubernetesApi/cidrs/0", "does not match"),
    ('monitoring.podMonitor.interval="often"', "/monitoring/podMonitor/interval", "does not match"),
    ('ingress.hosts=["https://jackpot.example.com"]', "/ingress/hosts/0", "does not match"),
    ('tls.source="letsencrypt"', "/tls/source", "'cert-manager'"),
    ('fullnameOverride="Jackpot!"', "/fullnameOverride", "does not match"),
]

INCOMPATIBLE = [
    (('tls.source="none"',), "tls.workers.existingSecret"),
    (('tls.source="none"', 'tls.workers.existingSecret="a"'), "controlPlane.tls.existingSecret"),
    (
        ('tls.source="none"', 'tls.workers.existingSecret="a"', 'controlPlane.tls.existingSecret="b"'),
        "redis.tls.existingSecret",
    ),
    (("redis.enabled=false",), "externalRedis.existingSecret"),
    (
        ("redis.enabled=false", 'externalRedis={"existingSecret":"a","url":"redis://b:6379"}'),
        "externalRedis.existingSecret",
    ),
    (('storage.objects.endpoint="https://s3.example.com"',), "storage.objects.url"),
    (("ingress.enabled=true",), "ingress.hosts"),
    (("gateway.enabled=true",), "gateway.parentRefs"),
]


@pytest.mark.parametrize(("setting", "path", "reason"), REFUSED, ids=[each[0] for each in REFUSED])
def test_a_wrong_value_is_refused_by_name(setting: str, path: str, reason: str) -> None:
    message = refusal(setting)
    assert path in message
    assert reason in message


@pytest.mark.parametrize(("settings", "named"), INCOMPATIBLE, ids=[each[1] for each in INCOMPATIBLE])
def test_settings_that_do_not_go_together_are_refused_with_what_to_do(settings: tuple[str, ...], named: str) -> None:
    message = refusal(*settings)
    assert named in message
    assert "set " in message.lower() or "name " in message.lower()


def objects_in(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every object schema that lists properties."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield path, schema
        for key, value in schema.items():
            yield from objects_in(value, f"{path}/{key}")


def test_the_schema_takes_nothing_that_it_does_not_list() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    found = dict(objects_in(schema))
    assert len(found) > 30
    assert not [path for path, each in found.items() if each.get("additionalProperties") is not False]


def test_the_schema_lists_exactly_the_values_that_there_are() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

    def compare(value: Any, part: Any, path: str) -> None:
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        if "properties" in part and isinstance(value, dict) and value:
            optional = {"requests", "limits"} if path.endswith(".resources") else set()
            assert set(part["properties"]) - optional <= set(value) <= set(part["properties"]), path
            for key in value:
                compare(value[key], part["properties"][key], f"{path}.{key}")

    compare(values, schema, "")


def documented() -> dict[str, str]:
    """Dotted name and comment of every value that carries one; a comment may go on over more lines."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    comment = ""
    for line in (CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = stripped.removeprefix("# -- ")
        elif stripped.startswith("#") and comment:
            comment += " " + stripped.removeprefix("# ")
        elif match := re.match(r"^( *)([A-Za-z]+):", line):
            indent = len(match[1])
            parents = [each for each in parents if each[0] < indent] + [(indent, match[2])]
            if comment:
                found[".".join(name for _, name in parents)] = comment
            comment = ""
    return found


def table() -> str:
    """The table of the chart's README: name, default, meaning."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    rows = ["| value | default | meaning |", "| --- | --- | --- |"]
    for name, comment in documented().items():
        value: Any = values
        for part in name.split("."):
            value = value[part]
        shown = json.dumps(value, ensure_ascii=False)
        rows.append(f"| `{name}` | `{shown}` | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def test_the_readmes_table_is_that_of_the_values() -> None:
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- values: begin -->\n", "\n<!-- values: end -->"
    stored = readme.partition(begin)[2].partition(end)[0]
    assert stored == table(), "helm/jackpot/README.md: replace the table by what table() in this file makes"
