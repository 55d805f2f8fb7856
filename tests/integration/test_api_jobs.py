"""Jobs through the control plane, as users run them: `jackpot serve`, the client, the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from patience import PATIENCE_SECONDS, TEST_SECONDS
from server_world import Server, jackpot, running_server, tiny_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from jackpot.client import AsyncClient
from jackpot.errors import ApiError

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("platform") / "data") as one:
        yield one


@pytest.mark.slow
def test_a_job_is_followed_to_success_and_its_model_loads(
    server: Server, tmp_path: Path, make_model: MakeModel
) -> None:
    with server.client() as client:
        job = client.submit(tiny_job(tmp_path, make_model, scorer=True, steps=6), labels={"team": "a"}, priority=1)
        events = list(client.events(job.id))
        states = [event.data["state"] for event in events if event.name == "state"]
        assert states[0] == "queued" and states[-1] == "succeeded", server.log()
        assert [event.data["step"] for event in events if event.name == "step"] == [1, 2, 3, 4, 5, 6]
        assert events[-1].name == "end"
        # Back in the middle: what follows, and nothing twice.
        middle = next(index for index, event in enumerate(events) if event.data.get("step") == 3)
        rest = [event.data for event in client.events(job.id, events[middle].id)]
        assert sorted(map(str, rest)) == sorted(str(event.data) for event in events[middle + 1 :])
        ledger = client.ledger(job.id, entries=3)
        assert ledger["trained"] == 12 and len(ledger["entries"]) == 3
        assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["open"]
        curves = client.metrics(job.id, ["reward/mean", "evaluation/policy_accuracy"], points=3)
        assert curves["reward/mean"]["x"] == [2, 4, 6] and len(curves["reward/mean"]["y"]) == 3
        assert curves["evaluation/policy_accuracy"]["x"][0] == 0
        assert [one["name"] for one in client.checkpoints(job.id)][-1] == "export"
        for name, role in (("export", "policy"), ("00000006", "actor")):
            directory = client.pull(job.id, name, tmp_path / f"{name}-{role}", role)
            AutoModelForCausalLM.from_pretrained(directory)
            assert AutoTokenizer.from_pretrained(directory)("7-3").input_ids
        assert any("step" in line for line in client.logs(job.id, "launcher"))
        assert {line.split(" | ")[0] for line in client.logs(job.id, tail=1)} >= {"learner", "rollout-0", "scorer-0"}
        detail = client.job(job.id)
        assert detail.progress.step == 6 and detail.progress.policy_accuracy is not None
        assert [one.id for one in client.jobs(labels={"team": "a"})] == [job.id]
        with pytest.raises(ApiError, match="succeeded"):
            client.cancel(job.id)
        run_dir = server.data_dir / "runs" / job.id
        assert run_dir.is_dir()
        client.delete(job.id)
        assert not run_dir.exists()


@pytest.mark.slow
def test_a_running_job_is_cancelled_and_resumed_from_the_command_line(
    server: Server, tmp_path: Path, make_model: MakeModel
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_job(tmp_path, make_model, steps=4000, checkpoint_every=1)))
    submitted = jackpot("submit", str(path), "--label", "n=2", "--json", url=server.url)
    assert submitted.returncode == 0, submitted.stderr
    job_id = json.loads(submitted.stdout)["id"]
    with server.client() as client:
        server.wait_until(lambda: client.job(job_id).progress.step >= 2, "step 2")
        assert jackpot("cancel", job_id, url=server.url).returncode == 0
        watched = jackpot("watch", job_id, url=server.url)
        assert watched.returncode == 130 and "cancelled" in watched.stdout
        reached = client.job(job_id).progress.step
        shown = json.loads(jackpot("show", job_id, "--json", url=server.url).stdout)
        assert shown["state"] == "cancelled" and shown["transitions"][-2]["state"] == "stopping"
        again = jackpot("resume", job_id, "--json", url=server.url)
        assert json.loads(again.stdout)["state"] == "queued"
        server.wait_until(lambda: client.job(job_id).progress.step > reached, "a step after the resume")
        assert client.job(job_id).session == 2
        pulled = jackpot("checkpoints", "pull", job_id, "--to", str(tmp_path / "model"), "--json", url=server.url)
        assert pulled.returncode == 0, pulled.stderr
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        jackpot("cancel", job_id, url=server.url)
        listed = jackpot("jobs", "--label", "n=2", "--json", url=server.url)
        assert [job["id"] for job in json.loads(listed.stdout)] == [job_id]
        client.wait(job_id)
        assert not server.sessions()


def test_a_job_that_cannot_start_fails_with_its_reason(server: Server, tmp_path: Path, make_model: MakeModel) -> None:
    job = tiny_job(tmp_path, make_model)
    (tmp_path / "empty").mkdir()
    job["actor"] = {"model": str(tmp_path / "empty")}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(job))
    checked = jackpot("submit", str(path), "--dry-run", url=server.url)
    assert checked.returncode == 2 and "actor.model" in checked.stderr
    followed = jackpot("submit", str(path), "--follow", url=server.url)
    assert followed.returncode == 1
    assert "failed" in followed.stdout and "holds no config.json" in followed.stderr
    assert "Traceback" not in followed.stderr


def test_mistakes_on_the_command_line_are_one_line_each(server: Server, tmp_path: Path) -> None:
    unknown = jackpot("show", "no-such-job", url=server.url)
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: there is no job no-such-job")
    nobody = jackpot("jobs", url="http://127.0.0.1:9")
    assert nobody.returncode == 1 and "jackpot serve" in nobody.stderr
    open_to_all = jackpot("serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path), url="")
    assert open_to_all.returncode == 2 and "jackpot token create" in open_to_all.stderr
    jackpot("token", "create", "--data-dir", str(tmp_path), url="")
    in_the_clear = jackpot("serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path), url="")
    assert in_the_clear.returncode == 2 and "--tls-cert" in in_the_clear.stderr
    twice = jackpot("serve", "--data-dir", str(server.data_dir), "--port", "0", url="")
    assert twice.returncode == 2 and "is served already" in twice.stderr
    for finished in (unknown, nobody, open_to_all, in_the_clear, twice):
        assert "Traceback" not in finished.stderr


async def test_the_async_client_does_the_same(server: Server) -> None:
    async with AsyncClient(server.url) as client:
        found = [job.id async for job in client.jobs()]
        assert found == [job["id"] for job in httpx.get(f"{server.url}/v1/jobs").json()["jobs"]]
        with pytest.raises(ApiError) as refused:
            await client.submit({"polcy": {}})
        assert refused.value.status == 422 and "Did you mean 'policy'" in str(refused.value)
        assert (await asyncio.wait_for(client.wait(found[0]), PATIENCE_SECONDS)).state.finished


def test_answers_do_not_wait_for_acknowledgements(server: Server) -> None:
    """A connection without TCP_NODELAY takes 40 ms between head and body, each time; else one of many is quicker."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS) as http:
        server.wait_until(lambda: http.get("/healthz").elapsed.total_seconds() < 0.03, "an answer within 30 ms")


