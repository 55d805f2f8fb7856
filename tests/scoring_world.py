"""A small world to score in: tiny random models, their weight versions, and groups really sampled from them.

Beside it, what the scores must be, computed the slow way: float64, one trajectory at a time, full log-softmax.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from patience import PATIENCE_SECONDS
from prometheus_client import CollectorRegistry
from tolerances import model_rounding
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from jackpot.compute.model_weights import save_weights
from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.scorer.engine import ScoringEngine
from jackpot.scorer.service import make_engine
from jackpot.storage.weights import WeightStore
from jackpot.telemetry import Metrics
from jackpot.trajectory import Group, GroupKey, Trajectory, VersionSpan

VOCABULARY = 97
SEED = 11  # of the job
Floats = NDArray[np.float64]

# Models this small gain nothing from threads, and lose much where threads wait for busy cores.
torch.set_num_threads(1)


def make_policy(seed: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A random policy; its output layer is tied to its embeddings."""
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, initializer_range=0.35,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def make_actor(seed: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A random actor, smaller than the policy and of another architecture."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class World:
    """Models, weight versions and a run directory."""

    run_dir: Path
    store: WeightStore
    policies: dict[int, PreTrainedModel]  # by weight version
    actors: dict[int, PreTrainedModel]

    def job(self, correction: Mapping[str, Any] | str = "jackpot", **settings: Any) -> JobSpec:
        """A job on this world's models; ``settings`` are whole sections."""
        return parse_job(
            {
                "policy": {"model": str(self.run_dir / "policy")},
                "actor": {"model": str(self.run_dir / "actor")},
                "task": {"name": "complement"},
                "seed": SEED,
                "algorithm": {"correction": correction},
                **settings,
            }
        )

    def environment(self, **values: Any) -> ServiceEnvironment:
        """A service's environment in this world's run directory."""
        return ServiceEnvironment(**{"run_dir": self.run_dir, "job_id": "job-1", **values})

    def engine(self, job: JobSpec) -> ScoringEngine:
        """A scorer's models, with no version loaded yet."""
        return make_engine(self.environment(), job, Metrics("job-1", CollectorRegistry()))

    def publish_policy(self, version: int, **metadata: Any) -> None:
        """Publish one more policy version."""
        model = self.policies[version] = make_policy(100 + version)
        self.store.publish("policy", version, lambda directory: save_weights(model, directory), metadata)

    def publish_actor(self, version: int, **metadata: Any) -> None:
        """Publish one more actor version."""
        model = self.actors[version] = make_actor(200 + version)
        self.store.publish("actor", version, lambda directory: save_weights(model, directory), metadata)

    def damage_policy(self, version: int) -> None:
        """Flip a bit in a published version."""
        path = self.store.manifest("policy", version).path / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def make_world(run_dir: Path, *, actor_versions: Sequence[int] = (0,)) -> World:
    """Random models, saved as directories; version 0 of the policy and the actor's versions are published."""
    logging.disable_progress_bar()
    world = World(run_dir, WeightStore(run_dir / "weights"), {}, {})
    make_policy(1).save_pretrained(run_dir / "policy")
    make_actor(2).save_pretrained(run_dir / "actor")
    world.publish_policy(0)
    for version in actor_versions:
        world.publish_actor(version)
    return world


_DOUBLES: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()


@torch.no_grad()
def full_logprobs(model: PreTrainedModel, prompt: Any, completion: Any, temperature: float) -> Floats:
    """log p ``[T, V]`` at every completion position, in float64."""
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))[None]
    if model not in _DOUBLES:
        _DOUBLES[model] = AutoModelForCausalLM.from_config(model.config, dtype=torch.float64).eval()
        _DOUBLES[model].load_state_dict(model.state_dict())
    logits = _DOUBLES[model](ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, dim=-1).numpy()


