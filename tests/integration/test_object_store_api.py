"""A server that keeps its jobs' weights and checkpoints in a bucket."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from object_world import object_world
from server_world import TINY_JOB, api

from jackpot.config import parse_job
from jackpot.control_plane.jobs.admission import Admission
from jackpot.storage.job_storage import open_weight_store, stored_checkpoints
from jackpot.storage.run_directory import RunDirectory


async def test_jobs_are_put_into_the_servers_bucket_downloaded_from_it_and_deleted_with_their_objects(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(make_model("qwen3", seed=1))
    job = TINY_JOB | {"policy": {"model": model}, "actor": "policy", "sampling": {"max_tokens": 8}}
    with object_world() as world:
        for name, value in world.environ.items():
            monkeypatch.setenv(name, value)
        async with api(tmp_path / "data", admission=Admission(weight_store=world.url)) as (client, backend):
            for place, taken in ((f"{world.url}/team", True), (f"{world.url}2", False), ("s3://elsewhere", False)):
                answer = await client.post("/v1/jobs?dry_run=true", json=job | {"weights": {"store": place}})
                assert (answer.status_code == 200) is taken, answer.text
            assert answer.status_code == 422
            errors = answer.json()["errors"]
            assert errors[0]["field"] == "weights.store" and f"below {world.url}" in errors[0]["remedy"]

            job_id = (await client.post("/v1/jobs", json=job)).json()["id"]
            spec = (await client.get(f"/v1/jobs/{job_id}")).json()["spec"]
            assert spec["weights"]["store"] == world.url
            await client.post(f"/v1/jobs/{job_id}:cancel")

            # What the job's processes would have done.
            run = RunDirectory.create(backend.scheduler.run_dir(job_id), job_id, parse_job(spec))
            weights = open_weight_store(run.load_job(), job_id, run.path, tmp_path / "copies")
            weights.publish("policy", 3, lambda d: _write(d / "model.safetensors"), {})
            (tmp_path / "checkpoint").mkdir()
            _write(tmp_path / "checkpoint" / "shard.safetensors")
            checkpoints = stored_checkpoints(run.load_job(), job_id)
            assert checkpoints is not None
            checkpoints.upload("00000003", tmp_path / "checkpoint")

            listed = (await client.get(f"/v1/jobs/{job_id}/checkpoints")).json()["checkpoints"]
            assert [(one["name"], one["roles"]) for one in listed] == [("00000003", {"policy": 1000})]
            answer = await client.get(f"/v1/jobs/{job_id}/checkpoints/00000003")
            assert answer.status_code == 200 and len(answer.content) == int(answer.headers["Content-Length"])
            with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
                names = {name.rpartition("/")[2] for name in tar.getnames()}
            assert {"config.json", "tokenizer.json", "model.safetensors"} <= names

            world.door.shut()
            answer = await client.get(f"/v1/jobs/{job_id}/checkpoints")
            assert answer.status_code == 503 and answer.json()["type"].endswith(":store-unavailable")
            world.door.open()
            assert len(world.keys("runs/")) == 5
            assert (await client.delete(f"/v1/jobs/{job_id}")).status_code == 204
            assert world.keys("runs/") == [] and not run.path.exists()


def _write(path: Path) -> None:
    path.write_bytes(b"w" * 1000)


async def test_a_server_without_a_bucket_takes_no_job_that_names_one(tmp_path: Path) -> None:
    async with api(tmp_path / "data") as (client, _):
        answer = await client.post("/v1/jobs", json=TINY_JOB | {"weights": {"store": "s3://mine/runs"}})
        assert answer.status_code == 422
        errors = answer.json()["errors"]
        assert errors[0]["field"] == "weights.store" and "--weight-store" in json.dumps(errors)
