"""Tokens per second of vLLM: directly, through our engine, and through gRPC; log-probabilities flat and as dicts;
one request with n against n requests; batch sizes.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py --json figures.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from vllm_models import random_model

from jackpot.config import ModelConfig, RolloutConfig
from jackpot.rollout.vllm.launch import is_cpu_build, prepare_environment, start_vllm

PROMPT_TOKENS, N, BURST = 16, 8, 16


def prompt(index: int, vocabulary: int) -> np.ndarray:
    """A random prompt."""
    return np.random.default_rng(index).integers(3, vocabulary, PROMPT_TOKENS).astype(np.uint32)


async def directly(
    llm: Any, num_groups: int, max_tokens: int, k: int | None, *, flat: bool = True, split: bool = False, n: int = N
) -> float:
    """Tokens per second of AsyncLLM itself; ``split`` sends n requests instead of one with n."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    vocabulary = llm.vllm_config.model_config.get_vocab_size()
    started = time.monotonic()

    async def one(index: int, part: int) -> int:
        params = SamplingParams(
            n=1 if split else n,
            seed=1000 * index + part,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=k,
            flat_logprobs=flat,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        total = 0
        name = f"{started}-{index}-{part}"
        async for output in llm.generate(tokens_input(prompt(index, vocabulary).tolist()), params, name):
            total = sum(len(completion.token_ids) for completion in output.outputs)
        return total

    parts = range(n if split else 1)
    totals = await asyncio.gather(*(one(index, part) for index in range(num_groups) for part in parts))
    return sum(totals) / (time.monotonic() - started)


async def through_engine(engine: Any, num_groups: int, max_tokens: int, k: int) -> float:
    """Tokens per second through our engine: arrays instead of lists."""
    from jackpot.rollout.engine import GroupRequest, Sampling

    started = time.monotonic()
    requests = [
        GroupRequest(
            group_id=f"bench.s{index}.e0.p{index}.a0",
            prompt_token_ids=prompt(index, engine.limits.vocab_size),
            num_trajectories=N,
            sampling=Sampling(temperature=1.0, max_tokens=max_tokens, top_logprobs=k, seed=index),
        )
        for index in range(num_groups)
    ]
    groups = await asyncio.gather(*(engine.generate(request) for request in requests))
    return sum(t.num_tokens for group in groups for t in group) / (time.monotonic() - started)


async def client(address: str, vocabulary: int, num_groups: int, max_tokens: int, k: int) -> float:
    """Tokens per second as a client sees them."""
    from jackpot.rpc.channel import open_channel
    from jackpot.rpc.proto import trajectory_from_proto
    from jackpot.v1 import rollout_pb2, rollout_pb2_grpc

    channel = open_channel(address)
    stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
    await stub.GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=60, wait_for_ready=True)
    sampling = {"temperature": 1.0, "max_tokens": max_tokens, "top_logprobs": k}
    requests = [
        rollout_pb2.GenerateRequest(
            group_id=f"bench.s{index}.e0.p{index}.a0",
            prompt_token_ids=prompt(index, vocabulary).tobytes(),
            num_trajectories=N,
            sampling=rollout_pb2.SamplingParams(seed=index, **sampling),
        )
        for index in range(num_groups)
    ]
    started = time.monotonic()
    answers = await asyncio.gather(*(stub.Generate(request, timeout=600) for request in requests))
    total = sum(trajectory_from_proto(message).num_tokens for answer in answers for message in answer.trajectories)
    seconds = time.monotonic() - started
    await channel.close()
    return total / seconds


