"""Jobs on a cluster, from the REST request to the trained model: real requests, real processes from the pods' specs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes_world import CLUSTER, Cluster, running_cluster
from patience import TEST_SECONDS
from server_world import Server, jackpot, running_server, tiny_job

from jackpot.bus.server import EmbeddedServer

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(CLUSTER), encoding="utf-8")
    return path


@pytest.fixture
def store_url(tmp_path: Path) -> Iterator[str]:
    """A store of one test alone: servers on one store share its jobs."""
    server = EmbeddedServer(tmp_path / "store", appendfsync="always")
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture
def options(cluster_file: Path, monkeypatch: pytest.MonkeyPatch, store_url: str) -> tuple[str, ...]:
    monkeypatch.setenv("JACKPOT_STORE_URL", store_url)
    return ("--launcher", "kubernetes", "--cluster", str(cluster_file))


def volume(tmp_path: Path) -> Path:
    """Both the control plane's data directory and what pods mount."""
    directory = tmp_path / "data"
    directory.mkdir()
    return directory


def jobset_is_up(cluster: Cluster, count: int = 1) -> Callable[[], bool]:
    return lambda: len(cluster.jobsets) == count


@pytest.mark.slow
def test_a_job_trains_as_a_jobset_while_the_server_is_killed_and_a_pod_dies(
    tmp_path: Path, make_model: MakeModel, options: tuple[str, ...], store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = volume(tmp_path)
    with running_cluster(data, {("jackpot-redis", "url"): store_url}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        with running_server(data, *options) as server:
            with server.client() as client:
                job = client.submit(tiny_job(tmp_path, make_model, scorer=True, steps=60))
            run = data / "runs" / job.id
            server.wait_until(lambda: step(run) >= 3, "the third step")
            # A crash of the control plane's pod takes the session with it; the JobSet goes on.
            for process in server.sessions():
                process.kill()
            server.kill()
            assert cluster.nodes is not None
            scorer = next(pod for pod in cluster.nodes.pods if pod.role == "scorer")
            os.kill(scorer.process.pid, signal.SIGKILL)
            server.start()
            with server.client() as client:
                server.wait_until(lambda: client.job(job.id).state.finished, "the job's end")
                detail, ledger = client.job(job.id), client.ledger(job.id)
                logs = "".join(client.logs(job.id, service="learner"))
    assert detail.state == "succeeded", detail
    assert (detail.losses, detail.session) == (0, 2)
    assert ledger["trained"] == 120 and ledger["open"] == 0
    assert "all 60 steps trained and exported" in logs
    assert (run / "logs" / "rollout-0.log").stat().st_size > 0
    assert "FailedScheduling: 0/3 nodes are available" in (run / "logs" / "launcher.log").read_text()
    created = [request for request in cluster.requests if request.startswith("POST")]
    assert len(created) == 2, "the second session asked for it again, and took over what was there"
    assert cluster.jobsets == {}, "a finished job leaves nothing behind"


def test_a_job_is_cancelled_while_it_waits_for_admission_and_resumed(
    tmp_path: Path, make_model: MakeModel, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = volume(tmp_path)
    with running_cluster(data) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        with running_server(data, *options) as server, server.client() as client:
            job = client.submit(tiny_job(tmp_path, make_model))
            server.wait_until(jobset_is_up(cluster), "the JobSet")
            (name,) = cluster.jobsets
            cluster.set_status(name, {"conditions": [{"type": "Suspended", "status": "True"}]})
            assert client.job(job.id).state == "starting"
            client.cancel(job.id)
            server.wait_until(lambda: client.job(job.id).state == "cancelled", "the job to be cancelled")
            assert cluster.jobsets == {}
            client.resume(job.id)
            server.wait_until(jobset_is_up(cluster), "the JobSet of the second session")
            cluster.forget_history = 1  # the next watch is told that its version is too old
            up = {"replicatedJobsStatus": [{"name": "learner", "ready": 1}]}
            cluster.set_status(name, up)
            server.wait_until(lambda: client.job(job.id).state == "running", "the job to run")
            why = {"type": "Failed", "status": "True", "reason": "FailJobSetAction", "message": "learner gave up"}
            cluster.set_status(name, {"conditions": [why]})
            server.wait_until(lambda: client.job(job.id).state == "failed", "the job to fail")
            detail = client.job(job.id)
    assert detail.error is not None and "its JobSet failed (FailJobSetAction: learner gave up)" in detail.error
    assert cluster.jobsets == {}


def test_of_two_servers_one_leads_and_the_other_takes_over(
    tmp_path: Path, make_model: MakeModel, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = volume(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (data / "runs").mkdir()
    (other / "runs").symlink_to(data / "runs")
    with running_cluster(data) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        with (
            running_server(data, *options) as first,
            running_server(other, *options) as second,
            second.client() as client,
        ):
            job = client.submit(tiny_job(tmp_path, make_model))  # by way of the one that does not lead
            first.wait_until(jobset_is_up(cluster), "the JobSet")
            assert len(sessions(first)) == 1 and not sessions(second)
            kill_all(first)
            (name,) = cluster.jobsets
            cluster.set_status(name, {"replicatedJobsStatus": [{"name": "learner", "ready": 1}]})
            second.wait_until(lambda: client.job(job.id).state == "running", "the second server to lead")
            assert client.job(job.id).session == 2 and len(cluster.jobsets) == 1
            client.cancel(job.id)
            second.wait_until(lambda: client.job(job.id).state == "cancelled", "the job to be cancelled")


def step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def sessions(server: Server) -> list[int]:
    parent = server.process.pid
    return [process.pid for process in server.sessions() if process.ppid() == parent]


def kill_all(server: Server) -> None:
    """As a node's failure would."""
    children = server.sessions()
    server.kill()
    for process in children:
        process.kill()


@pytest.mark.slow
def test_rollout_replicas_join_and_leave_a_running_jobset(
    tmp_path: Path, make_model: MakeModel, options: tuple[str, ...], store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = volume(tmp_path)
    with running_cluster(data, {("jackpot-redis", "url"): store_url}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        nodes = cluster.nodes
        assert nodes is not None

        def rollouts() -> list[tuple[int, bool]]:
            alive = [pod for pod in nodes.pods if pod.role == "rollout" and pod.phase == "Running"]
            return sorted((pod.index, pod.joined) for pod in alive)

        with running_server(data, *options) as server:
            with server.client() as client:
                job_file = tiny_job(tmp_path, make_model, steps=5000)
                job = client.submit(job_file | {"rollout": {"replicas": 2}})
                run = data / "runs" / job.id
                server.wait_until(lambda: step(run) >= 2, "the second step")
                client.scale(job.id, 3)
            server.wait_until(lambda: (run / "rollouts" / "2.json").exists(), "the third replica's announcement")
            log = run / "logs" / "rollout-2.log"
            server.wait_until(lambda: log.exists() and " ready" in log.read_text(), "its log")
            assert rollouts() == [(0, False), (1, False), (2, True)]
            # The control plane's crash changes nothing, and what was asked for meanwhile is carried out after it.
            for process in server.sessions():
                process.kill()
            server.kill()
            assert jackpot("scale", str(run), "1", url="").returncode == 0
            server.start()
            with server.client() as client:
                server.wait_until(lambda: rollouts() == [(0, False)], "two replicas to leave")
                assert cluster.jobs == {} and not (run / "rollouts" / "2.json").exists()
                before = step(run)
                server.wait_until(lambda: step(run) > before + 2, "training to go on")
                client.scale(job.id, 4)
                server.wait_until(lambda: len(rollouts()) == 4, "four replicas")
                client.cancel(job.id)
                server.wait_until(lambda: client.job(job.id).state.finished, "the end")
    assert cluster.jobsets == {} and cluster.jobs == {}
