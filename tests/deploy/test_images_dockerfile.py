"""deploy/Dockerfile: linted, and as small, pinned and unprivileged as it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from patience import PATIENCE_SECONDS, TEST_SECONDS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
BASE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
PORTS = {"control-plane": "8700", "platform": "8700"} | dict.fromkeys(("rollout", "scorer"), "50051 50052 9090")
PORTS |= dict.fromkeys(("orchestrator", "learner"), "9090")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions and their arguments by stage, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.M).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, (line.strip() for line in text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = [(instruction, rest.split(" AS ")[0])]
        else:
            found[name].append((instruction, rest))
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("target", PORTS)
def test_an_image_runs_without_privileges_and_says_how_it_is(target: str) -> None:
    instructions = stages()[target]
    found = dict(instructions)
    assert instructions[0] == ("FROM", "base")
    assert found["COPY"] == f"--from=build-{target} /opt/jackpot /opt/jackpot"  # compilers and caches stay behind
    assert [rest for name, rest in instructions if name == "USER"] == ["10001:10001"]
    assert found["EXPOSE"] == PORTS[target]
    assert found["HEALTHCHECK"].endswith('CMD ["python", "-m", "jackpot.rpc.probe"]')
    module = ["jackpot"] if PORTS[target] == "8700" else ["python", "-m", f"jackpot.{target}"]
    assert json.loads(found["ENTRYPOINT"]) == module
    # Jobs' processes have one hash seed; who takes requests of strangers has one that these cannot know.
    assert ("PYTHONHASHSEED=0" in found["ENV"].split()) == (PORTS[target] != "8700")
    asked = re.search(r"JACKPOT_PROBE_URL=\w+://[\d.]+:(\d+)/", found["ENV"])
    assert asked and asked[1] in PORTS[target].split()
    for variable, port in re.findall(r"JACKPOT_(METRICS_ADDRESS|HEALTH_LISTEN)=0.0.0.0:(\d+)", found["ENV"]):
        assert port in PORTS[target].split(), variable


def test_versions_are_pinned_and_no_secret_is_built_in() -> None:
    arguments = dict(rest.split("=", 1) for name, rest in stages()[""] if name == "ARG")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", arguments["BASE_IMAGE"])
    for name in ("UV_VERSION", "TORCH_VERSION"):
        assert re.fullmatch(r"\d+(\.\d+)+", arguments[name])
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"torch=={arguments['TORCH_VERSION']}" in makefile and arguments["TORCH_CPU_INDEX"] in makefile
    assert not re.search(r"(?i)^(ARG|ENV).*(password|token|secret)", DOCKERFILE.read_text("utf-8"), re.M)
    outside = {rest for steps in stages().values() for name, rest in steps if name == "FROM"} - set(stages())
    assert outside == {"${BASE_IMAGE}"}


def requirements_of(extra: str) -> list[Requirement]:
    """What an extra asks for, extras of our own followed."""
    found = []
    for text in (*BASE, *EXTRAS[extra]):
        requirement = Requirement(text)
        if requirement.name == "jackpot":
            found += [one for inner in requirement.extras for one in requirements_of(inner)]
        else:
            found.append(requirement)
    return found


def locked() -> dict[str, str]:
    """Versions by package."""
    lines = (ROOT / "deploy" / "requirements.lock").read_text("utf-8").splitlines()
    pins = [line.split(" ")[0].split("==") for line in lines if re.match(r"[a-z0-9]", line)]
    return {name: version for name, version in pins}


@pytest.mark.parametrize("extra", ["local", "kubernetes", "reasoning-gym", "vllm"])
def test_the_lock_has_a_version_of_everything_that_the_images_install(extra: str) -> None:
    versions = locked()
    for requirement in requirements_of(extra):
        if requirement.name == "torch":  # of the index that ACCELERATOR chooses, by TORCH_VERSION
            assert "torch" not in versions
            continue
        version = versions.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), (
            f"deploy/requirements.lock has {version} for {requirement}; `make lock` brings it up to date"
        )


def extras_named_in(text: str) -> set[str]:
    """The extras that installations of Jackpot ask for: `--extra NAME`, `.[NAME,…]` and `jackpot[NAME,…]`."""
    lists = re.findall(r"(?:(?<=[\s'\"`]\.)|\bjackpot)\[([a-z0-9,-]+)\]", text)
    return {name for names in (*lists, *re.findall(r"--extra ([a-z0-9-]+)", text)) for name in names.split(",")}


def test_every_extra_that_somebody_is_to_install_exists() -> None:
    sources = [DOCKERFILE, *(ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md", "pyproject.toml"))]
    for directory, pattern in (("docs", "*.md"), ("examples", "*.yaml"), ("benchmarks", "*.py"), ("services", "*.py")):
        sources += sorted((ROOT / directory).rglob(pattern))
    named = {path.relative_to(ROOT).as_posix(): extras_named_in(path.read_text("utf-8")) for path in sources}
    named["deploy/Dockerfile"] |= set(re.findall(r"engine=([a-z-]+);", DOCKERFILE.read_text("utf-8")))
    assert {"scorer", "vllm", "rollout", "s3"} <= named["deploy/Dockerfile"]
    assert {"local", "dev"} <= named["Makefile"] and named["README.md"] and named["docs/training.md"]
    assert {path: unknown for path, names in named.items() if (unknown := names - set(EXTRAS))} == {}


def test_every_image_that_checks_tasks_or_runs_them_has_reasoning_gym() -> None:
    installs = re.findall(r"--extra (?:kubernetes|orchestrator|local)\b.*", DOCKERFILE.read_text("utf-8"))
    assert len(installs) == 3
    assert all("--extra reasoning-gym" in install for install in installs)


def test_every_locked_version_has_hashes() -> None:
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / "deploy" / "requirements.lock").read_text("utf-8"))
    assert len(blocks) > 100
    assert [block for block in blocks if re.match(r"[a-z0-9]", block) and "--hash=sha256:" not in block] == []


def test_only_what_a_wheel_is_built_from_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for steps in stages().values()
        for name, rest in steps
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert allowed == copied


BLOCKING = """
import importlib, json, pkgutil, sys
blocked, packages = json.loads(sys.argv[1])
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not in this image", name=name)
sys.meta_path.insert(0, Blocker())
for package in packages:
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{package}."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
"""


def installed_with(extra: str) -> set[str]:
    """Names of the distributions that an extra brings, and what they require in turn."""
    waiting, found = requirements_of(extra), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        if name in found or not any(requirement.marker is None or requirement.marker.evaluate(e) for e in wanted):
            continue
        found.add(name)
        try:
            inner = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        waiting += [one for one in inner if one.marker is None or any(one.marker.evaluate(e) for e in wanted)]
    return found


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("kubernetes", ["jackpot.control_plane", "jackpot.cli", "jackpot.bus"]),
        ("orchestrator", ["jackpot.orchestrator", "jackpot.demo.task"]),
    ],
)
def test_a_role_without_torch_needs_nothing_that_its_image_lacks(extra: str, packages: list[str]) -> None:
    from importlib.metadata import packages_distributions

    present = installed_with(extra) | {"jackpot"}
    blocked = [
        module
        for module, distributions in packages_distributions().items()
        if not present & {canonicalize_name(name) for name in distributions} and module not in sys.stdlib_module_names
    ]
    assert "pytest" in blocked and "redis" not in blocked
    arguments = json.dumps([blocked, packages])
    result = subprocess.run(
        [sys.executable, "-c", BLOCKING, arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        cwd=ROOT / "services",
    )
    assert result.returncode == 0, result.stderr[-2000:]
