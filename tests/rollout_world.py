"""A run directory with published weights, and rollout servers as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from patience import PATIENCE_SECONDS

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import save_weights
from jackpot.config.environment import ServiceEnvironment
from jackpot.rpc.channel import open_channel, wait_ready
from jackpot.storage.durable_files import replace_synced
from jackpot.storage.weights import WeightStore
from jackpot.v1 import rollout_pb2


class RolloutWorld:
    """One job's directory: a policy, an actor and their weight versions, all tiny and random."""

    def __init__(self, run_dir: Path, make_model: Callable[..., Path], **rollout: Any) -> None:
        self.run_dir = run_dir
        self.store = WeightStore(run_dir / "weights")
        self._make_model = make_model
        run_dir.mkdir(parents=True, exist_ok=True)
        job = {
            "policy": {"model": str(make_model("qwen3"))},
            "actor": {"model": str(make_model("qwen3"))},
            "task": {"name": "complement"},
            "rollout": {"weight_poll_seconds": 0.02, **rollout},
        }
        (run_dir / "job.json").write_text(json.dumps(job))

    def publish(self, version: int, *, role: str = "actor", intact: bool = True) -> None:
        """Publish the weights of :meth:`model_dir`; with a flipped byte if they are not to be intact."""
        model = load_causal_lm(self.model_dir(version), "float32", "cpu")
        publish = self.store.publish if intact else partial(publish_damaged, self.run_dir / "weights")
        publish(role, version, lambda directory: save_weights(model, directory), {})

    def model_dir(self, version: int) -> Path:
        """The model that a version is."""
        return self._make_model("qwen3", seed=version % 4)

    def address(self, name: str) -> str:
        """Where the server ``name`` listens."""
        return f"unix:{self.run_dir}/{name}.sock"

    def start(self, name: str, *, role: str = "actor", **environment: Any) -> subprocess.Popen[bytes]:
        """Start a server."""
        settings = ServiceEnvironment.model_validate(
            {
                "run_dir": self.run_dir,
                "job_id": "rollout-test",
                "instance": name,
                "listen": self.address(name),
                "role": role,
                "threads": 1,
                **environment,
            }
        )
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "jackpot.rollout"],
                env={**os.environ, **settings.to_env(), "OMP_NUM_THREADS": "1"},
                stderr=log,
            )

    def log(self, name: str) -> str:
        """What the servers of that name have logged."""
        return self._log(name).read_text()

    def _log(self, name: str) -> Path:
        return self.run_dir / f"{name}.log"

    async def wait_ready(self, name: str, service: str = "readiness") -> None:
        """Return once the server answers health checks."""
        channel = open_channel(self.address(name))
        try:
            await wait_ready(channel, service, PATIENCE_SECONDS)
        finally:
            await channel.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM. Fails if the exit is not clean."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0


def publish_damaged(
    root: Path, role: str, version: int, write: Callable[[Path], None], metadata: Mapping[str, Any]
) -> None:
    """Publish a version that is damaged from its first moment on: whoever looks often never sees it intact."""
    aside = WeightStore(root / "aside").publish(role, version, write, metadata).path
    with (aside / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    aside.rename(root / role / aside.name)
    replace_synced(root / role / "LATEST", f"{version}\n", root / role / "LATEST.new")


async def refusal(stub: Any, version: int, expected: str = "refused") -> str:
    """What a client hears that waits for a version that the server does not have: what the server holds instead.

    Asked again, and with more time, until it is as expected: on a busy machine the server may not have looked yet, or
    the client's own clock may run out before the server's answer is there.
    """
    deadline, seconds = time.monotonic() + PATIENCE_SECONDS, 0.5
    while True:
        try:
            await stub.Generate(generate_request(min_version=version), timeout=seconds)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            details = str(error.details())
            if expected in details or time.monotonic() > deadline:
                return details
        else:
            raise AssertionError("a version that it cannot have was served")
        seconds = min(2 * seconds, 10.0)


async def generating(stub: Any, **sampling: Any) -> Any:
    """A call under way: its tokens are being sampled."""
    while True:
        call = stub.Generate(generate_request(5, **sampling), timeout=PATIENCE_SECONDS)
        while not call.done():  # or this process slept through it: another one, then
            status = rollout_pb2.RolloutServiceGetStatusRequest()
            if (await stub.GetStatus(status, timeout=PATIENCE_SECONDS)).num_running:
                return call


def generate_request(
    group: int = 0, *, n: int = 2, min_version: int = 0, **sampling: Any
) -> rollout_pb2.GenerateRequest:
    """A request with a random prompt of five tokens."""
    ids = np.random.default_rng(group).integers(3, 49, 5).astype("<u4")
    settings = {"temperature": 1.0, "max_tokens": 12, "top_logprobs": 5, "seed": group, **sampling}
    return rollout_pb2.GenerateRequest(
        group_id=f"job.s{group}.e0.p{group}.a0",
        prompt_token_ids=ids.tobytes(),
        num_trajectories=n,
        sampling=rollout_pb2.SamplingParams(**settings),
        min_version=min_version,
    )
