"""docs/kubernetes.md says nothing that the chart, the command line or Kubernetes would refuse."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from chart_world import CHART, ROOT, Object, containers, helm, of_kind, parse, pods, render_text, tool
from kubernetes_validate import validate
from patience import PATIENCE_SECONDS

from jackpot.cli import app
from jackpot.config import load_job

TEXT = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def file_of(name: str) -> str:
    """The block whose first line names this file."""
    (found,) = [block for block in blocks("yaml") if block.startswith(f"# {name}\n")]
    return found


def commands() -> Iterator[list[str]]:
    """Every command of the shell blocks, in words."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", re.sub(r"\$\([^()]*\)", "VALUE", line)):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:
                    continue
                if words:
                    yield words


def test_the_values_that_it_shows_render(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(file_of("values.yaml"), encoding="utf-8")
    objects = parse(render_text(path))
    kinds = {each["kind"] for each in objects}
    assert {"Deployment", "StatefulSet", "Ingress", "ServiceMonitor", "PodMonitor", "Certificate"} <= kinds
    done = helm("lint", "--strict", str(CHART), "--values", str(path))
    assert done.returncode == 0, done.stdout


def test_its_manifests_are_what_kubernetes_takes_and_fit_a_restricted_namespace() -> None:
    queues: list[Object] = list(yaml.safe_load_all(file_of("queue.yaml")))
    assert [each["kind"] for each in queues] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
    flavors = queues[1]["spec"]["resourceGroups"][0]["flavors"]
    assert flavors[0]["name"] == queues[0]["metadata"]["name"]
    assert queues[2]["spec"]["clusterQueue"] == queues[1]["metadata"]["name"]
    assert yaml.safe_load(file_of("values.yaml"))["workers"]["queue"] == queues[2]["metadata"]["name"]
    job = yaml.safe_load(file_of("models.yaml"))
    validate(job, "1.34", strict=True)
    ((_, _, spec),) = pods([job])
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
    assert all(each["securityContext"]["capabilities"] == {"drop": ["ALL"]} for each in containers(spec))


def test_the_objects_that_it_names_are_those_of_a_release_called_jackpot() -> None:
    done = helm("template", "jackpot", str(CHART), "--namespace", "jackpot")
    objects = parse(done.stdout)
    names = {each["metadata"]["name"] for each in objects}
    names |= {each["spec"]["secretName"] for each in of_kind(objects, "Certificate")}
    names |= {f"data-{each['metadata']['name']}-0" for each in of_kind(objects, "StatefulSet")}
    names |= {f"{each['metadata']['name']}-0" for each in of_kind(objects, "StatefulSet")}
    told = set(
        re.findall(r"\b(?:data-)?jackpot-(?:control-plane|redis|runs|models|worker)[a-z0-9-]*(?![:.\w/$-])", TEXT)
    )
    told -= {"jackpot-rollout"}
    assert told and told <= names, told - names


def test_the_quota_holds_the_job_and_what_it_needs_is_computed_right(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(file_of("values.yaml"), encoding="utf-8")
    cluster = yaml.safe_load(
        next(
            each["data"]["cluster.yaml"]
            for each in of_kind(parse(render_text(path)), "ConfigMap")
            if "cluster.yaml" in each["data"]
        )
    )
    job = load_job(ROOT / "examples" / "qwen3_8b.yaml")
    pods_of = {"orchestrator": 1, "rollout": job.rollout.replicas, "evaluator": 1, "scorer": job.scorer.replicas}
    needed = {"cpu": 0, "memory": 0, "nvidia.com/gpu": 0}
    for role, settings in cluster["roles"].items():
        asked = {**settings["resources"]["limits"], **settings["resources"]["requests"]}
        for name in needed:
            needed[name] += pods_of.get(role, 1) * int(str(asked.get(name, 0)).removesuffix("Gi"))
    assert f"{needed['nvidia.com/gpu']} GPUs, {needed['cpu']} CPUs and {needed['memory']} GiB" in TEXT
    assert cluster["roles"]["learner"]["resources"]["limits"]["nvidia.com/gpu"] == job.learner.processes
    _, queue, _ = yaml.safe_load_all(file_of("queue.yaml"))
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    quota = {each["name"]: each["nominalQuota"] for each in flavor["resources"]}
    assert needed["cpu"] <= quota["cpu"] and needed["nvidia.com/gpu"] <= quota["nvidia.com/gpu"]


def test_every_setting_that_it_names_exists() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

    def has(path: str) -> bool:
        value: Any = values
        for part in path.split("."):
            part = {"<role>": "rollout"}.get(part, part)
            if part != "*" and (not isinstance(value, dict) or part not in value):
                return value == {} or part in ("limits", "requests")
            value = next(iter(value.values())) if part == "*" else value[part]
        return True

    told = set(re.findall(rf"`((?:{'|'.join(values)})\.[\w.<>*]+)", TEXT))
    told |= {
        word.partition("=")[0] for words in commands() for word in words if re.match(r"(storage|redis)\.\S+=", word)
    }
    assert len(told) > 15
    assert not [path for path in told if not has(path)]


def test_every_jackpot_command_exists() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    used = {words[1] for words in commands() if words[0] == "jackpot" and len(words) > 1}
    assert {"submit", "watch", "logs", "token", "jobs"} <= used
    assert used <= known


def test_helm_commands_use_flags_that_helm_has() -> None:
    for words in commands():
        if words[0] != "helm" or words[1] == "repo":
            continue
        known = helm(words[1], "--help").stdout
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(flag)}\b", known), f"{flag} in {' '.join(words)}"


def test_kubectl_commands_use_verbs_and_flags_that_kubectl_has() -> None:
    def told(*words: str) -> str:
        done = subprocess.run(
            [str(tool("kubectl")), *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env={"HOME": "/nonexistent"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    everywhere = told("options")
    seen: dict[str, str] = {}
    for words in commands():
        if words[0] != "kubectl":
            continue
        rest = words[3:] if words[1] == "-n" else words[1:]
        if rest[0] not in seen:
            seen[rest[0]] = told(rest[0], "--help")
        sub = {"create": ("namespace", "secret"), "rollout": ("status", "restart")}.get(rest[0], ())
        verb = " ".join((rest[0], rest[1])) if sub else rest[0]
        assert not sub or rest[1] in sub, words
        more = ("docker-registry",) if verb == "create secret" else ()
        known = everywhere + (seen.setdefault(verb, told(*verb.split(), *more, "--help")))
        flags = {word.partition("=")[0] for word in rest[: rest.index("--") if "--" in rest else None]}
        for flag in flags:
            if flag.startswith("-") and len(flag) > 1:
                assert f"{flag}=" in known or f"{flag}," in known, f"{flag} in {' '.join(words)}"
    assert {"apply", "get", "wait", "rollout status", "create secret", "patch"} <= set(seen)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
