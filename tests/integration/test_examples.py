"""The job files under examples/ are what they claim to be: they parse, and they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from job_world import assert_ledger_adds_up, jackpot_run
from patience import TEST_SECONDS

from jackpot.config import load_job

pytestmark = pytest.mark.timeout(TEST_SECONDS)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_job_file(path: Path) -> None:
    assert load_job(path).learner.steps >= 1


WITHOUT_REASONING_GYM = "import sys; sys.modules['reasoning_gym'] = None; from jackpot.cli import main; main()"


def test_an_example_says_what_to_install_where_reasoning_gym_is_missing(make_model: Callable[..., Path]) -> None:
    models = [f"policy.model={make_model('llama', seed=3)}", f"actor.model={make_model('llama', seed=4)}"]
    command = [sys.executable, "-c", WITHOUT_REASONING_GYM, "validate", str(EXAMPLES / "chain_sum.yaml"), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: task.name = 'reasoning_gym:chain_sum': needs reasoning-gym"), done.stderr
    assert "pip install 'jackpot[reasoning-gym]'" in done.stderr and "Traceback" not in done.stderr


def test_chain_sum_runs_on_two_model_directories_of_ones_own(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: it takes a C compiler")
    directory = tmp_path / "run"
    overrides = [
        f"policy.model={make_model('llama', seed=3, max_position_embeddings=512)}",
        f"actor.model={make_model('qwen3', seed=4, hidden_size=16, num_hidden_layers=1, max_position_embeddings=512)}",
        "policy.dtype=float32",
        "actor.dtype=float32",
        "sampling.max_tokens=12",
        "learner.steps=2",
        "learner.groups_per_batch=2",
        "evaluation.prompts=4",
    ]
    arguments = [str(EXAMPLES / "chain_sum.yaml"), *overrides, "--run-dir", str(directory)]
    with jackpot_run(*arguments, directory=directory) as run:
        code, _, stderr = run.finish()
    assert code == 0, stderr + run.output()
    assert_ledger_adds_up(run.summary, trained=4)
    assert run.summary["policy_accuracy"]["final"] is not None
