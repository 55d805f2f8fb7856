"""The launcher against a real kube-apiserver, with the rights that the chart gives it and no others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from chart_world import NAMESPACE, of_kind, render
from kubernetes_world import CLUSTER
from patience import PATIENCE_SECONDS, TEST_SECONDS
from real_kubernetes import JOBS, JOBSETS, ApiServer, real_api_server

from jackpot.config import JobSpec, parse_job
from jackpot.control_plane.launch.kubernetes import pod
from jackpot.control_plane.launch.kubernetes.launcher import KubernetesLauncher
from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings
from jackpot.errors import JackpotError
from jackpot.storage.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_SECONDS)]

JOB_ID = "chain-sum-1123-1"
NAME = f"j-{JOB_ID}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    binding = next(one for one in of_kind(render(), "RoleBinding") if one["subjects"][0]["name"].endswith("plane"))
    with real_api_server(tmp_path_factory.mktemp("kubernetes"), binding["subjects"][0]["name"]) as one:
        yield one


@pytest.fixture
def launcher(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubernetesLauncher:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    if server.minor_version < 24:  # gRPC probes, which it does not know, would be probes of nothing to it
        monkeypatch.setattr(pod, "_probes", lambda job: {})
    cluster = ClusterSettings.model_validate(CLUSTER | {"namespace": NAMESPACE})
    return KubernetesLauncher(RunDirectory.create(tmp_path / JOB_ID, JOB_ID, job()), job(), cluster, None)


def job() -> JobSpec:
    models = {"policy": {"model": "/models/policy"}, "actor": {"model": "/models/actor"}}
    return parse_job({"name": "chain-sum", **models, "task": {"name": "complement"}, "rollout": {"replicas": 2}})


@asynccontextmanager
async def controllers(server: ApiServer) -> AsyncIterator[None]:
    """Run what Kubernetes' controllers would do: pods come up, and what is deleted goes."""

    def act() -> None:
        for one in server.get(JOBSETS)["items"]:
            if "status" not in one:
                up = {"replicatedJobsStatus": [{"name": "learner", "ready": 1}, {"name": "orchestrator", "ready": 1}]}
                server.patch(f"{JOBSETS}/{one['metadata']['name']}/status", {"status": up})
        server.collect_garbage(JOBS)
        server.collect_garbage(JOBSETS)

    async def run() -> None:
        while True:
            await asyncio.to_thread(act)
            await asyncio.sleep(0.1)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.1)


async def scaled_in_the_end(launcher: KubernetesLauncher, replicas: int) -> None:
    """As a session does: what is refused is asked for again."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await launcher.scale(replicas)
            except JackpotError as error:
                assert "409" in str(error)
                await asyncio.sleep(0.1)


def names(server: ApiServer, path: str) -> set[str]:
    return {one["metadata"]["name"] for one in server.get(path)["items"]}


async def test_without_rights_it_says_what_was_refused(launcher: KubernetesLauncher) -> None:
    """The first test of all: afterwards the account has its rights."""
    with pytest.raises(JackpotError, match=r"the JobSet was refused: 403 Forbidden"):
        await launcher.start()
    await launcher._api.close()


async def test_a_job_is_made_scaled_and_removed_with_the_rights_of_the_chart(
    server: ApiServer, launcher: KubernetesLauncher, tmp_path: Path
) -> None:
    server.grant()
    async with controllers(server):
        await launcher.start()
        assert names(server, JOBSETS) == {NAME}
        status = await launcher.check()
        assert (status.finished, status.waiting, status.error) == (False, False, None)

        with pytest.raises(JackpotError, match=rf"the Job {NAME}-rollout-0 cannot be resized: 404"):
            await launcher.scale(4)  # JobSet's controller has not made its Jobs yet
        own = server.get(f"{JOBSETS}/{NAME}")["spec"]["replicatedJobs"][1]["template"]
        metadata = {"name": f"{NAME}-rollout-0", "labels": own["metadata"]["labels"]}
        server.create(JOBS, {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": own["spec"]})
        for _ in range(2):  # repeating does no harm
            await launcher.scale(4)
            assert names(server, JOBS) == {f"{NAME}-{one}" for one in ("rollout-0", "joined-2", "joined-3")}
        joined = server.get(f"{JOBS}/{NAME}-joined-3")
        assert joined["metadata"]["ownerReferences"][0]["uid"] == server.get(f"{JOBSETS}/{NAME}")["metadata"]["uid"]
        uids = {one: server.get(f"{JOBS}/{NAME}-{one}")["metadata"]["uid"] for one in ("joined-2", "joined-3")}
        await launcher.scale(2)
        await scaled_in_the_end(launcher, 4)  # while the two are going away
        after = {one: server.get(f"{JOBS}/{NAME}-{one}")["metadata"] for one in uids}
        assert all(after[one]["uid"] != uid and "deletionTimestamp" not in after[one] for one, uid in uids.items())
        await launcher.scale(2)
        await until(lambda: names(server, JOBS) == {f"{NAME}-rollout-0"}, "two replicas to leave")

        done = {"conditions": [{"type": "Completed", "status": "True", "reason": "AllJobsCompleted", "message": ""}]}
        server.patch(f"{JOBSETS}/{NAME}/status", {"status": done})
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (await launcher.check()).finished:
                await asyncio.sleep(0.1)
        await launcher.stop()
    assert names(server, JOBSETS) == set()


def test_the_account_may_do_nothing_else(server: ApiServer) -> None:
    allowed = [("GET", JOBSETS), ("GET", JOBS), ("GET", f"/api/v1/namespaces/{NAMESPACE}/pods")]
    assert [server.as_launcher(*one) for one in allowed] == [200, 200, 200]
    core = f"/api/v1/namespaces/{NAMESPACE}"
    refused = [
        ("GET", f"{core}/secrets"),
        ("POST", f"{core}/pods"),
        ("DELETE", f"{core}/pods/any"),
        ("GET", f"{core}/configmaps"),
        ("GET", JOBS.replace(NAMESPACE, "default")),
        ("GET", JOBSETS.replace(NAMESPACE, "default")),
        ("GET", "/api/v1/nodes"),
    ]
    assert {(one, server.as_launcher(*one)) for one in refused} == {(one, 403) for one in refused}
