"""Changes vLLM's weights in place, between two steps, and holds what vLLM made of them to the version's probe.

vLLM packs and fuses weights as it takes them up, differently for each kind of layer, and a step that it leaves out
shows in no error. So each version has to give the learner's log-probabilities, and restored weights what they gave
before.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from jackpot.errors import EngineError, WeightCorruptError
from jackpot.rollout.vllm.outputs import version_label
from jackpot.storage.weight_probe import ProbeCheck, WeightProbe

LOG = logging.getLogger(__name__)

_BEFORE_ALL = -(1 << 31)  # priority


class WeightSwap:
    """The weights of one running vLLM. One swap at a time.

    Args:
        llm: the engine.
        drop_running: ends the requests under way: they may hold tokens of weights that were refused.
    """

    def __init__(self, llm: AsyncLLM, drop_running: Callable[[], object]) -> None:
        self._llm = llm
        self._drop_running = drop_running
        model, cache = llm.vllm_config.model_config, llm.vllm_config.cache_config
        dtype = str(model.dtype).removeprefix("torch.")
        cheaper = model.quantization is not None or cache.cache_dtype not in ("auto", dtype)
        self._check = ProbeCheck(dtype, cheaper=cheaper)
        self._before: tuple[Sequence[int], list[list[float]]] | None = None  # tokens, and what the held weights give
        self._sampled_from = False  # whether requests may hold tokens of weights not yet found right
        self._numbers = itertools.count()
        self.failure: EngineError | None = None
        """Why the engine can no longer be used."""
        self.settled = asyncio.Event()
        """Whether the weights in use have been found right: what was sampled must not be handed out before."""
        self.settled.set()

    async def swap(self, held: int, version: int, source: str, probe: WeightProbe | None) -> None:
        """Use what the workers have read or received from ``source`` as ``version``.

        Raises:
            WeightCorruptError: it cannot be applied or does not give its probe; version ``held`` is restored.
            EngineError: nor could that be restored: see :attr:`failure`.
            EngineDeadError: vLLM's process has died.
        """
        if probe is not None and (self._before is None or list(self._before[0]) != list(probe.token_ids)):
            self._before = probe.token_ids, await self._passes(probe.token_ids)
            if held < 0 and self._check.compares_initial(probe):
                self._check.measure_initial(probe, self._before[1][0])
        self.settled.clear()
        self._sampled_from = False
        try:
            probed = await self._apply(version, source, probe)
            for logprobs in probed:
                assert probe is not None
                self._check.check(probe, logprobs, version)
            await self._llm.collective_rpc("keep_weights")
            self._before = None if probe is None else (probe.token_ids, probed)
        except EngineDeadError:
            raise
        except Exception as error:  # a worker's error arrives as a bare Exception
            # vLLM's process has logged a traceback where there is one to see.
            LOG.error("version %d is refused, version %d is restored: %s", version, held, str(error))
            if self._sampled_from:
                self._drop_running()
            await self._restore(held, version, error)
            if isinstance(error, WeightCorruptError):
                raise
            raise WeightCorruptError(f"version {version} could not be applied: {error}") from error
        self.settled.set()

    async def _apply(self, version: int, source: str, probe: WeightProbe | None) -> list[list[float]]:
        # `keep` and a cleared cache: running requests continue, and their keys and values are recomputed.
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"source": source}))
        await self._llm.finish_weight_update(weight_version=str(version))
        self._sampled_from = True
        return await self._resume_with_passes(probe.token_ids if probe else ())

    async def _restore(self, held: int, version: int, cause: Exception) -> None:
        """Roll back to the held version, and end the engine if its weights are not what they were."""
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            await self._llm.collective_rpc("roll_back_weights")
            await self._llm.update_weight_version(version_label(held))
            tokens, before = self._before or ((), [])
            probed = await self._resume_with_passes(tokens)
            self._check.check_restored(before, probed)
        except EngineDeadError:
            raise
        except Exception as error:  # as above
            self.failure = EngineError(
                f"version {version} could not be applied ({cause}), nor the previous one restored ({error})."
            )
            raise self.failure from error
        self.settled.set()

    async def _resume_with_passes(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Resume sampling, the passes over these tokens first; none for no tokens."""
        passes = []
        if token_ids:
            passes = [await self._begin_pass(token_ids, rank) for rank in self._ranks()]
        await self._llm.resume_generation()
        return [await _logprobs(queue, token_ids) for queue in passes]

    async def _passes(self, token_ids: Sequence[int]) -> list[list[float]]:
        return [await _logprobs(await self._begin_pass(token_ids, rank), token_ids) for rank in self._ranks()]

    def _ranks(self) -> Sequence[int | None]:
        """The engines behind this one that each have the whole model."""
        size = self._llm.vllm_config.parallel_config.data_parallel_size
        return [None] if size == 1 else range(size)

    async def _begin_pass(self, token_ids: Sequence[int], rank: int | None) -> Any:
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        name = f"probe/{next(self._numbers)}"
        prompt = tokens_input(list(token_ids))
        return await self._llm.add_request(name, prompt, params, priority=_BEFORE_ALL, data_parallel_rank=rank)


async def _logprobs(queue: Any, token_ids: Sequence[int]) -> list[float]:
    """log p of each token but the first, from the output of a pass."""
    output = await queue.get()
    entries = output.prompt_logprobs or ()
    return [float(entry[token].logprob) for token, entry in zip(token_ids[1:], entries[1:], strict=False)]
