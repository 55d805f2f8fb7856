"""The committed gRPC stubs are what the .proto files say, and the .proto files follow buf's rules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jackpot.v1

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
STUBS = Path(jackpot.v1.__file__).parent


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("grpc_tools")
    out = tmp_path_factory.mktemp("stubs")
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTOS), *outputs, *sources], check=True, timeout=60
    )
    return out / "jackpot" / "v1"


def test_every_proto_has_its_stubs_and_there_are_no_others(generated: Path) -> None:
    names = {path.name for path in generated.iterdir()}
    assert {"rollout_pb2.py", "rollout_pb2.pyi", "rollout_pb2_grpc.py"} <= names
    assert names == {path.name for path in STUBS.iterdir()} - {"__init__.py", "__pycache__"}


def test_the_committed_stubs_are_up_to_date(generated: Path) -> None:
    stale = [path.name for path in generated.iterdir() if path.read_text() != (STUBS / path.name).read_text()]
    assert stale == [], "run `make protos` and commit the result"


def test_the_protos_pass_buf_lint(tmp_path: Path) -> None:
    buf = shutil.which("buf", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if buf is None:
        pytest.skip("buf is not installed")
    result = subprocess.run(
        [buf, "lint"],
        cwd=PROTOS,
        env=os.environ | {"BUF_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
