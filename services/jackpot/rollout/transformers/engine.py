"""The embedded engine: transformers' models with our own decoding loop, for tiny models and laptops.

One thread owns the model. Between two tokens it swaps weights, drops cancelled requests and admits waiting ones.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.model_weights import apply_state, hub_format, own_tensors, read_tensors
from jackpot.compute.models import vocabulary_size
from jackpot.compute.probe_pass import probe_logprobs
from jackpot.errors import EngineError, QueueFullError, WeightCorruptError
from jackpot.rollout.engine import EngineStatus, GroupRequest, ModelLimits, check_request
from jackpot.rollout.transformers.decode_batch import DecodeBatch, eos_token_ids
from jackpot.rollout.transformers.rows import Row
from jackpot.storage.weight_probe import ProbeCheck, WeightProbe
from jackpot.trajectory import Trajectory

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

# A full queue empties by whole groups; retrying sooner than this only costs calls.
RETRY_AFTER_SECONDS = 0.25
# An idle engine waits for further requests before it starts: at most this long, and only while they keep coming.
GATHER_SECONDS = 0.02
GATHER_PAUSE_SECONDS = 0.004
NO_VERSION = -1
_UNLIMITED_POSITIONS = 1 << 30
_STOPPED = "the engine has stopped. Send the request to another replica."


@dataclass(slots=True, eq=False)
class _Pending:
    """A request in the engine."""

    request: GroupRequest
    future: Future[list[Trajectory]] = field(default_factory=Future)
    next_index: int = 0  # of the trajectory that joins next
    finished: dict[int, Trajectory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Swap:
    version: int
    state: Mapping[str, Tensor]
    probe: WeightProbe | None
    done: Future[None]


class TransformersEngine:
    """Implements :class:`jackpot.rollout.engine.RolloutEngine` on a transformers model.

    Args:
        model: from ``load_causal_lm``; the engine owns it from here on.
        max_batch_size: trajectories decoded together.
        max_queue: trajectories in the engine, running or waiting, before it refuses more.
        max_positions: tokens of the longest sequence; None is what the model's configuration says.
        groups_apart: whether each request is decoded by itself, so that its log-probabilities do not depend on other
            requests, to the bit.
        on_tokens: receives the number of tokens sampled; called from the engine's thread.
    """

    name = "transformers"
    receiver = None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch_size: int,
        max_queue: int,
        max_positions: int | None = None,
        groups_apart: bool = False,
        on_tokens: Callable[[int], object] = lambda num_tokens: None,
    ) -> None:
        self.version = NO_VERSION
        self.limits = ModelLimits(
            vocab_size=vocabulary_size(model),
            max_positions=max_positions
            or getattr(model.config.get_text_config(), "max_position_embeddings", None)
            or _UNLIMITED_POSITIONS,
        )
        self._model = model
        self._names = hub_format(model)
        self._probe_check = ProbeCheck(str(model.dtype).removeprefix("torch."))
        self._batch = DecodeBatch(model, eos_token_ids(model))
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._groups_apart = groups_apart
        self._on_tokens = on_tokens
        self._tokens_generated = 0
        # Guarded by _wake: the loop's input from other threads, and the fields that status() reads.
        self._wake = threading.Condition()
        self._waiting: deque[_Pending] = deque()
        self._open: dict[GroupRequest, _Pending] = {}  # waiting and running
        self._swaps: deque[_Swap] = deque()
        self._any_cancelled = False
        self._closing = False
        self._stopped = _uncancellable()  # done when the thread has ended, with its error if it failed
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def check(self, request: GroupRequest) -> None:
        """See :class:`RolloutEngine`."""
        check_request(request, self.limits, self._max_queue)

    async def generate(self, request: GroupRequest) -> list[Trajectory]:
        """See :class:`RolloutEngine`."""
        self.check(request)
        # Requests are compared by identity, and a caller may send one twice.
        request = replace(request)
        pending = _Pending(request)
        with self._wake:
            self._require_running()
            if self._num_open() + request.num_trajectories > self._max_queue:
                raise QueueFullError(RETRY_AFTER_SECONDS)
            self._open[request] = pending
            self._waiting.append(pending)
            self._wake.notify()
        try:
            return await asyncio.wrap_future(pending.future)
        finally:
            if pending.future.cancelled():
                with self._wake:
                    self._any_cancelled = True
                    self._wake.notify()

    async def load_weights(self, version: int, directory: Path, probe: WeightProbe | None = None) -> None:
        """See :class:`RolloutEngine`."""
        if version <= self.version:
            return
        # Read and checked while sampling continues; only the copy happens between two tokens.
        state = await asyncio.to_thread(read_tensors, directory, self._names)
        swap = _Swap(version, state, probe, _uncancellable())
        with self._wake:
            self._require_running()
            self._swaps.append(swap)
            self._wake.notify()
        await asyncio.wrap_future(swap.done)

    def status(self) -> EngineStatus:
        """See :class:`RolloutEngine`."""
        with self._wake:
            num_running = len(self._batch.rows)
            return EngineStatus(num_running, max(0, self._num_open() - num_running), self._tokens_generated)

    async def wait_failed(self) -> None:
        """See :class:`RolloutEngine`."""
        await asyncio.wrap_future(self._stopped)
        raise EngineError("the engine was closed.")

    async def close(self) -> None:
        """See :class:`RolloutEngine`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _num_open(self) -> int:
        """Trajectories that are not finished yet."""
        return sum(pending.request.num_trajectories - len(pending.finished) for pending in self._open.values())

    def _require_running(self) -> None:
        if self._closing or self._stopped.done():
            raise EngineError(_STOPPED)

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        failure: EngineError | None = None
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._swap_weights()
                    self._forget_cancelled()
                    self._admit()
                    self._step()
        except Exception as error:  # the thread's outermost frame: callers must receive any error
            LOG.critical("the decoding loop failed", exc_info=True)
            failure = EngineError(f"the decoding loop failed ({type(error).__name__}: {error}).")
        self._end(failure)

    def _end(self, failure: EngineError | None) -> None:
        """Answer all pending requests."""
        with self._wake:
            self._closing = True
            unanswered: list[Future[Any]] = [swap.done for swap in self._swaps]
            requests = [pending.future for pending in self._open.values()]
            self._open.clear()
            self._waiting.clear()
        unanswered += [future for future in requests if future.set_running_or_notify_cancel()]
        for future in unanswered:
            future.set_exception(failure or EngineError(_STOPPED))
        if failure:
            self._stopped.set_exception(failure)
        else:
            self._stopped.set_result(None)

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False when the engine is to stop."""
        with self._wake:
            while not (self._closing or self._swaps or self._waiting or self._any_cancelled or self._batch.rows):
                self._wake.wait()
            if self._waiting and not self._batch.rows and not self._groups_apart:
                self._gather()
            return not self._closing

    def _gather(self) -> None:
        """Wait for the rest of a batch. The engine is idle, and the first request has arrived; the others of its batch
        arrive in separate calls. Rows that start together share every step."""
        deadline = time.monotonic() + GATHER_SECONDS
        arrived = 0
        while arrived < len(self._waiting) and time.monotonic() < deadline and not self._closing:
            arrived = len(self._waiting)
            self._wake.wait(GATHER_PAUSE_SECONDS)

    def _swap_weights(self) -> None:
        with self._wake:
            swaps, self._swaps = list(self._swaps), deque()
        newest = max(swaps, key=lambda swap: swap.version, default=None)
        try:
            if newest is not None and newest.version > self.version:
                self._take_up(newest)
        except WeightCorruptError as error:
            for swap in swaps:
                swap.done.set_exception(error)
            return
        for swap in swaps:
            swap.done.set_result(None)

    def _take_up(self, swap: _Swap) -> None:
        """Use new weights; on a WeightCorruptError the model has its old ones."""
        if swap.probe is None:
            apply_state(self._model, swap.state)
        else:
            self._apply_checked(swap, swap.probe)
        self.version = swap.version
        self._attempt(lambda: self._batch.change_version(self.version))

    def _apply_checked(self, swap: _Swap, probe: WeightProbe) -> None:
        if self.version == NO_VERSION and self._probe_check.compares_initial(probe):
            self._probe_check.measure_initial(probe, probe_logprobs(self._model, probe.token_ids))
        before = {name: tensor.clone() for name, tensor in own_tensors(self._model)[0].items()}
        apply_state(self._model, swap.state)
        try:
            self._probe_check.check(probe, probe_logprobs(self._model, probe.token_ids), swap.version)
        except WeightCorruptError:
            apply_state(self._model, before)
            raise

    def _forget_cancelled(self) -> None:
        with self._wake:
            if not self._any_cancelled:
                return
            self._any_cancelled = False
            cancelled = {request for request, pending in self._open.items() if pending.future.cancelled()}
        self._forget(cancelled)

    def _forget(self, requests: set[GroupRequest]) -> list[_Pending]:
        """Remove requests from the engine, whether they wait or run."""
        with self._wake:
            self._waiting = deque(pending for pending in self._waiting if pending.request not in requests)
            forgotten = [self._open.pop(request) for request in requests if request in self._open]
        self._batch.drop(requests)
        return forgotten

    def _fail(self, requests: set[GroupRequest], error: EngineError) -> None:
        for pending in self._forget(requests):
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(error)

    def _admit(self) -> None:
        """Admit waiting trajectories, first come first served, while there is room."""
        rows: list[Row] = []
        with self._wake:
            free = self._max_batch_size - len(self._batch.rows)
            while free and self._waiting:
                pending = self._waiting[0]
                if self._groups_apart and any(row.request is not pending.request for row in (*self._batch.rows, *rows)):
                    break
                until = min(pending.next_index + free, pending.request.num_trajectories)
                for index in range(pending.next_index, until):
                    rows.append(Row(pending.request, index, [(self.version, 0)]))
                free -= until - pending.next_index
                pending.next_index = until
                if until == pending.request.num_trajectories:
                    self._waiting.popleft()
        if rows:
            self._attempt(lambda: self._batch.add(rows), joining=rows)

    def _step(self) -> None:
        num_rows = len(self._batch.rows)
        finished = self._attempt(self._batch.step)
        with self._wake:
            self._tokens_generated += num_rows
        self._on_tokens(num_rows)
        for row, trajectory in finished or ():
            self._finish(row, trajectory)

    def _finish(self, row: Row, trajectory: Trajectory) -> None:
        pending = self._open.get(row.request)
        if pending is None:
            return  # a sibling has failed
        if not np.isfinite(trajectory.actor_logprobs).all():
            versions = sorted({span.version for span in trajectory.version_spans})
            error = EngineError(f"weights of version {versions} give logits that are not finite. Look at the learner.")
            self._fail({row.request}, error)
            return
        with self._wake:
            pending.finished[row.index] = trajectory
            if len(pending.finished) < row.request.num_trajectories:
                return
            del self._open[row.request]
        # False if the caller has just gone away.
        if pending.future.set_running_or_notify_cancel():
            pending.future.set_result([pending.finished[index] for index in range(row.request.num_trajectories)])

    def _attempt(self, work: Callable[[], Result], joining: Sequence[Row] = ()) -> Result | None:
        """Do work on the batch. An error of torch (out of memory) fails the requests in it, not the engine."""
        try:
            return work()
        except RuntimeError as error:
            LOG.error("the batch of %d trajectories failed: %s", len(self._batch.rows), error, exc_info=True)
            requests = {row.request for row in (*self._batch.rows, *joining)}
            self._batch.clear()
            self._fail(requests, EngineError(f"decoding failed ({type(error).__name__}: {error})."))
            return None


def _uncancellable() -> Future[None]:
    """A future that is not cancelled with an asyncio task that awaits it."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future
