"""vLLM engines that tests share. Starting one costs many seconds, so each serves many tests, on a loop of its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from patience import PATIENCE_SECONDS

from jackpot.config import ModelConfig, RolloutConfig
from jackpot.rollout.engine import EngineStatus, GroupRequest, ModelLimits
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import Trajectory

Result = TypeVar("Result")


class EngineThread:
    """A thread with an event loop that vLLM engines live on: a test's own loop ends with the test.

    Engines are forked from this thread, which has to live as long as they do.
    """

    def __init__(self) -> None:
        from jackpot.rollout.vllm.launch import prepare_environment

        prepare_environment(threads=1, on_cpu=True)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Coroutine[Any, Any, Result]], timeout: float = PATIENCE_SECONDS) -> Result:
        """The result of work done there."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(timeout)

    def start(
        self,
        config: ModelConfig,
        rollout: RolloutConfig,
        extension: str | None = None,
        vocabulary: int | None = None,
    ) -> SharedVllm:
        """A running vLLM."""

        async def start() -> SharedVllm:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vLLM's imports warn
                from jackpot.rollout.vllm.launch import start_vllm
                from jackpot.rollout.vllm.stats import EngineCounts

                counts = EngineCounts(lambda num_tokens: None)
                llm = start_vllm(config, rollout, counts, on_cpu=True, extension=extension, vocabulary=vocabulary)
            return SharedVllm(self, llm, counts, Path(config.model))

        return self.run(start)


class SharedVllm:
    """One running vLLM, behind as many engines as there are tests."""

    def __init__(self, thread: EngineThread, llm: Any, counts: Any, model_dir: Path) -> None:
        self.thread = thread
        self.llm = llm
        self.counts = counts
        self._model_dir = model_dir

    def engine(self, max_queue: int = 256, endless: bool = False, owned: bool = False) -> EngineElsewhere:
        """A new engine that holds the model directory's weights."""
        from jackpot.rollout.vllm.engine import VllmEngine
        from jackpot.rollout.vllm.launch import eos_token_ids

        async def make() -> VllmEngine:
            eos_ids = () if endless else eos_token_ids(self._model_dir)
            engine = VllmEngine(self.llm, self.counts, eos_ids=eos_ids, max_queue=max_queue, owned=owned)
            await engine.load_weights(0, self._model_dir)
            await self.llm.update_weight_version("default")
            engine.version = -1
            return engine

        return EngineElsewhere(self.thread, self.thread.run(make))

    def close(self) -> None:
        """End vLLM's process."""
        from jackpot.rollout.vllm.engine import VllmEngine

        async def close() -> None:
            await VllmEngine(self.llm, self.counts, eos_ids=(), max_queue=1).close()

        self.thread.run(close)
        self.llm = None
        gc.collect()  # now, and not when the interpreter is half gone


class EngineElsewhere:
    """An engine on the engine thread's loop, for use from a test's."""

    name = "vllm"

    def __init__(self, thread: EngineThread, engine: Any) -> None:
        self.thread = thread
        self.engine = engine

    @property
    def receiver(self) -> Any:
        return self.engine.receiver

    @property
    def version(self) -> int:
        return int(self.engine.version)

    @property
    def limits(self) -> ModelLimits:
        limits: ModelLimits = self.engine.limits
        return limits

    def check(self, request: GroupRequest) -> None:
        self.engine.check(request)

    async def generate(self, request: GroupRequest) -> list[Trajectory]:
        return await self._there(self.engine.generate(request))

    async def load_weights(self, version: int, directory: Path, probe: WeightProbe | None = None) -> None:
        await self._there(self.engine.load_weights(version, directory, probe))

    def status(self) -> EngineStatus:
        status: EngineStatus = self.engine.status()
        return status

    async def wait_failed(self) -> None:
        await self._there(self.engine.wait_failed())

    async def close(self) -> None:
        await self._there(self.engine.close())

    async def _there(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.thread.loop))