async def through_grpc(engine: Any, num_groups: int, max_tokens: int, k: int) -> float:
    """Tokens per second through our server, from a client in a process of its own."""
    from prometheus_client import CollectorRegistry

    from jackpot.rollout.servicer import SERVICE_NAME, RolloutServicer
    from jackpot.rollout.weight_follower import WeightFollower
    from jackpot.rpc.server import create_server
    from jackpot.storage.weights import WeightStore
    from jackpot.telemetry import Metrics
    from jackpot.telemetry.activity import Activity
    from jackpot.v1 import rollout_pb2_grpc

    with tempfile.TemporaryDirectory() as directory:
        follower = WeightFollower(engine, WeightStore(Path(directory)), "actor", 1.0)

        def register(server: Any) -> None:
            activity = Activity(Metrics("benchmark", CollectorRegistry()), "rollout", "0")
            servicer = RolloutServicer(engine, follower, "actor", activity)
            rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

        address = f"unix:{directory}/rollout.sock"
        server = create_server(address, register, [SERVICE_NAME])
        await server.start()
        arguments = [address, engine.limits.vocab_size, num_groups, max_tokens, k]
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--client", *map(str, arguments), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        await server.stop()
        return float(output)


async def measure(llm: Any, counts: Any, model: Path, quick: bool, batches: list[int]) -> dict[str, Any]:
    """All figures."""
    from jackpot.rollout.vllm.engine import VllmEngine

    engine = VllmEngine(llm, counts, eos_ids=(), max_queue=4096)
    await engine.load_weights(0, model)
    # More than run at once, as in a job: while some decode, others are answered.
    groups, tokens = (32, 32) if quick else (96, 64)
    await directly(llm, groups, tokens, 20)  # warm up
    figures: dict[str, Any] = {"device": platform.processor() or platform.machine(), "cpu_build": is_cpu_build()}
    rounds = []
    for _ in range(1 if quick else 5):
        rounds.append(
            {
                "direct": await directly(llm, groups, tokens, 20),
                "engine": await through_engine(engine, groups, tokens, 20),
                "grpc": await through_grpc(engine, groups, tokens, 20),
                # All of one size and running at once: they end together, and so do the answers.
                "burst_direct": await directly(llm, BURST, tokens, 20),
                "burst_grpc": await through_grpc(engine, BURST, tokens, 20),
            }
        )
    figures["grpc_tax"] = rounds
    medians = {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}
    best = {name: max(r[name] for r in rounds) for name in rounds[0]}
    shares = {
        "grpc": [r["grpc"] / r["direct"] for r in rounds],
        "burst": [r["burst_grpc"] / r["burst_direct"] for r in rounds],
    }
    figures["medians"] = medians | {
        "best_grpc_share": best["grpc"] / best["direct"],
        "median_grpc_share": float(np.median(shares["grpc"])),
        "median_burst_share": float(np.median(shares["burst"])),
        "best_burst_share": best["burst_grpc"] / best["burst_direct"],
    }
    print(json.dumps(figures["medians"]), file=sys.stderr, flush=True)
    figures["table"] = []
    for batch in batches:
        for k in (None, 0, 8, 20):
            for flat in (True, False):
                for split in (False, True):
                    if (k is None and not flat) or (split and not flat):
                        continue
                    # The best of three: a neighbour on the machine only ever takes away.
                    n, groups = min(N, batch), max(1, batch // N)
                    rates = [await directly(llm, groups, tokens, k, flat=flat, split=split, n=n) for _ in range(3)]
                    rate = max(rates)
                    row = {"batch": batch, "k": k, "flat": flat, "split": split, "tokens_per_second": rate}
                    figures["table"].append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    await engine.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1m")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "jackpot-benchmark-models")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 32, 64, 128, 256])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--client", nargs=5)
    arguments = parser.parse_args()
    if arguments.client:
        address, *numbers = arguments.client
        print(asyncio.run(client(address, *map(int, numbers))))
        return
    prepare_environment(1, is_cpu_build())
    from jackpot.rollout.vllm.stats import EngineCounts

    counts = EngineCounts(lambda num_tokens: None)
    model = random_model(arguments.models, arguments.shape)
    llm = start_vllm(
        ModelConfig(model=str(model)), RolloutConfig(max_batch_size=256, max_queue=4096), counts, on_cpu=is_cpu_build()
    )
    figures = asyncio.run(measure(llm, counts, model, arguments.quick, arguments.batches))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
