"""The production engine: vLLM's AsyncLLM behind our interface, on GPUs or on CPU."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from jackpot.config.vllm import OTHER_TEMPERATURE, temperature_problem
from jackpot.errors import ConfigError, EngineError, QueueFullError, WeightCorruptError
from jackpot.rollout.engine import EngineStatus, GroupRequest, ModelLimits, check_request
from jackpot.rollout.vllm.outputs import NO_VERSION, trajectory_from_output
from jackpot.rollout.vllm.receiver import VllmReceiver
from jackpot.rollout.vllm.stats import EngineCounts
from jackpot.rollout.vllm.vocabulary import SETTING
from jackpot.rollout.vllm.weight_swap import WeightSwap
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import GroupKey, Trajectory

LOG = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 0.25
_POLL_SECONDS = 0.01
_HEALTH_SECONDS = 0.2
_STOPPED = "the engine has stopped. Send the request to another replica."


class VllmEngine:
    """Implements :class:`jackpot.rollout.engine.RolloutEngine` on vLLM. Use from one event loop.

    Args:
        llm: from :func:`jackpot.rollout.vllm.launch.start_vllm`.
        counts: filled by its scheduler.
        eos_ids: tokens that end every trajectory.
        max_queue: trajectories in the engine, running or waiting, before it refuses more.
        owned: whether :meth:`close` ends vLLM's processes as well.
    """

    name = "vllm"

    def __init__(
        self, llm: AsyncLLM, counts: EngineCounts, *, eos_ids: Sequence[int], max_queue: int, owned: bool = True
    ) -> None:
        self.version = NO_VERSION
        model = llm.vllm_config.model_config
        additional: Any = llm.vllm_config.additional_config
        vocabulary = min(model.get_vocab_size(), additional.get(SETTING, model.get_vocab_size()))
        self.limits = ModelLimits(vocab_size=vocabulary, max_positions=model.max_model_len)
        self._llm = llm
        self._counts = counts
        self._tokens_before = counts.tokens_generated
        self._eos_ids = tuple(eos_ids)
        self._max_queue = max_queue
        self._owned = owned
        self._num_open = 0
        self._running: set[asyncio.Task[Any]] = set()
        self._request_numbers = itertools.count()
        self._swapping = asyncio.Lock()
        self._dropped: set[asyncio.Task[Any]] = set()
        self._weights = WeightSwap(llm, self._drop_running)
        self.receiver = VllmReceiver(llm, self._swapping, self._swap, lambda: self.version)
        self._closed = False

    def check(self, request: GroupRequest) -> None:
        """See :class:`RolloutEngine`."""
        check_request(request, self.limits, self._max_queue)
        temperature = request.sampling.temperature
        if (problem := temperature_problem(temperature)) is not None:
            raise ConfigError("sampling.temperature", temperature, problem, OTHER_TEMPERATURE)

    async def generate(self, request: GroupRequest) -> list[Trajectory]:
        """See :class:`RolloutEngine`."""
        self.check(request)
        self._require_running()
        if self._num_open + request.num_trajectories > self._max_queue:
            raise QueueFullError(RETRY_AFTER_SECONDS)
        self._num_open += request.num_trajectories
        work = asyncio.create_task(self._sample(request))
        self._running.add(work)
        try:
            return await work
        except asyncio.CancelledError:
            work.cancel()
            if self._closed:
                raise EngineError(_STOPPED) from None
            if work in self._dropped:
                raise EngineError("the weights it was sampled with were refused. Send the request again.") from None
            raise
        except EngineDeadError as error:
            raise EngineError(f"vLLM's engine process has died ({error}).") from error
        except EngineGenerateError as error:
            raise EngineError(f"vLLM failed ({error.__cause__!r}).") from error
        finally:
            self._running.discard(work)
            self._dropped.discard(work)
            self._num_open -= request.num_trajectories

    async def load_weights(self, version: int, directory: Path, probe: WeightProbe | None = None) -> None:
        """See :class:`RolloutEngine`."""
        async with self._swapping:
            if version <= self.version:
                return
            self._require_running()
            try:
                await self._read(str(directory))
                # The engine must not stay paused when the caller goes away.
                await asyncio.shield(asyncio.create_task(self._swap(version, str(directory), probe)))
            except EngineDeadError as error:
                raise EngineError(f"vLLM's engine process has died ({error}).") from error

    def status(self) -> EngineStatus:
        """See :class:`RolloutEngine`. vLLM's counts, as of its last step, without trajectories ended since."""
        num_running = min(self._counts.num_running, self._num_open)
        num_waiting = min(self._counts.num_waiting, self._num_open - num_running)
        return EngineStatus(num_running, num_waiting, self._counts.tokens_generated - self._tokens_before)

    async def wait_failed(self) -> None:
        """See :class:`RolloutEngine`."""
        while not self._closed:
            if self._weights.failure is not None:
                raise self._weights.failure
            if self._llm.errored:
                raise EngineError("vLLM's engine process has died. Its last lines are in this process's log.")
            await asyncio.sleep(_HEALTH_SECONDS)
        raise EngineError("the engine was closed.")

    async def close(self) -> None:
        """See :class:`RolloutEngine`."""
        self._closed = True
        running = list(self._running)
        for work in running:
            work.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._owned:
            if self._llm.output_handler is not None:
                self._llm.output_handler.cancel()  # it would mistake the end of the process for a failure
            await asyncio.to_thread(self._llm.shutdown)

    def _require_running(self) -> None:
        if self._closed or self._weights.failure is not None or self._llm.errored:
            raise EngineError(_STOPPED)

    async def _sample(self, request: GroupRequest) -> list[Trajectory]:
        # All greedy trajectories are the same, and vLLM refuses n > 1 for them.
        greedy = request.sampling.temperature == 0
        params = self._params(request, 1 if greedy else request.num_trajectories)
        prompt = tokens_input(request.prompt_token_ids.tolist())
        request_id = f"{request.group_id}/{next(self._request_numbers)}"
        final = None
        async for output in self._llm.generate(prompt, params, request_id, priority=_priority(request.group_id)):
            final = output
        await self._weights.settled.wait()
        assert final is not None
        return [
            trajectory_from_output(request, index, final.outputs[0 if greedy else index])
            for index in range(request.num_trajectories)
        ]

    def _params(self, request: GroupRequest, num_trajectories: int) -> SamplingParams:
        sampling = request.sampling
        return SamplingParams(
            n=num_trajectories,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=_vllm_seed(sampling.seed),
            # We set the ends of sequence, so that both engines end trajectories at the same tokens.
            ignore_eos=True,
            stop_token_ids=sorted({*self._eos_ids, *sampling.stop_token_ids}),
            logprobs=sampling.top_logprobs,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _read(self, directory: str) -> None:
        """Have the workers read and check the payload while sampling continues."""
        await self._llm.collective_rpc("read_weights", args=(directory,))
        while True:
            outcomes = [tuple(outcome) for outcome in await self._llm.collective_rpc("weights_read", args=("store",))]
            states = {state for state, _ in outcomes}
            if states == {"ready"}:
                return
            if "reading" not in states:
                break
            await asyncio.sleep(_POLL_SECONDS)
        state, message = next(outcome for outcome in outcomes if outcome[0] != "ready")
        if state == "missing":
            raise FileNotFoundError(message)
        if state == "corrupt":
            raise WeightCorruptError(message)
        raise EngineError(f"a worker could not read {directory}: {message}")

    async def _swap(self, version: int, source: str, probe: WeightProbe | None) -> None:
        await self._weights.swap(self.version, version, source, probe)
        self.version = version

    def _drop_running(self) -> None:
        self._dropped |= self._running
        for work in self._running:
            work.cancel()


def _priority(group_id: str) -> int:
    """Lower goes first: groups of an earlier batch precede later ones, and groups of no batch precede all."""
    try:
        return GroupKey.parse(group_id).slot
    except ValueError:
        return -1  # of an evaluation


def _vllm_seed(seed: int) -> int:
    """A hash of the seed, 62 bits. vLLM gives trajectory i the seed + i, and neighbouring seeds must share none."""
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest(), "little") >> 2
