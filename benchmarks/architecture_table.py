"""How far every service is from plain transformers, for every architecture, before and after changes of weights.

For each architecture a tiny random model samples a few groups, the scorer scores them, the learner trains on them,
publishes, and all load what it published; then a damaged version is offered. Each log-probability is compared with that
of the model loaded by transformers alone, one sequence at a time. A cell is the greatest difference in nats, or the
reason of a refusal.

    python benchmarks/architecture_table.py --vllm .venv-vllm/bin/python --output benchmarks/results/architectures.json
    python benchmarks/architecture_table.py --table benchmarks/results/architectures.json   # for docs/models.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jackpot.config import JobSpec, ModelConfig, RolloutConfig, parse_job
from jackpot.errors import JackpotError
from jackpot.rollout.engine import GroupRequest, RolloutEngine, Sampling
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import Group, Trajectory

PROMPT_LENGTHS = (1, 9, 4, 30)
GROUP_SIZE = 2
MAX_TOKENS = 12
TOP_LOGPROBS = 8
BOUND = 1e-4
CELLS = (
    "engine",
    "engine, new version",
    "engine, refused version",
    "vLLM",
    "vLLM, new version",
    "vLLM, refused version",
    "scorer",
    "scorer, new version",
    "learner, packed",
    "learner, unpacked",
)


# --- what is measured against ---


def plain_logprobs(model_dir: Path, trajectories: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> list[NDArray[Any]]:
    """log p of the sampled tokens by transformers alone, each sequence in a pass of its own, [T] each.

    Args:
        model_dir: a directory in Hugging Face format.
        trajectories: prompt [P] and sampled tokens [T].
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for prompt, tokens in trajectories:
        ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits.double(), -1).gather(1, ids[len(prompt) :, None])[:, 0].numpy())
    return found


def difference(model_dir: Path, sampled: Sequence[Trajectory], logprobs: Sequence[NDArray[Any]]) -> float:
    """The greatest |difference| in nats."""
    expected = plain_logprobs(model_dir, [(prompt_of(t), t.token_ids) for t in sampled])
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, logprobs, strict=True))


# --- the same questions to every engine ---


def requests() -> list[GroupRequest]:
    """Groups whose prompts have different lengths."""
    made = []
    for index, length in enumerate(PROMPT_LENGTHS):
        ids = np.random.default_rng(index).integers(3, 64, length).astype(np.uint32)
        sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS, top_logprobs=TOP_LOGPROBS, seed=7 + index)
        made.append(
            GroupRequest(group_id=f"g{index}", prompt_token_ids=ids, num_trajectories=GROUP_SIZE, sampling=sampling)
        )
    return made


PROMPTS = {request.group_id: request.prompt_token_ids for request in requests()}


def prompt_of(trajectory: Trajectory) -> NDArray[np.uint32]:
    """The prompt that it continues."""
    return PROMPTS[trajectory.trajectory_id.partition("#")[0]]


async def sample(engine: RolloutEngine) -> list[Trajectory]:
    """All requests at once."""
    groups = await asyncio.gather(*(engine.generate(request) for request in requests()))
    return [trajectory for group in groups for trajectory in group]


async def is_refused(engine: RolloutEngine, version: int, directory: Path, probe: WeightProbe | None) -> bool:
    """Whether a version is refused."""
    try:
        await engine.load_weights(version, directory, probe)
    except JackpotError:
        return True
    return False


@dataclass(frozen=True)
class Versions:
    """The directories of one architecture: model, the version that the learner published, and that version damaged."""

    model: Path
    published: Path | None = None
    damaged: Path | None = None
    exported: Path | None = None  # what transformers alone reads of the published version
    manifest: Path | None = None  # metadata of the published version, with its probe

    @property
    def probe(self) -> WeightProbe | None:
        """What the published version must give."""
        if self.manifest is None:
            return None
        return WeightProbe.from_metadata(json.loads(self.manifest.read_text(encoding="utf-8")))


def transformers_engine(model_dir: Path) -> RolloutEngine:
    """As the rollout service makes it."""
    from jackpot.compute.model_loading import load_causal_lm
    from jackpot.rollout.transformers.decode_check import check_decoding
    from jackpot.rollout.transformers.engine import TransformersEngine

    model = load_causal_lm(model_dir, "float32", "cpu", field="policy.model")
    check_decoding(model, field="policy.model")
    return TransformersEngine(model, max_batch_size=64, max_queue=256)


def vllm_engine(model_dir: Path) -> RolloutEngine:
    """As the rollout service makes it."""
    from jackpot.rollout.vllm.launch import create_vllm_engine

    config, rollout = ModelConfig(model=str(model_dir)), RolloutConfig(max_batch_size=16)
    return create_vllm_engine(config, rollout, 1, field="policy.model", on_tokens=lambda count: None)


