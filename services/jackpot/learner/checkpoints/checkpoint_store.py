"""Checkpoints: weights, optimizer moments, step and random state, by torch.distributed.checkpoint. No pickle on disk.

Every rank writes its own shards, as safetensors with their position in the whole tensor; everything else is JSON. Any
number of ranks can read a checkpoint, whatever number wrote it. Writing runs concurrently with training, from a copy.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.errors import JackpotError
from jackpot.learner.checkpoints.checkpoint_tensors import Learnable, empty_moments, take_up_moments, tensors_of
from jackpot.learner.checkpoints.kept_checkpoints import KeptCheckpoints
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.trajectory import Role

STATE_FILE = "state.json"
_RANDOM = "random/torch"


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of training: finished optimizer steps and finished batches, the current λ, and the state of the
    controllers of λ and λ_distill."""

    step: int
    batch: int
    obrs_lambda: float
    controls: Mapping[str, float] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one job.

    Args:
        directory: ``checkpoints/`` of the run directory; created if missing.
        keep: how many of the newest stay.
        ranks: the processes that write and read together.
        evaluations: ``evaluations.jsonl``, by which the best policy's checkpoint is kept as well; None keeps only the
            newest.
        stored: the job's checkpoints in an object store; None keeps them in ``directory``.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        *,
        ranks: Ranks = SOLO,
        evaluations: Path | None = None,
        stored: ObjectDirectories | None = None,
    ) -> None:
        self._directory = directory
        self._ranks = ranks
        # The other ranks follow rank 0's orders.
        self._kept = KeptCheckpoints(directory, keep, evaluations, stored) if ranks.rank == 0 else None

    def begin(self, progress: Progress, learnables: Mapping[Role, Learnable]) -> PendingCheckpoint:
        """Copy every learnable's current state and start writing it; a collective.

        Raises:
            OSError: there is no space for a checkpoint; the previous one is untouched.
        """
        aside = self._directory / f".{progress.step:08d}"
        if self._kept is not None:
            self._kept.begin(aside)
        _one_process_is_no_warning()
        writing = async_save(
            {**tensors_of(learnables), _RANDOM: torch.get_rng_state()},
            storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True),
            process_group=self._ranks.checkpoint_group,
            no_dist=self._ranks.mesh is None,
        )
        assert isinstance(writing, Future)
        return PendingCheckpoint(self, progress, aside, writing)

    def save(self, progress: Progress, learnables: Mapping[Role, Learnable]) -> Path:
        """Write a checkpoint of every learnable by role, atomically, and delete those no longer needed.

        Raises:
            OSError: as :meth:`begin`.
            JackpotError: as :meth:`PendingCheckpoint.finish`.
        """
        return self.begin(progress, learnables).finish()

    def latest(self) -> Path | None:
        """The checkpoint to resume from; rank 0 only. See :meth:`KeptCheckpoints.latest`."""
        return self._of_rank_0.latest()

    @property
    def steps(self) -> Collection[int]:
        """The steps with a checkpoint, finished or in progress; rank 0 only.

        Raises:
            ObjectStoreError: they are in an object store that does not answer.
        """
        return self._of_rank_0.steps

    def load(self, path: Path, learnables: Mapping[Role, Learnable]) -> Progress:
        """Restore every learnable in place, and torch's random state; a collective.

        Raises:
            JackpotError: the checkpoint belongs to other models, or is damaged.
        """
        try:
            progress = Progress(**json.loads((path / STATE_FILE).read_text(encoding="utf-8")))
            reader = HuggingFaceStorageReader(str(path))
            # There are no moments before the first step; a skipped step creates none.
            stored = reader.read_metadata().state_dict_metadata
            for learnable in learnables.values():
                learnable.optimizer.state.clear()
            _one_process_is_no_warning()
            tensors = tensors_of(learnables) | empty_moments(learnables, stored) | {_RANDOM: torch.get_rng_state()}
            load(
                tensors,
                storage_reader=reader,
                process_group=self._ranks.checkpoint_group,
                no_dist=self._ranks.mesh is None,
            )
            take_up_moments(learnables, tensors)
            torch.set_rng_state(tensors[_RANDOM])
        except (OSError, ValueError, TypeError, KeyError, SafetensorError, CheckpointException) as error:
            raise JackpotError(
                f"checkpoint {path} cannot be restored ({_short(error)}); if policy or actor are other models than "
                "those that it was made of, start a new run"
            ) from error
        return progress

    def complete(self, progress: Progress, aside: Path) -> Path:
        """Make the directory of all ranks the latest checkpoint. Rank 0 only; see :meth:`KeptCheckpoints.add`."""
        (aside / STATE_FILE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        return self._of_rank_0.add(aside, f"{progress.step:08d}")

    @property
    def _of_rank_0(self) -> KeptCheckpoints:
        assert self._kept is not None, "rank 0 alone knows which checkpoints there are"
        return self._kept


@dataclass(frozen=True, slots=True)
class PendingCheckpoint:
    """A checkpoint that is being written."""

    store: CheckpointStore
    progress: Progress
    aside: Path
    writing: Future[Any]

    def finish(self) -> Path:
        """Wait until it is complete; a collective.

        Raises:
            JackpotError: it could not be written; the previous checkpoint is untouched.
            ObjectStoreError: as its cause, where an object store refuses, or is out of reach for too long.
        """
        try:
            self.writing.result()
            if self.store._ranks.rank == 0:
                return self.store.complete(self.progress, self.aside)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            raise JackpotError(f"checkpoint {self.aside} could not be written ({_short(error)})") from error
        return self.aside


def _one_process_is_no_warning() -> None:
    # A process-wide filter: the warning comes from the writing thread, possibly after a context would have ended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _short(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(inner).split())[:300]
