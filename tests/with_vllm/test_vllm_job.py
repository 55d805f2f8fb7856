"""Whole jobs with vLLM rollouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from job_world import assert_ledger_adds_up, assert_mirror_agrees, jackpot_run, write_job

from jackpot.process.processor import attends_in_8_bits

NUM_STEPS = 40


def test_a_job_outlives_the_kill_of_its_vllm_process(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    job_file = write_job(tmp_path, make_model, steps=NUM_STEPS, checkpoint_every=5)
    directory = tmp_path / "run"
    arguments = [str(job_file), "rollout.engine=vllm", "evaluation.every=20", "--run-dir", str(directory)]
    with jackpot_run(*arguments, directory=directory) as run:
        run.wait_for_step(6)
        rollout = run.child("rollout-0")
        assert rollout is not None
        (engine,) = rollout.children()
        engine.kill()
        killed_at = run.step
        code, _, stderr = run.finish(200)
    assert code == 0, stderr
    assert run.summary["state"] == "succeeded"
    assert run.summary["restarts_by_process"] == {"rollout-0": 1}
    assert_ledger_adds_up(run.summary, trained=2 * NUM_STEPS)
    assert_mirror_agrees(run)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(1, NUM_STEPS + 1))
    assert max(row["staleness/max"] for row in rows) <= 1
    log = (directory / "logs" / "rollout-0.log").read_text()
    assert "vLLM's engine process has died" in log
    # Its successor began where the job was, not at version 0.
    after = log[log.index("vLLM's engine process has died") :]
    first = next(line for line in after.splitlines() if "weights loaded" in line)
    assert int(first.split("version=")[1].split()[0]) >= killed_at - 1


def test_an_actor_that_is_the_policy_in_eight_bits_stays_close_to_it(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    job_file = write_job(tmp_path, make_model, steps=6)
    directory = tmp_path / "run"
    model = make_model("qwen3", seed=1)
    cache = "fp8" if attends_in_8_bits() else "auto"
    formats = ["dtype=bfloat16", "quantization=fp8_per_channel", f"kv_cache_dtype={cache}", "weights=policy"]
    formats.append("train=false")
    overrides = [f"actor.{setting}" for setting in (f"model={model}", *formats)]
    arguments = [str(job_file), "rollout.engine=vllm", "orchestrator.max_staleness=0", *overrides]
    with jackpot_run(*arguments, "--run-dir", str(directory), directory=directory) as run:
        code, _, stderr = run.finish(200)
    assert code == 0, stderr
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness/max"] for row in rows] == [0.0] * 6
    acceptance = [row["rollout_corr/obrs_acceptance_rate"] for row in rows]
    assert all(0.7 < rate < 1 for rate in acceptance)  # two random models that differ accept a third
    assert (directory / "export" / "actor" / "model.safetensors").read_bytes() == (
        directory / "export" / "policy" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_neox"])
def test_a_policy_that_samples_for_itself_accepts_its_own_tokens(
    tmp_path: Path, make_model: Callable[..., Path], architecture: str
) -> None:
    """Of a mixture of experts, and of a model that vLLM runs on its transformers backend."""
    steps = 4
    job_file = write_job(tmp_path, make_model, steps=steps)
    directory = tmp_path / "run"
    settings = ["actor=policy", "rollout.engine=vllm", "orchestrator.max_staleness=0", "evaluation.every=1000"]
    arguments = [str(job_file), f"policy.model={make_model(architecture, seed=1)}", *settings]
    with jackpot_run(*arguments, "--run-dir", str(directory), directory=directory) as run:
        code, _, stderr = run.finish()
    assert code == 0, stderr
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness/max"] for row in rows] == [0.0] * steps
    # min(1, p/p_inf), of log-probabilities that two kernels compute in float32.
    assert [row["rollout_corr/obrs_acceptance_rate"] for row in rows] == pytest.approx([1.0] * steps, abs=1e-4)
    assert "refused" not in (directory / "logs" / "rollout-0.log").read_text()
    held = [
        line for line in (directory / "logs" / "rollout-0.log").read_text().splitlines() if "weights loaded" in line
    ]
    assert held[-1].split("version=")[1].split()[0] >= str(steps - 1)


def test_a_job_whose_weights_are_broadcast(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    steps = 12
    job_file = write_job(tmp_path, make_model, steps=steps, checkpoint_every=5)
    directory = tmp_path / "run"
    arguments = [str(job_file), "rollout.engine=vllm", "weights.transport=gloo", "--run-dir", str(directory)]
    with jackpot_run(*arguments, directory=directory) as run:
        code, _, stderr = run.finish(250)
    assert code == 0, stderr
    assert_ledger_adds_up(run.summary, trained=2 * steps)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert max(row["staleness/max"] for row in rows) <= 1
    learner, rollout = ((directory / "logs" / f"{name}.log").read_text() for name in ("learner", "rollout-0"))
    sent = [line.split("version=")[1].split()[0] for line in learner.splitlines() if "weights broadcast" in line]
    received = [line.split("version=")[1].split()[0] for line in rollout.splitlines() if "weights received" in line]
    # All but those before the learner saw the replica: gRPC looks for a server again within two seconds.
    assert len(sent) >= steps // 2
    assert received == sent
    assert "was not broadcast" not in learner