async def engine_cells(name: str, start: Callable[[Path], RolloutEngine], versions: Versions) -> dict[str, Any]:
    """An engine's three cells."""
    cells: dict[str, Any] = {}
    try:
        engine = start(versions.model)
    except JackpotError as error:
        return {name: refusal(error)}
    try:
        cells[name] = compared(versions.model, await sample(engine))
        if versions.published is None or versions.exported is None or versions.damaged is None:
            return cells
        await engine.load_weights(1, versions.published, versions.probe)
        cells[f"{name}, new version"] = compared(versions.exported, await sample(engine))
        if not await is_refused(engine, 2, versions.damaged, versions.probe):
            return cells | {f"{name}, refused version": "a damaged version was taken"}
        cells[f"{name}, refused version"] = compared(versions.exported, await sample(engine))
    except JackpotError as error:
        cells[f"{name}, new version"] = refusal(error)
    finally:
        await engine.close()
    return cells


def compared(model_dir: Path, sampled: Sequence[Trajectory]) -> float:
    """What the engine recorded against plain transformers."""
    return difference(model_dir, sampled, [trajectory.actor_logprobs for trajectory in sampled])


def refusal(error: JackpotError) -> str:
    """One line of an error, without the value that it names: that is a temporary directory or the row's own."""
    return re.sub(r" = '[^']*'", "", " ".join(str(error).split()))


# --- scorer and learner ---


def job_of(model_dir: Path, packing: str = "auto") -> JobSpec:
    """A job on this model, whose learner makes the scores."""
    return parse_job(
        {
            "policy": {"model": str(model_dir)},
            "actor": "policy",
            "task": {"name": "complement"},
            "sampling": {"max_tokens": MAX_TOKENS, "group_size": GROUP_SIZE},
            "rollout": {"top_logprobs": TOP_LOGPROBS},
            "learner": {"steps": 1, "groups_per_batch": len(PROMPT_LENGTHS), "lr": 0.02, "packing": packing},
            "scorer": {"reuse_reference": True},
        }
    )


def groups_of(sampled: Sequence[Trajectory]) -> list[Group]:
    """Trajectories as the bus would bring them; every other one earns a reward."""
    return [
        Group(
            group_id=group_id,
            prompt_index=index,
            prompt_token_ids=prompt,
            trajectories=tuple(
                replace(t, reward=float(i % 2))
                for i, t in enumerate(sampled)
                if t.trajectory_id.partition("#")[0] == group_id
            ),
            temperature=1.0,
            dispatch_version=0,
        )
        for index, (group_id, prompt) in enumerate(PROMPTS.items())
    ]


def scorer_cells(versions: Versions, sampled: Sequence[Trajectory]) -> dict[str, Any]:
    """The scorer's two cells."""
    from jackpot.loop_parts import Target
    from jackpot.scorer.target import HeldPolicy, PendingWeights
    from jackpot.scoring.group_scorer import GroupScorer

    def scores(held: HeldPolicy) -> list[NDArray[Any]]:
        scored = GroupScorer(job, Target(held.model, 1.0, 0)).score_groups(groups_of(sampled))
        return [of.target_logprobs for group in scored for of in group.scores]

    job = job_of(versions.model)
    try:
        held = HeldPolicy(job.policy, "cpu")
        cells: dict[str, Any] = {"scorer": difference(versions.model, sampled, scores(held))}
        if versions.published is not None and versions.exported is not None:
            held.apply(PendingWeights(1, 1.0, versions.published, held.read(versions.published), 0.0))
            cells["scorer, new version"] = difference(versions.exported, sampled, scores(held))
    except JackpotError as error:
        return {"scorer": refusal(error)}
    return cells


def learner_cells(versions: Versions, sampled: Sequence[Trajectory], run_dir: Path) -> tuple[dict[str, Any], Versions]:
    """The learner's two cells, and what it published after a step."""
    from jackpot.compute.model_loading import load_causal_lm
    from jackpot.learner.publishing.publisher import WeightPublisher
    from jackpot.learner.trainer import Trainer
    from jackpot.loop_parts import Target, WeighedTokens
    from jackpot.scoring.batch import build_batch
    from jackpot.scoring.group_scorer import GroupScorer
    from jackpot.storage.weights import WeightStore

    cells: dict[str, Any] = {}
    for packing in ("never", "always"):
        name = "learner, packed" if packing == "always" else "learner, unpacked"
        job = job_of(versions.model, packing)
        try:
            policy = load_causal_lm(versions.model, "float32", "cpu", field="policy.model")
            scored = GroupScorer(job, Target(policy, 1.0, 0)).score_groups(groups_of(sampled))
            trainer = Trainer(job, policy, None)
            shown: list[WeighedTokens] = []
            trainer.show_tokens = lambda batch, weights: shown.append(WeighedTokens(batch, weights))  # noqa: B023
            trainer.train_batch(build_batch(scored, job.algorithm.advantage), 0)
        except JackpotError as error:
            cells[name] = refusal(error)
            continue
        found = [shown[0].of(trajectory).target_logprobs.numpy() for trajectory in sampled]
        cells[name] = difference(versions.model, sampled, found)
        if versions.published is None:
            store = WeightStore(run_dir / "weights")
            publisher = WeightPublisher(job, store, run_dir, lambda: ())
            publisher.publish(publisher.snapshot(trainer, 1))
            publisher.export(trainer)
            published = store.open("policy", 1)
            manifest = run_dir / "metadata.json"
            manifest.write_text(json.dumps(dict(store.manifest("policy", 1).metadata)), encoding="utf-8")
            versions = replace(
                versions,
                published=published,
                exported=run_dir / "export" / "policy",
                damaged=damage(published, run_dir / "damaged"),
                manifest=manifest,
            )
    return cells, versions


