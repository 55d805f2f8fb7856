"""Before any process starts: make the built-in models, and check that the job can work. No torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from jackpot.config import JobSpec
from jackpot.demo.recipe import builtin_models_missing, is_builtin, make_command, resolve_builtin
from jackpot.errors import ConfigError, JackpotError
from jackpot.orchestrator.preflight import validate_job

_COMPLETE = "Download or export the model again, complete with config.json, *.safetensors and tokenizer.json."


def prepare_job(job: JobSpec) -> JobSpec:
    """Make what is missing, check everything, and return the job with its models as directories.

    Raises:
        ConfigError: naming field, value and remedy.
        JackpotError: the built-in models could not be made.
    """
    make_builtin_models(job)
    resolved = resolve_models(job)
    check_models(resolved)
    validate_job(resolved)
    return resolved


def make_builtin_models(job: JobSpec) -> None:
    """Warm up the built-in models that the job names and the cache lacks; progress goes to the terminal.

    Raises:
        JackpotError: the warm-up failed.
    """
    for recipe in builtin_models_missing(job):
        # stdout belongs to the caller (--json); the warm-up's progress is on stderr.
        finished = subprocess.run(make_command(recipe), stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            raise JackpotError(f"the built-in models of {recipe!r} could not be made; see the lines above")


def resolve_models(job: JobSpec) -> JobSpec:
    """The same job with ``builtin:`` names replaced by their directories."""

    def resolve(model: str) -> str:
        return str(resolve_builtin(model)) if is_builtin(model) else model

    update: dict[str, Any] = {"policy": job.policy.model_copy(update={"model": resolve(job.policy.model)})}
    if not isinstance(job.actor, str):
        update["actor"] = job.actor.model_copy(update={"model": resolve(job.actor.model)})
    return job.model_copy(update=update)


def check_models(job: JobSpec) -> None:
    """Model directories are whole, and policy and actor speak of the same tokens.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    vocabulary = _check_directory("policy.model", job.policy.model)
    if isinstance(job.actor, str):
        return
    if _check_directory("actor.model", job.actor.model) != vocabulary:
        raise ConfigError(
            "actor.model",
            job.actor.model,
            "has another vocabulary than policy.model, so its tokens mean nothing to the policy",
            "Use two models of one family that share tokenizer and vocabulary size.",
        )


def _check_directory(field: str, model: str) -> tuple[int, str]:
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(field, model, "is not a directory", "Give a model directory in Hugging Face format.")
    config = _read_json(field, directory / "config.json")
    tokenizer = _read_json(field, directory / "tokenizer.json")
    if next(directory.glob("*.safetensors"), None) is None:
        raise ConfigError(field, model, "holds no *.safetensors", _COMPLETE)
    text = config.get("text_config", config)
    content = tokenizer.get("model", {}).get("vocab", {})
    return int(text.get("vocab_size", 0)), json.dumps(content, sort_keys=True)


def _read_json(field: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(field, str(path.parent), f"holds no {path.name}", _COMPLETE) from None
    except (OSError, ValueError) as error:
        raise ConfigError(field, str(path.parent), f"its {path.name} cannot be read ({error})", _COMPLETE) from None
    if not isinstance(data, dict):
        raise ConfigError(field, str(path.parent), f"its {path.name} is not a JSON object", _COMPLETE)
    return data
