"""What must start fast and run anywhere never loads torch, transformers or vLLM, not even indirectly."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jackpot

PACKAGE = Path(jackpot.__file__).parent
LIGHT = (
    *("config", "trajectory", "errors", "orchestrator", "control_plane", "cli"),
    *("bus", "storage", "rpc", "telemetry", "process"),
)
SERVICES = sorted({path.parent.name for path in PACKAGE.glob("*/__main__.py")} - {"control_plane", "demo", "replay"})
HEAVY = ("torch", "transformers", "vllm")


def light_modules() -> list[str]:
    """Every module that exists under the light names; service entry points (``__main__``) are checked, too."""
    names = []
    for module in pkgutil.walk_packages([str(PACKAGE)], "jackpot."):
        if module.name.split(".")[1] in LIGHT:
            names.append(module.name)
    return names


def test_the_light_modules_are_found() -> None:
    found = {name.split(".")[1] for name in light_modules()}
    assert found == set(LIGHT)


def test_light_modules_load_nothing_heavy() -> None:
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *light_modules()], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_services_check_their_settings_before_they_load_anything_heavy(service: str) -> None:
    script = (
        "import runpy, sys\n"
        f"try: runpy.run_module('jackpot.{service}', run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], env={}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: JACKPOT_"), result.stderr
