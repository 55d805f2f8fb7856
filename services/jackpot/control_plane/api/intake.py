"""Turns the bytes of a request into a job that this server accepts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from jackpot.config import InvalidJobError, JobSpec, parse_job
from jackpot.config.loading import read_yaml
from jackpot.control_plane.api.problems import FieldProblem, ProblemError
from jackpot.control_plane.jobs.admission import Admission
from jackpot.control_plane.jobs.records import LABEL_PATTERN, LABEL_VALUE_PATTERN, MAX_LABELS
from jackpot.control_plane.sessions.model_directories import check_models
from jackpot.control_plane.sessions.preparation import check_weight_store, resolve_models
from jackpot.demo.recipe import builtin_models_missing
from jackpot.errors import ConfigError, DeadlineError, JackpotError
from jackpot.orchestrator.preflight import validate_job

JSON_TYPES = ("application/json",)
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
CHECK_SECONDS = 60.0
_QUICK_BYTES = 8 << 10

_LABEL, _LABEL_VALUE = re.compile(LABEL_PATTERN), re.compile(LABEL_VALUE_PATTERN)
_CHECKING = asyncio.Semaphore(1)


async def read_job(body: bytes, content_type: str, admission: Admission) -> JobSpec:
    """The job in a request's body.

    Raises:
        ProblemError: the body is neither JSON nor YAML.
        InvalidJobError: it is not a valid job, or this server does not accept it.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (*JSON_TYPES, *YAML_TYPES):
        detail = f"Content-Type {kind[:60]!r} is not read here. Send {JSON_TYPES[0]} or {YAML_TYPES[0]}."
        raise ProblemError(415, "unsupported-media-type", detail)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProblemError(400, "malformed-body", f"The body is not UTF-8 ({error.reason}).") from None
    if len(body) <= _QUICK_BYTES:
        return _parse(text, kind in JSON_TYPES, admission)
    # PyYAML is slow on large texts; a thread keeps other requests going.
    return await asyncio.to_thread(_parse, text, kind in JSON_TYPES, admission)


def _parse(text: str, is_json: bool, admission: Admission) -> JobSpec:
    data = _read_json(text) if is_json else read_yaml(text, "body")
    try:
        # JSON and YAML can hold invalid Unicode (a lone surrogate), or nest too deeply to serialize.
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        problem = ConfigError("body", None, f"holds what JSON cannot ({type(error).__name__})", "Use plain values.")
        raise InvalidJobError([problem]) from None
    try:
        job = parse_job(data)
    except ValidationError as error:  # pragma: no cover - parse_job turns them into its own
        raise InvalidJobError([ConfigError("job", None, str(error), "See /v1/schema.")]) from None
    admission.check(job)
    return admission.complete(job)


def _read_json(text: str) -> Mapping[str, Any]:
    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return data

    try:
        data = json.loads(text, object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ProblemError(400, "malformed-body", f"The body is not valid JSON: {why}.") from None
    if not isinstance(data, dict):
        raise ProblemError(400, "malformed-body", "The body is not a JSON object. Send the job file as it is.")
    return data


async def check_thoroughly(job: JobSpec) -> list[str]:
    """Check models, task and tokenizer as a start would. Returns what cannot be checked yet.

    Raises:
        ConfigError: the job cannot work.
        DeadlineError: the check took too long.
    """
    if missing := builtin_models_missing(job):
        return [f"the built-in models of {name!r} are made when the job starts" for name in missing]
    async with _CHECKING:
        try:
            await asyncio.wait_for(asyncio.to_thread(_check, job), CHECK_SECONDS)
        except TimeoutError:
            raise DeadlineError("the check of the job", CHECK_SECONDS, "Submit it without dry_run.") from None
        except JackpotError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            # A user's own task may raise anything on parameters that it does not expect.
            problem = f"the task cannot be built ({type(error).__name__}: {error})"
            raise ConfigError("task.params", None, problem, "Correct the task's parameters.") from None
    return []


def _check(job: JobSpec) -> None:
    check_weight_store(job)
    resolved = resolve_models(job)
    check_models(resolved)
    validate_job(resolved)


def read_labels(texts: Sequence[str]) -> dict[str, str]:
    """Labels written ``key=value``.

    Raises:
        ProblemError: one is not of that form, or there are too many.
    """
    labels = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not (_LABEL.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
            remedy = "Write key=value: letters, digits, '.', '_' and '-', at most 63 each; keys in lower case."
            wrong = FieldProblem(field="label", problem="is not a label", remedy=remedy, value=text[:140])
            raise ProblemError(422, "invalid-parameter", "A label cannot work; see errors.", errors=[wrong])
        labels[key] = value
    if len(labels) > MAX_LABELS:
        raise ProblemError(422, "invalid-parameter", f"A job has at most {MAX_LABELS} labels; there are {len(labels)}.")
    return labels


def fingerprint(job: JobSpec, priority: int, labels: Mapping[str, str]) -> str:
    """A digest of what a request asks for; it does not depend on how the request is formatted."""
    asked = [job.model_dump(mode="json"), priority, dict(labels)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
