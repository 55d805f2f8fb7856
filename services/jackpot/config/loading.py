"""Parses a file or mapping and dotted overrides into a :class:`JobSpec`; errors name field, value and remedy."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jackpot.config.algorithm import NAMED_SECTIONS
from jackpot.config.job import JobSpec
from jackpot.errors import ConfigError

MAX_JOB_FILE_BYTES = 1 << 20


class InvalidJobError(ConfigError):
    """One or more settings of a job file cannot work; ``problems`` holds them all."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        self.problems = tuple(problems)
        first = problems[0]
        super().__init__(first.field, first.value, first.problem, first.remedy)
        self.args = ("\n".join(str(problem) for problem in problems),)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines of nested ones expand to gigabytes), with 1e-3 read as a number and dates
    left as text (JSON has none)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in job files")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 reads 1e-3 as a string because it has no dot; every author means the number.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

# Errors of PyYAML on bad input besides its own: !!int abc, unhashable keys, thousands of brackets.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError)


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a YAML or JSON job file and apply ``a.b=value`` overrides.

    Relative model and data paths are resolved from the job file's directory, so that a job runs from anywhere.

    Raises:
        InvalidJobError: the file cannot be read or a setting cannot work.
    """
    try:
        if path.stat().st_size > MAX_JOB_FILE_BYTES:
            raise InvalidJobError([ConfigError("job file", str(path), "is larger than 1 MiB", "Is it a job file?")])
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJobError(
            [
                ConfigError(
                    "job file",
                    str(path),
                    f"cannot be read ({error})",
                    "Give the path of a YAML or JSON job file.",
                )
            ]
        ) from None
    return parse_job(read_yaml(text, str(path)), overrides, base=path.parent)


def parse_job(data: Mapping[str, Any], overrides: Sequence[str] = (), *, base: Path | None = None) -> JobSpec:
    """Validate a mapping as a job.

    Raises:
        InvalidJobError: with every problem found, each naming field, value and remedy.
    """
    merged = _apply_overrides(dict(data), overrides)
    try:
        job = JobSpec.model_validate(merged)
    except ValidationError as error:
        # A mapping for `actor` is checked only against its section, anything else only against the word 'policy'.
        details = [
            d
            for d in error.errors()
            if not (d["type"] == "literal_error" and isinstance(d["input"], dict))
            and d["loc"] != ("actor", "ActorConfig")
        ]
        raise InvalidJobError([_explain(detail) for detail in details]) from None
    return job if base is None else _resolve_paths(job, base)


def job_json_schema() -> dict[str, Any]:
    """JSON Schema of the job file, for editors and for the REST API."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}


def read_yaml(text: str, where: str) -> Mapping[str, Any]:
    """A YAML or JSON text as a mapping of settings, not validated yet.

    Args:
        text: of the job file.
        where: it comes from, for the message.

    Raises:
        InvalidJobError: it is not YAML, not a mapping, or could expand without bound (aliases, endless nesting).
    """
    try:
        data = yaml.load(text, Loader=_PlainLoader)
    except _YAML_ERRORS as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InvalidJobError(
            [ConfigError("job file", where, f"is not valid YAML: {problem}", "Correct the line.")]
        ) from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InvalidJobError(
            [ConfigError("job file", where, "is not a mapping of settings", "Start from examples/demo.yaml.")]
        )
    return data


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(part.strip() for part in dotted.split(".")):
            raise InvalidJobError(
                [ConfigError("override", override, "is not of the form key=value", "Write e.g. learner.lr=1e-3.")]
            )
        try:
            value = yaml.load(text, Loader=_PlainLoader)
        except _YAML_ERRORS:
            value = text  # not YAML: passed on as text, for the field to check
        *parents, leaf = dotted.strip().split(".")
        node = data
        for parent in parents:
            child = node.get(parent)
            shorthand = {"name": child} if parent in NAMED_SECTIONS and isinstance(child, str) else {}
            node[parent] = dict(child) if isinstance(child, dict) else shorthand
            node = node[parent]
        node[leaf] = value
    return data


def _explain(detail: ErrorDetails) -> ConfigError:
    location = [str(part) for part in detail["loc"]]
    field, value, kind, context = _readable(location) or "job", detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return ConfigError(field, value, "unknown key", _suggest(location[-1], _fields_at(location[:-1])))
    if kind == "missing":
        return ConfigError(field, None, "is required", f"Add {field} to the job file.")
    if kind == "union_tag_invalid":
        names = re.findall(r"'([^']+)'", context["expected_tags"])
        return ConfigError(f"{field}.name", context["tag"], "unknown name", _suggest(context["tag"], names))
    if kind in ("model_type", "model_attributes_type"):
        return ConfigError(field, value, "is not a mapping of settings", _suggest("", _fields_at(location)))
    if field == "actor":
        return ConfigError(field, value, "unknown actor", "Write 'policy', or a mapping with the actor's model.")
    message = detail["msg"].removeprefix("Value error, ")
    problem, dot, remedy = message.rpartition(". ")
    if kind == "value_error" and dot:
        return ConfigError(field, value, problem, remedy + ".")
    remedy = f"Use one of {context['expected']}." if "expected" in context else _SEE_SCHEMA
    return ConfigError(field, value, message[0].lower() + message[1:], remedy)


_SEE_SCHEMA = "See `jackpot schema` for what is accepted."


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."


def _readable(location: Sequence[str]) -> str:
    # Pydantic puts the name of the union's branch into the path; users never wrote it.
    branches = {"function-before", "ActorConfig", "literal['policy']"}.union(*NAMED_SECTIONS.values())
    return ".".join(part for part in location if part not in branches and not part.startswith("function-"))


def _fields_at(location: Sequence[str]) -> list[str]:
    models: list[type[BaseModel]] = [JobSpec]
    for part in location:
        inner = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
        # In a union, the next part of the location is the branch's name.
        branch = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        models = inner or branch or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _resolve_paths(job: JobSpec, base: Path) -> JobSpec:
    def resolve(text: str) -> str:
        return text if text.startswith("builtin:") else str((base / Path(text).expanduser()).resolve())

    update: dict[str, Any] = {"policy": job.policy.model_copy(update={"model": resolve(job.policy.model)})}
    if not isinstance(job.actor, str):
        update["actor"] = job.actor.model_copy(update={"model": resolve(job.actor.model)})
    if job.task.name == "jsonl":
        params = {
            k: resolve(v) if k in ("path", "eval_path") and isinstance(v, str) else v
            for k, v in job.task.params.items()
        }
        update["task"] = job.task.model_copy(update={"params": params})
    return job.model_copy(update=update)
