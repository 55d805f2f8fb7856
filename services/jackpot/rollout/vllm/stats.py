"""Statistics of vLLM's scheduler after each step. vLLM itself adds its metrics to the process's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class EngineCounts:
    """Trajectories running and waiting, tokens sampled; over all data-parallel ranks."""

    def __init__(self, on_tokens: Callable[[int], object]) -> None:
        self._on_tokens = on_tokens
        self._running: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self.tokens_generated = 0

    @property
    def num_running(self) -> int:
        """Trajectories in the last step."""
        return sum(self._running.values())

    @property
    def num_waiting(self) -> int:
        """Trajectories that did not fit into the last step."""
        return sum(self._waiting.values())

    def record(self, rank: int, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Record one step's figures."""
        if scheduler_stats is not None:
            self._running[rank] = scheduler_stats.num_running_reqs
            self._waiting[rank] = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        if iteration_stats is not None and iteration_stats.num_generation_tokens:
            self.tokens_generated += iteration_stats.num_generation_tokens
            self._on_tokens(iteration_stats.num_generation_tokens)

    def logger(self, vllm_config: Any, engine_index: int = 0) -> CountLogger:
        """A factory of stat loggers, for ``AsyncLLM``."""
        return CountLogger(self)


class CountLogger(StatLoggerBase):
    """Passes vLLM's statistics to :class:`EngineCounts`."""

    def __init__(self, counts: EngineCounts) -> None:
        self._counts = counts

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """See vLLM."""
        self._counts.record(engine_idx, scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
