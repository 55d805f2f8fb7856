"""The API on a real store, without jobs that run: what it takes, refuses, remembers, and to whom it answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from server_world import TINY_JOB, api

from jackpot.control_plane.jobs.admission import Admission
from jackpot.control_plane.jobs.states import JobState
from jackpot.control_plane.tokens import Scope, TokenFile
from jackpot.telemetry.scrape_targets import announce_target

pytestmark = pytest.mark.timeout(TEST_SECONDS)

YAML = {"Content-Type": "application/yaml"}
JSON = {"Content-Type": "application/json"}


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    content: dict[str, Any] = response.json()
    assert content["type"] == f"urn:jackpot:problem:{kind}" and content["status"] == status
    assert content["detail"] and "Traceback" not in response.text
    return content


async def test_a_job_is_submitted_listed_cancelled_resumed_and_deleted(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        submitted = await client.post("/v1/jobs", json=TINY_JOB, params={"label": "team=a", "priority": 2})
        assert submitted.status_code == 201, submitted.text
        job = submitted.json()
        assert (job["state"], job["labels"], job["priority"]) == ("queued", {"team": "a"}, 2)
        where = submitted.headers["location"]
        detail = (await client.get(where)).json()
        assert detail["id"] == job["id"] and detail["spec"]["sampling"]["group_size"] == 8  # a default, resolved
        assert [step["state"] for step in detail["transitions"]] == ["queued"]
        assert [one["id"] for one in (await client.get("/v1/jobs?label=team=a&state=queued")).json()["jobs"]] == [
            job["id"]
        ]
        assert (await client.get("/v1/jobs?state=running")).json() == {"jobs": [], "next_cursor": None}
        problem(await client.delete(where), 409, "wrong-state")
        problem(await client.post(f"{where}:resume"), 409, "wrong-state")
        for _ in range(2):  # repeating does no harm
            assert (await client.post(f"{where}:cancel")).json()["state"] == "cancelled"
        assert (await client.post(f"{where}:resume")).json()["state"] == "queued"
        await client.post(f"{where}:cancel")
        assert (await client.delete(where)).status_code == 204
        problem(await client.get(where), 404, "not-found")


async def test_pages_follow_one_another(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        ids = [(await client.post("/v1/jobs", json=TINY_JOB)).json()["id"] for _ in range(5)]
        found, cursor = [], None
        while True:
            page = (await client.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})})).json()
            found += [job["id"] for job in page["jobs"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert found == ids[::-1]


async def test_concurrent_submits_with_one_key_make_one_job(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        key = {"Idempotency-Key": "night-run-1"}
        answers = await asyncio.gather(*(client.post("/v1/jobs", json=TINY_JOB, headers=key) for _ in range(20)))
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
        assert all(answer.headers["idempotency-replayed"] == "true" for answer in answers if answer.status_code == 200)
        assert len((await client.get("/v1/jobs")).json()["jobs"]) == 1
        other = await client.post("/v1/jobs", json=TINY_JOB | {"seed": 1}, headers=key)
        problem(other, 422, "idempotency-key-reused")


async def test_yaml_and_json_are_the_same_and_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "examples" / "demo.yaml").read_text()
    async with api(tmp_path / "data") as (client, _):
        dry = await client.post("/v1/jobs?dry_run=true", content=text, headers=YAML)
        assert dry.status_code == 200 and dry.json()["valid"] is True
        again = await client.post("/v1/jobs?dry_run=true", json=dry.json()["spec"])
        assert again.json()["spec"] == dry.json()["spec"]
        assert (await client.get("/v1/jobs")).json()["jobs"] == []


REFUSED_JOBS = {
    "unknown field": ({"learner": {"stepz": 3}}, "learner.stepz", "Did you mean 'steps'?"),
    "wrong type": ({"learner": {"steps": "many"}}, "learner.steps", "number"),
    "python task": ({"task": {"name": "python:os:system"}}, "task.name", "--allow-task"),
    "relative path": ({"policy": {"model": "../../etc"}}, "policy.model", "from / on"),
    "missing path": ({"policy": {"model": "/nowhere/model"}}, "policy.model", "does not exist"),
    "data path": ({"task": {"name": "jsonl", "params": {"path": "x.jsonl"}}}, "task.params.path", "from / on"),
    "zero byte": ({"policy": {"model": "/tmp/\0"}}, "policy.model", "is not a path"),
    "run directory": ({"run": {"directory": "/etc"}}, "run.directory", "Leave it out"),
    "bus": ({"bus": {"url": "redis://u:hunter2@inside:6379"}}, "bus.url", "Leave it out"),
    "replicas": ({"rollout": {"replicas": 1000}}, "rollout.replicas", "too many"),
    "name": ({"name": "../up"}, "name", "pattern"),
}


async def test_a_job_that_cannot_be_taken_names_field_and_remedy(tmp_path: Path, subtests: pytest.Subtests) -> None:
    async with api(tmp_path / "data") as (client, _):
        for case, (change, field, words) in REFUSED_JOBS.items():
            with subtests.test(case):
                answer = await client.post("/v1/jobs", json=TINY_JOB | change)
                errors = problem(answer, 422, "invalid-job")["errors"]
                assert [one["field"] for one in errors] == [field]
                assert words in json.dumps(errors)
                assert "hunter2" not in answer.text
        assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_paths_do_not_lead_out_of_the_roots(tmp_path: Path) -> None:
    inside = tmp_path / "models"
    (inside / "good").mkdir(parents=True)
    (inside / "link").symlink_to("/etc")
    async with api(tmp_path / "data", admission=Admission(roots=(inside,))) as (client, _):
        for path, taken in (("good", True), ("../data", False), ("link", False), ("good/../../../etc", False)):
            job = TINY_JOB | {"policy": {"model": f"{inside}/{path}"}}
            assert ((await client.post("/v1/jobs", json=job)).status_code == 201) is taken, path


BOMB = "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\npolicy: *c\n"
MALFORMED = {
    "no JSON": (b'{"name": ', JSON, 400, "malformed-body"),
    "twins": (b'{"name": "a", "name": "b"}', JSON, 400, "malformed-body"),
    "a list": (b"[]", JSON, 400, "malformed-body"),
    "no UTF-8": (b"\xff\xfe", JSON, 400, "malformed-body"),
    "deep JSON": (b"[" * 100_000, JSON, 400, "malformed-body"),
    "deep object": (b'{"task":' * 20_000, JSON, 400, "malformed-body"),
    "half a character": (b'{"task": {"name": "x", "params": {"a": "\\ud800"}}}', JSON, 422, "invalid-job"),
    "not a number": (b'{"seed": NaN}', JSON, 422, "invalid-job"),
    "endless": (b'{"seed": 1e999}', JSON, 422, "invalid-job"),
    "many digits": (b'{"seed": ' + b"9" * 5000 + b"}", JSON, 400, "malformed-body"),
    "YAML bomb": (BOMB.encode(), YAML, 422, "invalid-job"),
    "deep YAML": (b"[" * 20_000, YAML, 422, "invalid-job"),
    "YAML object": (b"!!python/object/apply:os.system ['id']", YAML, 422, "invalid-job"),
    "a date as key": (b"2020-01-01: 1", YAML, 422, "invalid-job"),
    "binary": (b"policy: !!binary aGk=", YAML, 422, "invalid-job"),
    "plain text": (b"name: a", {"Content-Type": "text/plain"}, 415, "unsupported-media-type"),
    "no type": (b"{}", {}, 415, "unsupported-media-type"),
    "oversized": (b" " * (300 << 10), JSON, 413, "body-too-large"),
}


async def test_malformed_bodies_are_refused_with_a_problem(tmp_path: Path, subtests: pytest.Subtests) -> None:
    async with api(tmp_path / "data") as (client, _):
        for case, (body, headers, status, kind) in MALFORMED.items():
            with subtests.test(case):
                problem(await client.post("/v1/jobs", content=body, headers=headers), status, kind)


async def test_a_body_that_hides_its_length_ends_at_the_limit(tmp_path: Path) -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 10_000

    async with api(tmp_path / "data") as (client, _):
        problem(await client.post("/v1/jobs", content=endless(), headers=JSON), 413, "body-too-large")


STRAY_PATHS = (
    "/v1/jobs/..%2F..%2Fetc",
    "/v1/jobs/A",
    "/v1/jobs/x%00",
    "/v1/jobs/" + "a" * 64,
    "/v1/jobs/x/checkpoints/..%2f..",
    "/v1/jobs/x/checkpoints/..",
    "/v1/jobs/x/logs?service=../../../etc/passwd",
    "/%2e%2e/%2e%2e/app.py",
    "/..%2fapi/app.py",
    "/v1/nothing",
)


async def test_no_path_leads_anywhere_else(tmp_path: Path, subtests: pytest.Subtests) -> None:
    async with api(tmp_path / "data") as (client, _):
        for path in STRAY_PATHS:
            with subtests.test(path):
                answer = await client.get(path)
                assert answer.status_code in (404, 422), answer.text
                assert answer.headers["content-type"] == "application/problem+json"


async def test_tokens_are_asked_for_checked_and_never_shown(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "data" / "tokens.json")
    secret = {
        scope: tokens.create(scope.name.lower(), scope, timedelta(hours=1))
        for scope in (Scope.READ, Scope.WRITE, Scope.ADMIN)
    }
    expired = tokens.create("old", Scope.ADMIN, timedelta(microseconds=1))
    bearer = {scope: {"Authorization": f"Bearer {token}"} for scope, token in secret.items()}
    async with api(tmp_path / "data", token_required=True) as (client, _):
        for headers in (
            {},
            {"Authorization": f"Bearer {expired}"},
            {"Authorization": "Bearer jp_00000000_" + "a" * 43},
        ):
            answer = await client.get("/v1/jobs", headers=headers)
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        problem(
            await client.get("/v1/jobs", headers={"Authorization": f"Basic {secret[Scope.READ]}"}), 401, "unauthorized"
        )
        assert (await client.get("/v1/jobs", headers=bearer[Scope.READ])).status_code == 200
        problem(await client.post("/v1/jobs", json=TINY_JOB, headers=bearer[Scope.READ]), 403, "insufficient-scope")
        job = (await client.post("/v1/jobs", json=TINY_JOB, headers=bearer[Scope.WRITE])).json()
        assert job["owner"] == "write"
        where = f"/v1/jobs/{job['id']}"
        await client.post(f"{where}:cancel", headers=bearer[Scope.WRITE])
        problem(await client.delete(where, headers=bearer[Scope.WRITE]), 403, "insufficient-scope")
        shown = (await client.get(where, headers=bearer[Scope.READ])).text
        stored = (tmp_path / "data" / "tokens.json").read_text()
        for token in secret.values():
            assert token not in shown and token.rpartition("_")[2] not in stored
        assert (await client.delete(where, headers=bearer[Scope.ADMIN])).status_code == 204
        tokens.revoke(secret[Scope.READ].split("_")[1])
        problem(await client.get("/v1/jobs", headers=bearer[Scope.READ]), 401, "unauthorized")
        for path in ("/healthz", "/readyz", "/"):
            assert (await client.get(path)).status_code == 200
        problem(await client.get("/metrics"), 401, "unauthorized")
        problem(await client.get("/v1/metrics-targets"), 401, "unauthorized")


async def test_guessing_tokens_is_slowed_down(tmp_path: Path) -> None:
    TokenFile(tmp_path / "data" / "tokens.json").create("a", Scope.READ, None)
    async with api(tmp_path / "data", token_required=True) as (client, _):
        wrong = {"Authorization": "Bearer guess"}
        answers = [await client.get("/v1/jobs", headers=wrong) for _ in range(40)]
        assert {answer.status_code for answer in answers} == {401, 429}
        assert int(answers[-1].headers["retry-after"]) >= 1


async def test_other_web_sites_cannot_act(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
            problem(await client.post("/v1/jobs/x:cancel", headers=headers), 403, "cross-origin")
        same = await client.post("/v1/jobs/x:cancel", headers={"Origin": "http://127.0.0.1:8700"})
        problem(same, 404, "not-found")
        problem(await client.get("/v1/jobs", headers={"Host": "evil.example"}), 421, "unknown-host")
        assert (await client.get("/v1/jobs", headers={"Host": "localhost:1"})).status_code == 200


async def test_every_answer_carries_security_headers(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        for path in ("/", "/v1/jobs", "/v1/jobs/nope", "/nothing"):
            headers = (await client.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "server" not in headers


async def test_a_client_that_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with api(tmp_path / "data", requests_per_second=0.01, burst=3) as (client, _):
        answers = [await client.get("/healthz") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 60 < int(answers[-1].headers["retry-after"]) <= 100  # less by what the other requests took


async def test_prometheus_is_told_where_the_processes_of_running_jobs_are(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, backend):
        backend.scheduler.stop()  # it would start sessions for what is said to be starting below
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await backend.store.lead("the test", 60):
                await asyncio.sleep(0.01)
        ids = [(await client.post("/v1/jobs", json=TINY_JOB)).json()["id"] for _ in range(3)]
        for job_id in ids[:2]:
            directory = backend.scheduler.run_dir(job_id)
            directory.mkdir()
            for number, instance in ((1, "rollout-0"), (2, "rollout-evaluator")):
                announce_target(directory, job_id, "rollout", instance, f"127.0.0.1:{9100 + number}")
        await backend.store.transition(ids[0], JobState.STARTING, "has a slot")
        await backend.store.transition(ids[2], JobState.STARTING, "has a slot")  # and no processes yet
        assert (await client.get("/v1/metrics-targets")).json() == [
            {
                "targets": [f"127.0.0.1:910{number}"],
                "labels": {"job_id": ids[0], "service": "rollout", "instance": instance},
            }
            for number, instance in ((1, "rollout-0"), (2, "rollout-evaluator"))
        ]


async def test_health_metrics_and_schema(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, backend):
        await client.post("/v1/jobs", json=TINY_JOB)
        text = (await client.get("/metrics")).text
        assert 'jackpot_jobs{state="queued"} 1.0' in text
        assert 'route="/v1/jobs",status="201"' in text
        schema = (await client.get("/v1/schema")).json()
        assert schema["properties"]["learner"]
        document = (await client.get("/openapi.json")).json()
        body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
        assert body["application/json"]["examples"]["demo"]["value"]["task"] == {"name": "complement"}
        example = await client.post("/v1/jobs?dry_run=true", json=body["application/json"]["examples"]["demo"]["value"])
        assert example.status_code == 200, example.text
        assert await backend.readiness() is None


async def test_without_its_store_the_server_says_so_and_recovers(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        job = (await client.post("/v1/jobs", json=TINY_JOB)).json()
        children = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
        (store,) = [p for p in children if p.cwd().startswith(str(tmp_path))]
        os.kill(store.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (answer := await client.get(f"/v1/jobs/{job['id']}")).status_code != 200:
                problem(answer, 503, "store-unavailable")
                await asyncio.sleep(0.1)
        assert answer.json()["id"] == job["id"]
