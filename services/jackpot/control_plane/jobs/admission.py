"""Which jobs a server accepts. Its owner decides what a job file may name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from jackpot.config import JobSpec
from jackpot.config.loading import InvalidJobError
from jackpot.errors import ConfigError

DEFAULT_TASKS = ("complement", "jsonl", "reasoning_gym:*")


@dataclass(frozen=True, slots=True)
class Admission:
    """The server's allow-list.

    Args:
        tasks: patterns of task names. Code of the submitter's choice (``python:…``) is not among the defaults.
        roots: directories under which models and data may lie; None allows any path.
        max_processes: rollout and scorer replicas of one job.
        weight_store: ``s3://bucket/prefix``, where jobs keep weights and checkpoints unless they name a place below it;
            None keeps them in the run directories. The server decides, since objects are written with its credentials.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    roots: tuple[Path, ...] | None = None
    max_processes: int = 16
    weight_store: str | None = None

    def check(self, job: JobSpec) -> None:
        """Refuse a job that asks for something this server does not allow.

        Raises:
            InvalidJobError: with every problem.
        """
        problems = [*self._check_task(job), *self._check_paths(job), *self._check_resources(job)]
        if problems:
            raise InvalidJobError(problems)

    def complete(self, job: JobSpec) -> JobSpec:
        """The job with the server's defaults filled in."""
        if self.weight_store is None or job.weights.store is not None:
            return job
        weights = job.weights.model_copy(update={"store": self.weight_store})
        return job.model_copy(update={"weights": weights})

    def _check_task(self, job: JobSpec) -> Sequence[ConfigError]:
        if any(fnmatchcase(job.task.name, pattern) for pattern in self.tasks):
            return ()
        remedy = f"Use one of: {', '.join(self.tasks)}; or ask for it: the server is started with --allow-task."
        return (ConfigError("task.name", job.task.name, "is not on this server's list of tasks", remedy),)

    def _check_paths(self, job: JobSpec) -> Sequence[ConfigError]:
        named: list[tuple[str, object]] = [("policy.model", job.policy.model)]
        if not isinstance(job.actor, str):
            named.append(("actor.model", job.actor.model))
        if job.task.name == "jsonl":
            named += [
                (f"task.params.{key}", job.task.params[key]) for key in ("path", "eval_path") if key in job.task.params
            ]
        checked = (self._check_path(field, value) for field, value in named)
        return [problem for problem in checked if problem is not None]

    def _check_path(self, field: str, value: object) -> ConfigError | None:
        if not isinstance(value, str) or "\0" in value:
            return ConfigError(field, repr(value)[:80], "is not a path", "Write the path as a string.")
        if value.startswith("builtin:"):
            return None
        path = Path(value)
        if len(value) > 4096:
            return ConfigError(field, f"{value[:80]}…", "is too long for a path", "Write where it lies on the server.")
        if not path.is_absolute():
            remedy = "Write where it lies on the server, from / on, or builtin:<recipe>/<name>."
            return ConfigError(field, value, "is a relative path, which means nothing to the server", remedy)
        resolved = path.resolve()  # resolved before the comparison: neither .. nor a link leads out of a root
        if self.roots is None or any(resolved.is_relative_to(root.resolve()) for root in self.roots):
            remedy = "Write where it lies on the server."
            return None if resolved.exists() else ConfigError(field, value, "does not exist on the server", remedy)
        where = ", ".join(str(root) for root in self.roots) or "nowhere (only builtin: models are served)"
        remedy = "Put it there, or ask for it: the server is started with --root."
        return ConfigError(field, value, f"does not lie where this server takes models and data from: {where}", remedy)

    def _check_resources(self, job: JobSpec) -> Sequence[ConfigError]:
        problems = []
        if job.run.directory is not None:
            remedy = "Leave it out: the server keeps each job under its own data directory."
            problems.append(ConfigError("run.directory", job.run.directory, "is the server's to choose", remedy))
        if job.bus.url is not None:
            # The answer does not repeat the address, which may hold a password.
            remedy = "Leave it out: the server gives each job a bus of its own."
            problems.append(ConfigError("bus.url", "…", "is the server's to choose", remedy))
        store = job.weights.store
        if store is not None and not f"{store}/".startswith(f"{self.weight_store or 'none:'}/"):
            remedy = f"Leave it out, or name a place below {self.weight_store}."
            if self.weight_store is None:
                remedy = "Leave it out, or ask for it: the server is started with --weight-store."
            problems.append(ConfigError("weights.store", store, "is the server's to choose", remedy))
        replicas = job.rollout.replicas + job.scorer_replicas
        if replicas > self.max_processes:
            field, value = "rollout.replicas", job.rollout.replicas
            remedy = f"Keep rollout.replicas + scorer.replicas at {self.max_processes} or less."
            problems.append(ConfigError(field, value, f"makes {replicas} replicas, too many for one job", remedy))
        return problems