def damage(published: Path, directory: Path) -> Path:
    """A copy of a version in which every matrix has its rows in reverse: its names, shapes and norms are right."""
    shutil.copytree(published, directory)
    for path in directory.glob("*.safetensors"):
        tensors = {name: t.flip(0).contiguous() if t.dim() > 1 else t for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


# --- one architecture ---


def measure(model_type: str, directory: Path, vllm_python: str | None) -> dict[str, Any]:
    """All cells of an architecture."""
    from tiny_architectures import left_out, tiny_config, write_model

    if reason := left_out(model_type):
        return {"left out": reason}
    versions = Versions(write_model(tiny_config(model_type), directory / "model"))
    try:
        sampled = asyncio.run(_sample_once(versions.model))
    except JackpotError as error:
        cells = {"engine": refusal(error)}
        return cells | (_vllm_cells(versions, vllm_python) if vllm_python else {})
    cells, versions = learner_cells(versions, sampled, directory)
    cells |= asyncio.run(engine_cells("engine", transformers_engine, versions))
    cells |= scorer_cells(versions, sampled)
    return cells | (_vllm_cells(versions, vllm_python) if vllm_python else {})


async def _sample_once(model_dir: Path) -> list[Trajectory]:
    engine = transformers_engine(model_dir)
    try:
        return await sample(engine)
    finally:
        await engine.close()


def _vllm_cells(versions: Versions, python: str) -> dict[str, Any]:
    """vLLM lives in an environment, and a process, of its own."""
    paths = [str(getattr(versions, field.name) or "") for field in fields(Versions)]
    try:
        ended = subprocess.run(
            [python, __file__, "--vllm-worker", *paths], capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return {"vLLM": "took longer than 300 s"}
    for line in ended.stdout.splitlines():
        if line.startswith("CELLS "):
            cells: dict[str, Any] = json.loads(line.removeprefix("CELLS "))
            return cells
    return {"vLLM": f"ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}"}


# --- the table ---


def as_markdown(results: dict[str, Any]) -> str:
    """The table of docs/models.md."""
    lines = ["| architecture | " + " | ".join(CELLS) + " |", "| --- |" + " --- |" * len(CELLS)]
    refused: list[str] = []
    for model_type, cells in results["architectures"].items():
        if "left out" in cells:
            continue
        texts = []
        for name in CELLS:
            value = cells.get(name)
            if isinstance(value, str):
                refused.append(f"- `{model_type}`, {name}: {value}")
            texts.append("" if value is None else "refused" if isinstance(value, str) else f"{value:.0e}")
        lines.append(f"| `{model_type}` | " + " | ".join(texts) + " |")
    left = [
        f"- `{name}` {cells['left out']}" for name, cells in results["architectures"].items() if "left out" in cells
    ]
    return "\n".join([*lines, "", "Refused:", "", *refused, "", "Not tried:", "", *left, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="transformers' names of architectures; all without it")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment with vLLM")
    parser.add_argument("--output", type=Path, help="where the results go, as JSON; rows of earlier runs are kept")
    parser.add_argument("--table", type=Path, help="only print a results file as Markdown")
    parser.add_argument("--vllm-worker", nargs=len(fields(Versions)), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(as_markdown(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.vllm_worker:
        versions = Versions(*(Path(path) if path else None for path in arguments.vllm_worker))  # type: ignore[arg-type]
        print("CELLS " + json.dumps(asyncio.run(engine_cells("vLLM", vllm_engine, versions))), flush=True)
        os._exit(0)
    _measure_all(arguments.only, arguments.vllm, arguments.output)


def _measure_all(only: Sequence[str] | None, vllm_python: str | None, output: Path | None) -> None:
    from tiny_architectures import model_types

    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "architectures": {},
    }
    if output is not None and output.exists():
        results["architectures"] = json.loads(output.read_text(encoding="utf-8"))["architectures"]
    for model_type in only or model_types():
        with tempfile.TemporaryDirectory() as directory:
            try:
                cells = measure(model_type, Path(directory), vllm_python)
            except (Exception, SafetensorError) as error:  # a gap of ours, and a row to be looked at
                cells = {"engine": f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        results["architectures"][model_type] = cells
        bad = [name for name, value in cells.items() if not isinstance(value, float) or not value < BOUND]
        print(f"{model_type:24}", {name: cells[name] for name in bad} or "good", flush=True)
        if output is not None:
            output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
