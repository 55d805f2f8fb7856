"""The learner's ranks: rank 0 alone takes groups from the bus and decides what is next; what it is asked to do, all
ranks do. Of a batch it broadcasts the manifest, and each rank reads its own groups from the bus."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from jackpot.compute.ranks.group import Ranks
from jackpot.compute.ranks.orders import Dismissed, Orders, next_order
from jackpot.config import JobSpec
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, PendingCheckpoint, Progress
from jackpot.learner.lambda_control import LambdaControl
from jackpot.learner.models.trained_models import TrainedModels
from jackpot.learner.ranks.batch_broadcast import StepManifest, batch_from_bytes, batch_to_bytes, manifest_to_bytes
from jackpot.learner.trainer import Trainer
from jackpot.scoring.batch import Batch
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import Role, ScoredGroup

LOG = logging.getLogger(__name__)


class LeadTrainer:
    """Rank 0's trainer of several: a :class:`BatchTrainer` that tells the other ranks what to do, and lets its own part
    do the same. Safe to be called from several threads, see :class:`Orders`.

    Args:
        part: trains on this rank.
        ranks: all of them.
    """

    def __init__(self, part: Trainer, ranks: Ranks) -> None:
        self._part = part
        self._ranks = ranks
        self._orders = Orders(ranks, part.job.learner.collective_timeout_seconds)

    @property
    def models(self) -> TrainedModels:
        """This rank's part of the models."""
        return self._part.models

    @property
    def lambda_control(self) -> LambdaControl:
        """The same on all ranks."""
        return self._part.lambda_control

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        """As :meth:`Trainer.train_batch`, on all ranks."""
        with self._orders.give("train", manifest_to_bytes(batch), first_step=first_step):
            if not self._ranks.agree(well=True):
                LOG.warning("a rank cannot read its groups of step %d from the bus: it gets all of them", first_step)
                self._ranks.broadcast(batch_to_bytes(batch))
            return self._part.train_batch(batch, first_step)

    def weights(self, role: Role) -> dict[str, Tensor]:
        """As :meth:`Trainer.weights`."""
        if role not in self.models.learnables:
            return self._part.weights(role)  # frozen: this rank's model is whole
        with self._orders.give("weights", role=role):
            return self._part.weights(role)

    def probe(self, role: Role) -> WeightProbe:
        """As :meth:`Trainer.probe`."""
        if role not in self.models.learnables:
            return self._part.probe(role)  # frozen: this rank's model is whole
        with self._orders.give("probe", role=role):
            return self._part.probe(role)

    def begin_checkpoint(self, store: CheckpointStore, progress: Progress) -> PendingCheckpoint:
        """As :meth:`Trainer.begin_checkpoint`, on all ranks."""
        with self._orders.give("checkpoint", step=progress.step):
            return self._part.begin_checkpoint(store, progress)

    def restore(self, store: CheckpointStore, path: Path) -> Progress:
        """As :meth:`Trainer.restore`, on all ranks."""
        with self._orders.give("restore", path=str(path)):
            return self._part.restore(store, path)

    def dismiss(self, exit_code: int) -> None:
        """Send the other ranks home, with their exit code; a no-op the second time and when a rank is gone."""
        self._orders.dismiss(exit_code)


GroupSource = Callable[[Sequence[str]], Mapping[str, ScoredGroup]]
"""Reads groups by id; those that it cannot read are absent."""


def follow(trainer: Trainer, store: CheckpointStore, ranks: Ranks, source: GroupSource) -> int:
    """Do as rank 0 says until it says stop; the exit code that it gives.

    Args:
        trainer: this rank's.
        store: where checkpoints lie.
        ranks: all of them.
        source: this rank's way to the groups of a batch.

    Raises:
        RankLostError: rank 0 or another is gone.
    """
    job = trainer.job
    pending: PendingCheckpoint | None = None
    try:
        while True:
            order = next_order(ranks)
            match order.do:
                case "train":
                    batch = _own_part(order.content, job, ranks, source)
                    trainer.train_batch(batch, order.details["first_step"])
                case "weights":
                    trainer.weights(order.details["role"])
                case "probe":
                    trainer.probe(order.details["role"])
                case "checkpoint":
                    if pending is not None:
                        pending.finish()
                    # λ and what is not a tensor is written by rank 0.
                    pending = trainer.begin_checkpoint(store, Progress(order.details["step"], 0, 0.0))
                case "restore":
                    trainer.restore(store, Path(order.details["path"]))
                case _:
                    raise order.refuse()
    except Dismissed as dismissed:
        if pending is not None:
            pending.finish()
        return dismissed.exit_code


def _own_part(manifest: bytes, job: JobSpec, ranks: Ranks, source: GroupSource) -> Batch:
    """The batch with this rank's groups; all of it, where one of the ranks could not read its own."""
    outline = StepManifest.parse(manifest)
    wanted = outline.groups_of_rank(job.learner.updates_per_batch, ranks.rank, ranks.size)
    groups = source(wanted)
    if ranks.agree(all(group_id in groups for group_id in wanted)):
        return outline.fill(groups, job.learner.max_sequence_tokens)
    return batch_from_bytes(ranks.broadcast())
