"""A profile of a few optimizer steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

LOG = logging.getLogger(__name__)

WARM_UP_BATCHES = 1  # a process's first batch allocates memory and builds kernels, and so is not representative


class StepProfiler:
    """Records whole batches until ``steps`` optimizer steps are recorded, once per process.

    Args:
        directory: where ``steps-<first>-<last>-rank<n>.json`` goes.
        steps: how many; 0 records nothing.
        rank: of this process.
    """

    def __init__(self, directory: Path, steps: int, rank: int = 0) -> None:
        self._directory = directory
        self._wanted = steps
        self._rank = rank
        self._batches = 0
        self._first = 0
        self._profile: profile | None = None

    @contextmanager
    def batch(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Context of one batch's training: steps [first_step, first_step + num_steps), 0-based."""
        self._batches += 1
        if self._profile is None and self._wanted > 0 and self._batches > WARM_UP_BATCHES:
            self._first = first_step
            # A single cycle, all of whose events are kept, so that torch 2.11 does not warn about losing others.
            self._profile = profile(activities=_activities(), record_shapes=True, acc_events=True)
            self._profile.start()
        yield
        if self._profile is not None and first_step + num_steps - self._first >= self._wanted:
            self._write(self._profile, first_step + num_steps)

    def _write(self, finished: profile, end: int) -> None:
        finished.stop()
        self._profile, self._wanted = None, 0
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"steps-{self._first + 1}-{end}-rank{self._rank}.json"
        finished.export_chrome_trace(str(path))
        LOG.info("profile written", extra={"path": str(path)})


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
