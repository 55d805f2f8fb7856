"""`jackpot run` to the end, and its refusals."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from job_world import JACKPOT, assert_ledger_adds_up, assert_mirror_agrees, jackpot_run, sampled_tokens, write_job
from patience import PATIENCE_SECONDS, TEST_SECONDS
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from jackpot.control_plane.sessions.comparison import compare

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]


def test_a_run_trains_to_its_last_step_and_leaves_what_it_promises(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model)
    directory = tmp_path / "run"
    with jackpot_run(
        str(job_file), "learner.steps=6", "--run-dir", str(directory), "--json", directory=directory
    ) as run:
        code, stdout, stderr = run.finish()
    assert code == 0, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert summary == run.summary
    assert summary["state"] == "succeeded" and summary["steps"] == 6 and summary["restarts"] == 0
    assert_ledger_adds_up(summary, trained=12)
    assert_mirror_agrees(run)
    assert 0 < summary["acceptance_rate"] <= 1
    assert summary["kl_policy_actor"]["initial"] > 0
    assert summary["resumed_from_step"] is None
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["staleness/max"] for row in rows) <= 1
    evaluations = [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == 6
    loaded = re.findall(r"weights loaded version=(\d+)", (directory / "logs" / "evaluator.log").read_text())
    assert [int(version) for version in loaded] == [row["newest_step"] for row in evaluations]  # and no others
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    for role in ("policy", "actor"):
        AutoModelForCausalLM.from_pretrained(directory / "export" / role)
        assert AutoTokenizer.from_pretrained(directory / "export" / role)("7-3").input_ids
    assert not list((directory / "payloads").rglob("*.bin"))


def test_on_policy_training_runs_without_an_actor(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model)
    directory = tmp_path / "run"
    arguments = ["actor=policy", "learner.steps=3", "orchestrator.max_staleness=0", "bus.payload_store=redis"]
    arguments.append("learner.profile_steps=2")
    with jackpot_run(str(job_file), *arguments, "--run-dir", str(directory), directory=directory) as run:
        code, stdout, stderr = run.finish()
    assert code == 0, stderr
    assert_ledger_adds_up(run.summary, trained=6)
    assert "succeeded after 3 steps" in stdout
    assert not (directory / "export" / "actor").exists()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness/max"] for row in rows] == [0, 0, 0]
    # Sampled and scored by the same weights, so that only rounding is between the two.
    assert max(abs(row["rollout_corr/kl"]) for row in rows) < 1e-4
    trace = json.loads((directory / "profile" / "steps-2-3-rank0.json").read_text())
    assert [event["name"] for event in trace["traceEvents"]].count("Optimizer.step#AdamW.step") == 2


def test_a_job_whose_learner_scores_runs_no_scorer(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model)
    directory = tmp_path / "run"
    arguments = ["scorer.reuse_reference=true", "learner.steps=6", "--run-dir", str(directory)]
    with jackpot_run(str(job_file), *arguments, directory=directory) as run:
        code, stdout, stderr = run.finish()
    assert code == 0, stderr
    assert "succeeded after 6 steps" in stdout
    logs = {path.stem for path in (directory / "logs").glob("*.log")}
    assert logs == {"learner", "rollout-0", "evaluator", "orchestrator"}
    assert set(run.summary["services"]) == {"learner-0", "rollout-0", "rollout-evaluator", "orchestrator-0"}
    assert_ledger_adds_up(run.summary, trained=12)
    assert run.summary["ledger"]["dropped"] == {} and run.summary["restarts"] == 0
    assert_mirror_agrees(run)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["staleness/max"] for row in rows) <= 1
    assert all(0 < row["rollout_corr/obrs_acceptance_rate"] < 1 for row in rows)  # the learner's own scores
    assert {row["rollout_corr/obrs_lambda"] for row in rows} == {1.0}
    accuracies = [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]
    assert (accuracies[0]["step"], accuracies[-1]["step"]) == (0, 6)
    assert run.summary["policy_accuracy"]["final"] == accuracies[-1]["policy_accuracy"]
    assert not list((directory / "payloads").rglob("*.bin"))


@pytest.mark.slow
def test_corrections_are_compared_on_one_seed(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, steps=2)
    text = io.StringIO()
    overrides = ["seed=7", "evaluation.prompts=4", "evaluation.every=1"]
    comparison = compare(job_file, overrides, tmp_path / "compared", Console(file=text, width=160))
    assert list(comparison["runs"]) == ["on-policy", "none", "tis", "jackpot"]
    for method, summary in comparison["runs"].items():
        assert summary["state"] == "succeeded", summary
        assert_ledger_adds_up(summary, trained=4)
        job = json.loads((tmp_path / "compared" / method / "job.json").read_text())
        assert job["seed"] == comparison["seed"] == 7
        assert job["algorithm"]["correction"]["name"] == {"on-policy": "none"}.get(method, method)
    # The same first batch wherever the same actor samples, though sampling overlaps training; the same prompts always.
    first = {method: sampled_tokens(tmp_path / "compared" / method, 0) for method in comparison["runs"]}
    assert len(first["jackpot"]) == 4
    assert first["none"] == first["tis"] == first["jackpot"]
    assert [prompt for _, prompt, _ in first["on-policy"]] == [prompt for _, prompt, _ in first["jackpot"]]
    assert first["on-policy"] != first["jackpot"]
    # The same policy, asked the same questions before any training.
    assert len({summary["policy_accuracy"]["initial"] for summary in comparison["runs"].values()}) == 1
    assert json.loads((tmp_path / "compared" / "comparison.json").read_text()) == comparison
    assert (tmp_path / "compared" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_interrupting_the_warm_up_leaves_no_half_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "cache" / "models"
    job_file = Path(__file__).parents[2] / "examples" / "demo.yaml"
    with jackpot_run(str(job_file), "--run-dir", str(tmp_path / "run"), directory=tmp_path / "run") as run:
        run.wait_until(lambda: any(models.glob(".complement-*")), "the warm-up to begin")
        run.process.send_signal(signal.SIGINT)
        code, stdout, stderr = run.finish()
    assert code == 130 and stdout == "" and "Traceback" not in stderr
    assert [path.suffix for path in models.iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()


BAD_INPUT = {
    "unknown key": (["learner.stepps=3"], "learner.stepps", "steps"),
    "wrong type": (["learner.steps=many"], "learner.steps", "number"),
    "unknown task": (["task.name=complemnt"], "task.name", "complement"),
    "truncated sampling": (["sampling.top_p=0.9"], "sampling.top_p", "temperature"),
    "not a model": (["policy.model=/nowhere"], "policy.model", "directory"),
    "too long for the model": (["sampling.max_tokens=128"], "sampling.max_tokens", "at most"),
    "no address": (["bus.url=localhost:6379"], "bus.url", "redis://host:port"),
    "empty dataset": (["task.name=jsonl", "task.params={path: empty.jsonl}"], "task.params.path", "empty"),
    "not a task": (["task.name=python:json:dumps"], "task.params", "factory(params, seed)"),
    "unknown reward": (["task.name=jsonl", "task.params={path: one.jsonl, reward: exactly}"], "reward", "exact_match"),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=str)
def test_bad_input_is_refused_before_any_process_starts(tmp_path: Path, make_model: MakeModel, case: str) -> None:
    overrides, field, remedy = BAD_INPUT[case]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}')
    job_file = write_job(tmp_path, make_model)
    finished = subprocess.run(
        [*JACKPOT, "run", str(job_file), *overrides, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert finished.returncode == 2, finished.stderr
    assert field in finished.stderr and remedy in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_models_of_different_vocabularies_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model)
    other = tmp_path / "other"
    other.mkdir()
    for source in make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1).iterdir():
        text = source.read_bytes()
        (other / source.name).write_bytes(
            text.replace(b'"a":', b'"\xc3\xa4":') if source.name == "tokenizer.json" else text
        )
    arguments = [*JACKPOT, "run", str(job_file), f"actor.model={other}", "--run-dir", str(tmp_path / "run")]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert finished.returncode == 2
    assert "actor.model" in finished.stderr and "vocabulary" in finished.stderr
    (other / "tokenizer.json").unlink()
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert finished.returncode == 2 and "holds no tokenizer.json" in finished.stderr
