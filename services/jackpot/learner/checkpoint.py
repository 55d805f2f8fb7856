"""Checkpoints: weights, optimizer moments, step and random state, by torch.distributed.checkpoint. No pickle on disk.

Every rank writes its own shards, as safetensors that say where in the whole tensor they lie; what is not a tensor is
JSON. Any number of ranks reads what any number has written. Writing happens beside training, from a copy. A checkpoint
is written aside and renamed, so that a directory with a final name is whole; the newest of them is the latest.

With an object store a checkpoint is there once the store holds it; the directory keeps a copy of the newest.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
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

from jackpot.errors import JackpotError, ObjectStoreError, ObjectUnavailableError
from jackpot.learner.best_step import best_step
from jackpot.learner.checkpoint_tensors import Learnable, empty_moments, take_up_moments, tensors_of
from jackpot.runtime.object_directories import ObjectDirectories
from jackpot.runtime.ranks.group import SOLO, Ranks
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)

STATE_FILE = "state.json"
_RANDOM = "random/torch"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: finished optimizer steps and finished batches, the λ in force, and what the controllers
    of λ and λ_distill remember."""

    step: int
    batch: int
    obrs_lambda: float
    controls: Mapping[str, float] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one job.

    Args:
        directory: ``checkpoints/`` of the run directory; created if missing.
        keep: how many of the newest stay.
        ranks: who writes and reads together.
        evaluations: ``evaluations.jsonl``, by which the checkpoint of the best policy stays as well; None keeps the
            newest alone.
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
        self._keep = keep
        self._ranks = ranks
        self._evaluations = evaluations
        self._stored = stored
        if ranks.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for unfinished in directory.glob(".*"):
                shutil.rmtree(unfinished)

    def begin(self, progress: Progress, learnables: Mapping[Role, Learnable]) -> PendingCheckpoint:
        """Copy every learnable as it is now and start to write; a collective.

        Raises:
            OSError: there is no place for a checkpoint; the previous one is untouched.
        """
        aside = self._directory / f".{progress.step:08d}"
        if self._ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            if self._stored is not None:
                for copy in self._all():  # the store has it: this machine needs space for one checkpoint, not two
                    shutil.rmtree(copy)
            aside.mkdir()
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
        """Write a checkpoint of every learnable by role, atomically, and delete the oldest beyond ``keep``.

        Raises:
            OSError: as :meth:`begin`.
            JackpotError: as :meth:`PendingCheckpoint.finish`.
        """
        return self.begin(progress, learnables).finish()

    def latest(self) -> Path | None:
        """The newest checkpoint's directory, or None. Rank 0 alone.

        Raises:
            ObjectStoreError: the newest is in an object store and cannot be read from there.
        """
        found = self._all()
        if self._stored is None:
            return found[-1] if found else None
        names = [name for name in self._stored.names() if name.isdigit()]
        for path in found:
            if path.name not in names:  # never finished: no group counts as trained by it
                shutil.rmtree(path)
        if not names:
            return None
        newest = self._directory / names[-1]
        if newest not in found:
            self._fetch(self._stored, newest)
        return newest

    @property
    def steps(self) -> Collection[int]:
        """The steps of which there is a checkpoint, or one is on its way. Rank 0 alone.

        Raises:
            ObjectStoreError: they are in an object store that cannot be asked.
        """
        # Also the copies' own: between them and the store's lies the upload.
        here = {path.name.removeprefix(".") for path in self._directory.iterdir()}
        there = self._stored.names() if self._stored is not None else []
        return {int(name) for name in here.union(there) if name.isdigit()}

    def load(self, path: Path, learnables: Mapping[Role, Learnable]) -> Progress:
        """Restore every learnable in place, and torch's random state; a collective.

        Raises:
            JackpotError: the checkpoint is damaged or belongs to other models.
        """
        try:
            progress = Progress(**json.loads((path / STATE_FILE).read_text(encoding="utf-8")))
            reader = HuggingFaceStorageReader(str(path))
            # Moments are not there before the first step, and a step that was skipped leaves them so.
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
                f"checkpoint {path} cannot be restored ({_short(error)}); delete it to resume from an older one"
            ) from error
        return progress

    def complete(self, progress: Progress, aside: Path) -> Path:
        """Give what all ranks have written its final name, and delete what need not stay. Rank 0 alone."""
        final = self._directory / f"{progress.step:08d}"
        (aside / STATE_FILE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        _sync_tree(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        if self._stored is not None:
            if final.name in self._stored.names():  # of a step that is trained once more
                self._stored.remove(final.name)
            self._stored.upload(final.name, final)
        self._prune()
        return final

    def _fetch(self, stored: ObjectDirectories, final: Path) -> None:
        aside = final.with_name(f".{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        LOG.info("reading checkpoint %s", stored.where(final.name))
        try:
            stored.download(final.name, aside)
        except ObjectUnavailableError:
            raise
        except ObjectStoreError as error:
            where = stored.where(final.name)
            raise JackpotError(
                f"checkpoint {where} cannot be restored ({error}); delete it to resume from an older one"
            ) from None
        _sync_tree(aside)
        aside.rename(final)

    def _all(self) -> list[Path]:
        return sorted(path for path in self._directory.iterdir() if path.name.isdigit())

    def _prune(self) -> None:
        if self._stored is None:
            for name in self._superfluous([path.name for path in self._all()]):
                shutil.rmtree(self._directory / name)
            return
        for path in self._all()[:-1]:
            shutil.rmtree(path)
        try:
            for name in self._superfluous([name for name in self._stored.sweep() if name.isdigit()]):
                self._stored.remove(name)
        except ObjectStoreError as error:
            LOG.warning("older checkpoints stay for now: %s", error)

    def _superfluous(self, names: list[str]) -> list[str]:
        """Those among the names, ascending, that need not stay."""
        best = best_step(self._evaluations, [int(name) for name in names]) if self._evaluations else None
        return [name for name in names[: -self._keep] if int(name) != best]


@dataclass(frozen=True, slots=True)
class PendingCheckpoint:
    """A checkpoint on its way to the disk."""

    store: CheckpointStore
    progress: Progress
    aside: Path
    writing: Future[Any]

    def finish(self) -> Path:
        """Wait until it is there whole; a collective.

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
    # Not in a context that ends: the warning comes from the thread that writes.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _short(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(inner).split())[:300]


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory, directory.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
