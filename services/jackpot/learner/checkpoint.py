"""Checkpoints: weights, optimizer moments, step and random state, as safetensors and JSON. No pickle.

A checkpoint is written aside and renamed, so that a directory with a final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from jackpot.errors import JackpotError
from jackpot.runtime.models import load_state, save_weights
from jackpot.trajectory import Role

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: finished optimizer steps and finished batches, the λ in force, and what the controllers
    of λ and λ_distill remember."""

    step: int
    batch: int
    obrs_lambda: float
    controls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Learnable:
    """A model and its optimizer, saved and restored together."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


class CheckpointStore:
    """The checkpoints of one job.

    Args:
        directory: ``checkpoints/`` of the run directory; created if missing.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, progress: Progress, learnables: Mapping[Role, Learnable]) -> Path:
        """Write a checkpoint of every learnable by role, atomically, and delete the oldest beyond ``keep``.

        Raises:
            OSError: the disk is full or gone; the previous checkpoint is untouched.
        """
        final = self._path(progress.step)
        aside = final.with_name(f".{final.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            for role, learnable in learnables.items():
                (aside / role).mkdir()
                save_weights(learnable.model, aside / role)
                save_file(_optimizer_tensors(learnable), aside / role / "optimizer.safetensors")
            save_file({"torch": torch.get_rng_state()}, aside / "random.safetensors")
            (aside / STATE_FILE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            _sync_tree(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._prune()
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint's directory, or None."""
        found = self._all()
        return found[-1] if found else None

    def load(self, path: Path, learnables: Mapping[Role, Learnable]) -> Progress:
        """Restore every learnable in place, and torch's random state.

        Raises:
            JackpotError: the checkpoint is damaged or belongs to other models.
        """
        try:
            progress = Progress(**json.loads((path / STATE_FILE).read_text(encoding="utf-8")))
            for role, learnable in learnables.items():
                load_state(learnable.model, path / role)
                _restore_optimizer(learnable, load_file(path / role / "optimizer.safetensors"))
            torch.set_rng_state(load_file(path / "random.safetensors")["torch"])
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise JackpotError(
                f"checkpoint {path} cannot be restored ({error}); delete it to resume from an older one"
            ) from error
        return progress

    def _path(self, step: int) -> Path:
        return self._directory / f"{step:08d}"

    def _all(self) -> list[Path]:
        return sorted(path for path in self._directory.iterdir() if path.name.isdigit())

    def _prune(self) -> None:
        for path in self._all()[: -self._keep]:
            shutil.rmtree(path)


def _optimizer_tensors(learnable: Learnable) -> dict[str, torch.Tensor]:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in learnable.model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value).detach().contiguous()
        for parameter, state in learnable.optimizer.state.items()
        for key, value in state.items()
    }


def _restore_optimizer(learnable: Learnable, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(learnable.model.named_parameters())
    learnable.optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU whatever device the parameter lives on.
        value = tensor if key == "step" else tensor.to(parameter.device)
        learnable.optimizer.state[parameter][key] = value


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory, directory.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
