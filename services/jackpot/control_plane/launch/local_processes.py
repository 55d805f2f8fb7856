"""The processes of a job on one machine, and the settings that each receives."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.control_plane.launch.supervision import Deaths

ROLLOUT = "rollout"


@dataclass(slots=True)
class LocalProcess:
    """One supervised process."""

    name: str
    service: str
    environment: ServiceEnvironment
    deaths: Deaths
    popen: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    end_at: float = 0.0  # when a process that was asked to leave is killed
    finished: bool = False


@dataclass(frozen=True)
class LocalPlan:
    """The settings of one job's processes.

    Args:
        job: the job as resolved.
        job_id: its id.
        run_dir: its directory.
        sockets: directory of the unix sockets. They need no free port, and only this user can connect.
        bus_url_of: the bus's address for a service.
        metrics_host: name by which a Prometheus on another host reaches this one; empty if none does.
    """

    job: JobSpec
    job_id: str
    run_dir: Path
    sockets: Path
    bus_url_of: Callable[[str], str]
    metrics_host: str
    threads: int = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        working = job.rollout.replicas + job.scorer_replicas + 2  # the evaluator and the learner, too
        object.__setattr__(self, "threads", job.run.threads_per_process or max(1, (os.cpu_count() or 1) // working))

    def processes(self) -> list[LocalProcess]:
        """All processes that the job begins with."""
        job = self.job
        rollouts = tuple(self._socket(f"rollout-{index}") for index in range(job.rollout.replicas))
        broadcast_to = () if job.weights.transport == "store" else rollouts
        return [
            self._process("learner", "learner", {"rollout_addresses": broadcast_to}),
            *(self._rollout(index) for index in range(job.rollout.replicas)),
            self._process(
                "evaluator",
                "rollout",
                {"instance": "evaluator", "role": "policy", "listen": self._socket("evaluator")},
            ),
            *(
                self._process(
                    f"scorer-{index}", "scorer", {"instance": str(index), "listen": self._socket(f"scorer-{index}")}
                )
                for index in range(job.scorer_replicas)
            ),
            self._process(
                "orchestrator",
                "orchestrator",
                {"rollout_addresses": rollouts, "evaluator_address": self._socket("evaluator")},
            ),
        ]

    def joining_rollout(self, index: int) -> LocalProcess:
        """A rollout replica beyond the job's initial ones: it announces itself."""
        return self._rollout(index, advertise_address=self._socket(f"rollout-{index}"))

    def _rollout(self, index: int, **settings: object) -> LocalProcess:
        told = {"instance": str(index), "role": self.job.rollout_role, "listen": self._socket(f"rollout-{index}")}
        return self._process(f"rollout-{index}", ROLLOUT, {**told, **settings})

    def _socket(self, name: str) -> str:
        return f"unix:{self.sockets}/{name}.sock"

    def _process(self, name: str, service: str, settings: Mapping[str, object]) -> LocalProcess:
        common: dict[str, object] = {
            "run_dir": self.run_dir,
            "job_id": self.job_id,
            "threads": self.threads,
            # Each process takes a free port and writes it down for Prometheus.
            "metrics_address": "0.0.0.0:0" if self.metrics_host else "127.0.0.1:0",
            "metrics_host": self.metrics_host,
            # Rollouts never use the bus: they receive neither its address nor its password.
            "redis_url": "" if service == ROLLOUT else self.bus_url_of(service),
        }
        environment = ServiceEnvironment.model_validate({**common, **settings})
        return LocalProcess(name, service, environment, Deaths(self.job.run.max_restarts))
