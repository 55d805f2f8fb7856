"""Which launcher jobs get. The server decides once, at its start; sessions read it from their environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jackpot.config import JobSpec
from jackpot.control_plane.launch.launcher import Launcher
from jackpot.control_plane.launch.local_launcher import LocalLauncher
from jackpot.errors import ConfigError
from jackpot.storage.run_directory import RunDirectory

CLUSTER_VARIABLE = "JACKPOT_CLUSTER_SETTINGS"
BUS_VARIABLE = "JACKPOT_BUS_URL"
BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class LauncherChoice:
    """Makes a launcher for each session of a job.

    Args:
        cluster: settings of the cluster that jobs run on; None runs them on this machine.
        bus_url: the cluster's bus as seen from here.
    """

    cluster: Path | None = None
    bus_url: str | None = None

    @property
    def jobs_outlive_sessions(self) -> bool:
        """Whether a job goes on when its session's process dies."""
        return self.cluster is not None

    @property
    def stop_seconds(self) -> float:
        """How long a session may take to stop its job before it is killed."""
        return 45.0 if self.cluster is None else 360.0

    def check_job(self, job: JobSpec) -> None:
        """Refuse a job that cannot run with this launcher.

        Raises:
            ConfigError: it names built-in models, and jobs run on a cluster.
        """
        models = {"policy.model": job.policy.model} | (
            {} if isinstance(job.actor, str) else {"actor.model": job.actor.model}
        )
        for field, model in models.items():
            if self.cluster is not None and model.startswith(BUILTIN):
                remedy = "Put models on the model volume and name their directories under /var/lib/jackpot/models."
                raise ConfigError(field, model, "is made with torch, which the control plane does not have", remedy)

    def check(self) -> None:
        """Refuse settings that cannot work, before the first job runs into them.

        Raises:
            ConfigError: the cluster's settings cannot be read, or the client library is not installed.
        """
        if self.cluster is None:
            return
        from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings

        ClusterSettings.load(self.cluster)
        try:
            import kubernetes_asyncio  # noqa: F401
        except ImportError:
            remedy = "Install it: pip install 'jackpot[kubernetes]'."
            raise ConfigError("--launcher", "kubernetes", "needs the Kubernetes client", remedy) from None

    def to_env(self) -> dict[str, str]:
        """The variables that :meth:`from_env` reads back."""
        given = {CLUSTER_VARIABLE: self.cluster, BUS_VARIABLE: self.bus_url}
        return {name: str(value) for name, value in given.items() if value is not None}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> LauncherChoice:
        """The choice that the server handed to a session."""
        variables = os.environ if environ is None else environ
        cluster = variables.get(CLUSTER_VARIABLE)
        return cls(Path(cluster) if cluster else None, variables.get(BUS_VARIABLE) or None)

    def launcher(self, run: RunDirectory, job: JobSpec) -> Launcher:
        """The launcher of one session.

        Raises:
            ConfigError: the cluster's settings cannot be read.
        """
        if self.cluster is None:
            return LocalLauncher(run, job)
        from jackpot.control_plane.launch.kubernetes.launcher import KubernetesLauncher
        from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings

        return KubernetesLauncher(run, job, ClusterSettings.load(self.cluster), self.bus_url)
