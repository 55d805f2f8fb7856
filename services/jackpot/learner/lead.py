"""Rank 0 leads, the others follow: it alone reads the bus and decides what is next, and every collective of the trainer
begins with its order. An order is JSON and, for a batch, the batch's bytes."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.config import JobSpec
from jackpot.errors import JackpotError
from jackpot.learner.batch import Batch
from jackpot.learner.batch_wire import batch_from_bytes, batch_to_bytes
from jackpot.learner.checkpoint import CheckpointStore, PendingCheckpoint, Progress
from jackpot.learner.profiling import StepProfiler
from jackpot.learner.trainer import Trainer
from jackpot.runtime.ranks.group import RankLostError, Ranks
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)


class LeadTrainer(Trainer):
    """Rank 0's trainer: what it is asked to do, all ranks do.

    Safe to be called from several threads: one order is carried out at a time, in the same order on every rank.

    Args:
        job: the job as resolved.
        policy: θ.
        actor: ω, or None.
        ranks: all of them.
        profiler: records what the job asks for.
    """

    def __init__(
        self,
        job: JobSpec,
        policy: PreTrainedModel,
        actor: PreTrainedModel | None,
        ranks: Ranks,
        profiler: StepProfiler | None = None,
    ) -> None:
        super().__init__(job, policy, actor, ranks, profiler)
        self._turn = threading.Lock()
        self._dismissed = threading.Event()
        threading.Thread(target=self._keep_in_touch, name="ranks", daemon=True).start()

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        with self._order({"do": "train", "first_step": first_step}, batch_to_bytes(batch)):
            return super().train_batch(batch, first_step)

    def weights(self, role: Role) -> dict[str, Tensor]:
        if role not in self.learnables:
            return super().weights(role)  # frozen: this rank's model is whole
        with self._order({"do": "weights", "role": role}):
            return super().weights(role)

    def begin_checkpoint(self, store: CheckpointStore, progress: Progress) -> PendingCheckpoint:
        with self._order({"do": "checkpoint", "step": progress.step}):
            return super().begin_checkpoint(store, progress)

    def restore(self, store: CheckpointStore, path: Path) -> Progress:
        with self._order({"do": "restore", "path": str(path)}):
            return super().restore(store, path)

    def dismiss(self, exit_code: int) -> None:
        """Send the other ranks home, with their exit code; a no-op the second time and when a rank is gone."""
        if self._dismissed.is_set():
            return
        self._dismissed.set()
        try:
            with self._order({"do": "stop", "exit_code": exit_code}):
                pass
        except RankLostError as error:
            LOG.warning("%s", error)

    @contextmanager
    def _order(self, order: dict[str, Any], content: bytes = b"") -> Iterator[None]:
        with self._turn:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # which is the calling thread's own
            self._ranks.broadcast(json.dumps(order).encode())
            if order["do"] == "train":
                self._ranks.broadcast(content)
            yield

    def _keep_in_touch(self) -> None:
        """While there is nothing to do, show the others well before their deadline that this rank is there."""
        interval = self._job.learner.collective_timeout_seconds / 4
        while not self._dismissed.wait(interval):
            try:
                with self._order({"do": "wait"}):
                    pass
            except RankLostError:
                return  # torchrun has seen it as well, and ends this process


def follow(trainer: Trainer, store: CheckpointStore, ranks: Ranks) -> int:
    """Do as rank 0 says until it says stop; the exit code that it gives.

    Raises:
        RankLostError: rank 0 or another is gone.
    """
    pending: PendingCheckpoint | None = None
    while True:
        order = json.loads(ranks.broadcast())
        match order["do"]:
            case "train":
                batch = batch_from_bytes(ranks.broadcast())
                trainer.train_batch(batch, order["first_step"])
            case "weights":
                trainer.weights(order["role"])
            case "checkpoint":
                if pending is not None:
                    pending.finish()
                # λ and what is not a tensor is written by rank 0.
                pending = trainer.begin_checkpoint(store, Progress(order["step"], 0, 0.0))
            case "restore":
                trainer.restore(store, Path(order["path"]))
            case "stop":
                if pending is not None:
                    pending.finish()
                return int(order["exit_code"])
            case "wait":
                pass
            case unknown:
                raise JackpotError(f"rank 0 asks for {unknown!r}, which this rank does not know; install one version")
