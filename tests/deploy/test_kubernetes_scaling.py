"""Scaling a job on a cluster: what is asked of the API server when Jobs of before are still going away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kubernetes_world import CLUSTER, Cluster, running_cluster
from patience import TEST_SECONDS

from jackpot.config import parse_job
from jackpot.control_plane.launch.kubernetes.jobset import jobset
from jackpot.control_plane.launch.kubernetes.launcher import KubernetesLauncher
from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings
from jackpot.errors import JackpotError
from jackpot.storage.run_directory import RunDirectory

pytestmark = pytest.mark.timeout(TEST_SECONDS)

JOB_ID = "chain-sum-1123-1"
NAME = f"j-{JOB_ID}"
JOB = parse_job(
    {
        "name": "chain-sum",
        "policy": {"model": "/models/policy"},
        "actor": {"model": "/models/actor"},
        "task": {"name": "complement"},
        "rollout": {"replicas": 2},
    }
)
SETTINGS = ClusterSettings.model_validate(CLUSTER)
JOINED = {f"{NAME}-joined-2", f"{NAME}-joined-3"}


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    with running_cluster(tmp_path) as one:
        monkeypatch.setenv("KUBECONFIG", str(one.kubeconfig))
        yield one


@pytest.fixture
async def launcher(cluster: Cluster, tmp_path: Path) -> AsyncIterator[KubernetesLauncher]:
    one = KubernetesLauncher(RunDirectory.create(tmp_path / JOB_ID, JOB_ID, JOB), JOB, SETTINGS, None)
    await one._api.connect()
    await one._api.create(jobset(JOB_ID, JOB, SETTINGS))
    yield one
    await one._api.close()


async def test_a_replica_that_is_still_leaving_is_asked_for_again(
    cluster: Cluster, launcher: KubernetesLauncher
) -> None:
    cluster.jobs_linger = True
    await launcher.scale(4)
    assert cluster.jobs.keys() == JOINED
    await launcher.scale(2)
    with pytest.raises(JackpotError, match=rf"the Job {NAME}-joined-2 was refused: 409"):
        await launcher.scale(4)
    cluster.let_go()
    assert cluster.jobs == {}
    await launcher.scale(4)
    assert cluster.jobs.keys() == JOINED


async def test_a_replica_of_an_earlier_jobset_does_not_count(cluster: Cluster, launcher: KubernetesLauncher) -> None:
    await launcher.scale(4)
    cluster.jobsets[NAME]["metadata"]["uid"] = "made-anew"  # and the Jobs of the one before are not collected yet
    with pytest.raises(JackpotError, match=rf"the Job {NAME}-joined-2 was refused: 409"):
        await launcher.scale(4)
    cluster.jobs.clear()
    await launcher.scale(4)
    owners = {job["metadata"]["ownerReferences"][0]["uid"] for job in cluster.jobs.values()}
    assert cluster.jobs.keys() == JOINED and owners == {"made-anew"}