def sample_group(
    world: World,
    *,
    job_id: str = "job-1",
    slot: int = 0,
    lengths: Sequence[int] = (5, 3),
    prompt_length: int = 4,
    temperature: float = 1.0,
    top_k: int = 6,
    versions: Sequence[int] = (0,),
    dispatch_version: int = 0,
) -> Group:
    """A group with random completions, scored by the actor as if it had sampled them; its versions take turns."""
    rng = np.random.default_rng(1000 + slot)
    group_id = GroupKey(slot=slot, epoch=0, prompt_index=slot).group_id(job_id)
    prompt = rng.integers(0, VOCABULARY, prompt_length).astype(np.uint32)
    trajectories = []
    for index, length in enumerate(lengths):
        bounds = np.linspace(0, length, len(versions) + 1).astype(int).tolist()
        spans = tuple(
            VersionSpan(version, start, end)
            for version, start, end in zip(versions, bounds, bounds[1:], strict=False)
            if end > start
        )
        ids = rng.integers(0, VOCABULARY, length).astype(np.uint32)
        rows = actor_logprobs(world, prompt, ids, spans, temperature)
        order = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
        trajectories.append(
            Trajectory(
                trajectory_id=f"{group_id}#{index}",
                token_ids=ids,
                actor_logprobs=rows[np.arange(length), ids].astype(np.float32),
                topk_ids=order.astype(np.uint32),
                topk_logprobs=np.take_along_axis(rows, order, axis=1).astype(np.float16),
                version_spans=spans,
                finish_reason="stop",
                reward=float(index % 2),
            )
        )
    return Group(
        group_id=group_id,
        prompt_index=slot,
        prompt_token_ids=prompt,
        trajectories=tuple(trajectories),
        temperature=temperature,
        dispatch_version=dispatch_version,
    )


def actor_logprobs(world: World, prompt: Any, ids: Any, spans: Sequence[VersionSpan], temperature: float) -> Floats:
    """log p_inf ``[T, V]``, each position by the version that sampled it."""
    rows = np.zeros((len(ids), VOCABULARY))
    for span in spans:
        full = full_logprobs(world.actors[span.version], prompt, ids, temperature)
        rows[span.start : span.end] = full[span.start : span.end]
    return rows


def score_rounding(world: World, target_logprobs: Any) -> float:
    """How far two float32 computations of a score lie apart at most: log p by that of the policy's logits on 20 tokens;
    acceptance, masses and Z, at most one, by the relative error of exp(log p), which is the same."""
    return model_rounding(world.policies[0].config, 20, float(np.abs(target_logprobs).max()))


@dataclass(frozen=True)
class Expected:
    """One trajectory's scores as they must be."""

    target_logprobs: Floats
    acceptance_probs: Floats
    normalizer_head: Floats
    normalizer_tail: Floats
    topk_mass: Floats


def expected_scores(
    world: World,
    group: Group,
    trajectory: Trajectory,
    *,
    policy_version: int,
    normalizer: str,
    obrs_lambda: float,
    top_k: int,
) -> Expected:
    """Position by position, token by token, as the paper and the tail bound say it."""
    prompt, ids = group.prompt_token_ids, trajectory.token_ids
    target = np.exp(full_logprobs(world.policies[policy_version], prompt, ids, group.temperature))
    actor = np.exp(actor_logprobs(world, prompt, ids, trajectory.version_spans, group.temperature))
    sampled = np.arange(len(ids)), ids
    p_inf = np.exp(trajectory.actor_logprobs.astype(np.float64))
    seen_ids, seen_logprobs = trajectory.topk_ids, trajectory.topk_logprobs
    assert seen_ids is not None and seen_logprobs is not None
    seen_probs = np.exp(seen_logprobs.astype(np.float64))
    rows = [
        _normalizer(normalizer, target[t], actor[t], seen_ids[t].tolist(), seen_probs[t], obrs_lambda, top_k)
        for t in range(len(ids))
    ]
    head, tail, mass = np.array(rows).T
    return Expected(np.log(target[sampled]), np.minimum(1, target[sampled] / (obrs_lambda * p_inf)), head, tail, mass)


def _normalizer(
    name: str, target: Floats, actor: Floats, seen: list[int], seen_probs: Floats, obrs_lambda: float, top_k: int
) -> tuple[float, float, float]:
    if name == "full":
        return sum(min(p, q / obrs_lambda) for p, q in zip(actor, target, strict=True)), 0.0, 1.0
    target_only = [x for x in np.argsort(-target, kind="stable")[:top_k].tolist() if x not in seen]
    union = seen + target_only
    mass = sum(target[x] for x in union)
    if name in ("union_kappa", "union_tail"):
        head = sum(min(actor[x], target[x] / obrs_lambda) for x in union)
        rest = min(1 - sum(actor[x] for x in union), (1 - mass) / obrs_lambda)
        return head, rest if name == "union_tail" else 0.0, mass
    head = sum(min(p, target[x] / obrs_lambda) for x, p in zip(seen, seen_probs, strict=True))
    bound = sum(min(seen_probs.min(), target[x] / obrs_lambda) for x in target_only) + (1 - mass) / obrs_lambda
    return head, max(0.0, min(1 - seen_probs.sum(), bound)), mass


async def until(condition: Callable[[], Awaitable[Any]], what: str, timeout_seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true answer of ``condition``; fails loudly if there is none in time."""
    deadline = time.monotonic() + timeout_seconds
    while not (answer := await condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_seconds:g} s for {what}")
        await asyncio.sleep(0.02)
    return answer