@pytest.mark.slow
def test_a_running_job_is_scaled_and_keeps_its_number_when_it_is_resumed(
    server: Server, tmp_path: Path, make_model: MakeModel
) -> None:
    with server.client() as client:
        job = client.submit(tiny_job(tmp_path, make_model, steps=5000))
        server.wait_until(lambda: client.job(job.id).progress.step > 0, "the first step")
        assert client.job(job.id).rollout_replicas == 1
        for _ in range(2):  # repeating does no harm
            assert client.scale(job.id, 2).rollout_replicas == 2
        server.wait_until(lambda: "rollout-1" in targets(server), "the second replica")
        with pytest.raises(ApiError, match=r"rollout_replicas.*greater than or equal to 1") as refused:
            client.scale(job.id, 0)
        assert refused.value.status == 422
        client.cancel(job.id)
        server.wait_until(lambda: client.job(job.id).state.finished, "the end")
        with pytest.raises(ApiError, match="only a job that runs can be scaled") as refused:
            client.scale(job.id, 3)
        assert refused.value.status == 409

        finished = jackpot("resume", job.id, url=server.url)
        assert finished.returncode == 0, finished.stderr
        log = server.data_dir / "runs" / job.id / "scalings.jsonl"
        server.wait_until(lambda: len(log.read_text().splitlines()) == 2, "the second replica, again")
        server.wait_until(lambda: "rollout-1" in targets(server), "its start")
        assert jackpot("scale", job.id, "1", url=server.url).stdout == f"{job.id}: 1 rollout replica wanted\n"
        server.wait_until(lambda: len(log.read_text().splitlines()) == 3, "the second replica to leave")
        server.wait_until(lambda: "rollout-1" not in targets(server), "its metrics' address to go")
        client.cancel(job.id)
        scaled = [event.data for event in client.events(job.id) if event.name == "scale"]
    changes = [(one["before"], one["rollout_replicas"], one["error"]) for one in scaled]
    assert changes == [(1, 2, None), (1, 2, None), (2, 1, None)]


def targets(server: Server) -> set[str]:
    """The processes that serve metrics just now."""
    groups = httpx.get(f"{server.url}/v1/metrics-targets").json()
    return {group["labels"]["instance"] for group in groups}
