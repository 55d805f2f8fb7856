"""kill -9 of the control plane: nothing acknowledged is lost, and jobs go on."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from server_world import TINY_JOB, running_server, standing_still, tiny_job

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]


@pytest.mark.slow
def test_a_killed_server_takes_its_running_job_over(tmp_path: Path, make_model: MakeModel) -> None:
    with running_server(tmp_path / "data") as server, server.client() as client:
        job_id = client.submit(tiny_job(tmp_path, make_model, steps=30, checkpoint_every=5)).id
        server.wait_until(lambda: client.job(job_id).progress.step >= 3, "step 3")
        (session,) = server.sessions()
        steps: list[int] = []

        def follow() -> None:
            steps.extend(event.data["step"] for event in client.events(job_id) if event.name == "step")

        follower = threading.Thread(target=follow)
        follower.start()
        with standing_still(session):
            server.kill()
            server.start()
            assert session.is_running() and server.sessions() == [session]
        follower.join(PATIENCE_SECONDS)
        assert not follower.is_alive(), f"the job did not end in time\n{server.log()}"
        job = client.job(job_id)
        assert job.state == "succeeded", server.log()
        assert job.session == 1 and job.losses == 0  # taken over, not started again
        assert steps == list(range(1, 31))  # the follower saw every step once, through the restart
        ledger = client.ledger(job_id)
        assert ledger["trained"] == 60 and ledger["open"] == 0
        assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values())


@pytest.mark.slow
def test_a_job_that_was_lost_with_the_server_is_resumed_by_policy(tmp_path: Path, make_model: MakeModel) -> None:
    with running_server(tmp_path / "data") as server, server.client() as client:
        job_id = client.submit(tiny_job(tmp_path, make_model, steps=60, checkpoint_every=2)).id
        server.wait_until(lambda: client.job(job_id).progress.step >= 3, "step 3")
        (session,) = server.sessions()
        server.kill()
        session.kill()
        server.start()
        job = client.wait(job_id)
        assert job.state == "succeeded", server.log()
        assert job.session == 2 and job.losses == 1
        assert any("resumes by itself" in step.reason for step in job.transitions)
        ledger = client.ledger(job_id)
        assert ledger["trained"] == 120
        assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["open"]
        resumed = json.loads((server.data_dir / "runs" / job_id / "resumed.json").read_text())
        assert resumed["resumed_from_step"] >= 2


def test_every_submit_that_was_answered_survives_a_kill_and_none_is_there_twice(tmp_path: Path) -> None:
    with running_server(tmp_path / "data", "--slots", "1", "--rate-limit", "0") as server:
        blocker = httpx.post(f"{server.url}/v1/jobs", json=TINY_JOB | {"name": "first"}, params={"priority": 9}).json()
        answered: dict[str, str] = {}
        killed = threading.Event()

        def submit(worker: int) -> None:
            with httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS) as http:
                for number in range(10_000):
                    key = f"{worker}-{number}"
                    try:
                        answer = http.post("/v1/jobs", json=TINY_JOB, headers={"Idempotency-Key": key})
                    except httpx.TransportError:
                        pending.append(key)
                        return
                    assert answer.status_code == 201, answer.text
                    answered[key] = answer.json()["id"]
                    if killed.is_set():
                        return

        pending: list[str] = []
        workers = [threading.Thread(target=submit, args=(worker,)) for worker in range(4)]
        for worker in workers:
            worker.start()
        server.wait_until(lambda: len(answered) >= 40, "40 submits")
        server.kill()
        killed.set()
        for worker in workers:
            worker.join(PATIENCE_SECONDS)
        server.start()
        with server.client() as client:
            assert client.job(blocker["id"]).name == "first"
            known = {job.id for job in client.jobs()}
            assert set(answered.values()) <= known
            # Whoever got no answer asks again with the same key: whether the first try was stored or not, one job.
            for key in pending:
                first = client.submit(TINY_JOB, idempotency_key=key).id
                assert client.submit(TINY_JOB, idempotency_key=key).id == first
            jobs = [job.id for job in client.jobs()]
            assert len(jobs) == len(set(jobs)) == 1 + len(answered) + len(pending)


def test_a_session_that_keeps_vanishing_counts_as_failed(tmp_path: Path) -> None:
    with running_server(tmp_path / "data", "--max-losses", "1") as server, server.client() as client:
        job_id = client.submit(TINY_JOB).id
        for number in (1, 2):
            server.wait_until(lambda n=number: client.job(job_id).session == n and bool(server.sessions()), "a session")
            for session in server.sessions():
                os.kill(session.pid, signal.SIGKILL)
        job = client.wait(job_id)
        assert job.state == "failed" and job.losses == 2
        assert job.error is not None and "resume" in job.error
