"""Secrets of the chart: made once, kept at upgrades, and good for what they are for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from bus_world import make_group, make_scored
from chart_world import CHART, ROOT, Object, named, parse, render, render_text, start_bus
from patience import PATIENCE_SECONDS, TEST_SECONDS
from redis import exceptions
from redis.asyncio import Redis

from jackpot.bus import TrajectoryBus
from jackpot.config import BusConfig
from jackpot.control_plane.jobs.redis_job_store import RedisJobStore
from jackpot.control_plane.tokens import Scope, TokenFile

pytestmark = pytest.mark.timeout(TEST_SECONDS)

OWNED = {"annotations": {"meta.helm.sh/release-name": "jp", "meta.helm.sh/release-namespace": "ml"}}
JOB_ID = "demo-1123-094051-1a2b3c4d"


def content(secret: Object) -> dict[str, str]:
    """What a secret holds, decoded."""
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def group_of(api_version: str) -> Object:
    version = {"groupVersion": api_version, "version": api_version.rpartition("/")[2]}
    return {"name": api_version.partition("/")[0], "versions": [version], "preferredVersion": version}


def resource_of(kind: str) -> Object:
    plural = kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s")
    return {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get"]}


@contextmanager
def kubernetes(secrets: dict[str, Object], directory: Path) -> Iterator[dict[str, str]]:
    """An API server that knows the chart's kinds and these secrets; the environment in which helm finds it."""
    kinds: dict[str, set[str]] = {"v1": {"Secret"}}
    for each in render():
        kinds.setdefault(each["apiVersion"], set()).add(each["kind"])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            answer: Any = None
            if path == "/version":
                answer = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
            elif path == "/api":
                answer = {"kind": "APIVersions", "versions": ["v1"]}
            elif path == "/apis":
                answer = {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group_of(each) for each in kinds]}
            elif (api_version := path.partition("/api/")[2] or path.partition("/apis/")[2]) in kinds:
                resources = [resource_of(kind) for kind in sorted(kinds[api_version])]
                answer = {"kind": "APIResourceList", "groupVersion": api_version, "resources": resources}
            elif path == f"/api/v1/namespaces/ml/secrets/{name}":
                answer = secrets[name] | {"metadata": OWNED | secrets[name]["metadata"]} if name in secrets else None
            body = json.dumps(
                answer or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            ).encode()
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = directory / "kubeconfig"
        cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        context = {"name": "fake", "context": {"cluster": "fake", "user": "", "namespace": "ml"}}
        settings = {"clusters": [cluster], "contexts": [context], "current-context": "fake"}
        config.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **settings}))
        yield {"KUBECONFIG": str(config), "HOME": str(directory)}
        server.shutdown()


def secrets_of(objects: list[Object]) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == "Secret"}


def test_an_upgrade_keeps_every_secret_and_an_installation_makes_new_ones(tmp_path: Path) -> None:
    with kubernetes({}, tmp_path) as environ:
        first = secrets_of(parse(render_text(environ=environ)))
        other = secrets_of(parse(render_text(environ=environ)))
    assert set(first) == {"jp-jackpot-control-plane-tokens", "jp-jackpot-redis"}
    assert all(first[name]["data"] != other[name]["data"] for name in first)
    with kubernetes(first, tmp_path) as environ:
        upgraded = secrets_of(parse(render_text(environ=environ)))
        without_tls = secrets_of(parse(render_text(None, "redis.tls.enabled=false", environ=environ)))
    assert {name: each["data"] for name, each in upgraded.items()} == {
        name: each["data"] for name, each in first.items()
    }
    before, after = content(first["jp-jackpot-redis"]), content(without_tls["jp-jackpot-redis"])
    assert after["learner-password"] == before["learner-password"]
    assert after["learner-url"] == f"redis://learner:{before['learner-password']}@jp-jackpot-redis.ml.svc:6379/0"


def test_tokens_that_were_added_by_hand_survive_an_upgrade(tmp_path: Path) -> None:
    secret = named(render(), "Secret", "jp-jackpot-control-plane-tokens")
    path = tmp_path / "tokens.json"
    path.write_text(content(secret)["tokens.json"], encoding="utf-8")
    TokenFile(path).create("ci", Scope.WRITE, None)
    changed = {**secret, "data": {**secret["data"], "tokens.json": base64.b64encode(path.read_bytes()).decode()}}
    with kubernetes({secret["metadata"]["name"]: changed}, tmp_path) as environ:
        upgraded = secrets_of(parse(render_text(environ=environ)))[secret["metadata"]["name"]]
    assert upgraded["data"] == changed["data"]


def test_the_tokens_that_the_chart_makes_are_taken_by_the_server(tmp_path: Path) -> None:
    made = content(named(render(), "Secret", "jp-jackpot-control-plane-tokens"))
    path = tmp_path / "tokens.json"
    path.write_text(made["tokens.json"], encoding="utf-8")
    path.chmod(0o440)
    tokens = TokenFile(path)
    admin, metrics = tokens.check(made["admin-token"]), tokens.check(made["metrics-token"])
    assert admin is not None and admin.scope == "admin" and admin.expires is None
    assert metrics is not None and metrics.scope == "read"
    assert tokens.check(made["admin-token"][:-1] + "!") is None
    assert made["admin-token"].split("_")[2] not in made["tokens.json"]


def user_url(socket: str, secrets: dict[str, str], user: str) -> str:
    return f"unix://{user}:{secrets[f'{user}-password']}@{socket}"


def test_users_and_rules_are_those_of_the_composition() -> None:
    template = (ROOT / "deploy" / "redis" / "users.acl").read_text(encoding="utf-8")
    assert (CHART / "files" / "users.acl").read_text(encoding="utf-8") == template, "copy deploy/redis/users.acl there"
    made = content(named(render(), "Secret", "jp-jackpot-redis"))
    for user in ("control-plane", "orchestrator", "scorer", "learner"):
        template = template.replace(f"{{{{{user}}}}}", hashlib.sha256(made[f"{user}-password"].encode()).hexdigest())
    rules = [line for line in template.splitlines() if line.startswith("user ")]
    assert made["users.acl"].splitlines() == rules and len(rules) == 6


async def carry_a_group(urls: dict[str, str], directory: Path) -> None:
    """One group from dispatch to its end, each role with its own user."""
    settings = BusConfig(payload_store="redis")
    async with AsyncExitStack() as stack:
        buses = {user: await TrajectoryBus.connect(url, JOB_ID, settings, "0", directory) for user, url in urls.items()}
        for bus in buses.values():
            stack.push_async_callback(bus.close)
            await bus.open()
        group = make_group(JOB_ID)
        assert await buses["orchestrator"].reserve(group.group_id, 10_000)
        await buses["orchestrator"].publish(group)
        (taken,) = await buses["scorer"].take_groups(1, 1.0)
        await buses["scorer"].publish_scored(taken, make_scored(group))
        (scored,) = await buses["learner"].take_scored(1, 1.0)
        await buses["learner"].commit_trained({scored.group_id: 1})
        ledger = await buses["orchestrator"].readings.ledger()
        assert (ledger.dispatched, ledger.trained, ledger.open) == (1, 1, 0)


async def test_each_role_can_do_its_work_on_the_bundled_server_and_no_more(tmp_path: Path) -> None:
    objects = render(None, "redis.tls.enabled=false")
    made = content(named(objects, "Secret", "jp-jackpot-redis"))
    process, socket = start_bus(tuple(objects), tmp_path)
    async with AsyncExitStack() as stack:
        stack.callback(process.communicate, timeout=PATIENCE_SECONDS)
        stack.callback(process.terminate)
        store = RedisJobStore(user_url(socket, made, "control-plane"))
        await store.check_server()
        assert sum((await store.counts()).values()) == 0
        assert await store.lead("one", 10.0) and not await store.lead("another", 10.0)
        await store.lead("one", 0)
        await store.close()
        await carry_a_group(
            {user: user_url(socket, made, user) for user in ("orchestrator", "scorer", "learner")}, tmp_path
        )
        async with Redis.from_url(user_url(socket, made, "learner")) as learner:
            assert await learner.hset(f"jackpot:{{{JOB_ID}}}:probe", "field", "1") == 1  # type: ignore[misc]
            for command in (
                ("GET", "jackpot:{control}:jobs"),
                ("HSET", "elsewhere", "field", "1"),
                ("FLUSHALL",),
                ("CONFIG", "GET", "*"),
                ("ACL", "LIST"),
                ("KEYS", "*"),
                ("SHUTDOWN",),
            ):
                with pytest.raises(exceptions.NoPermissionError):
                    await learner.execute_command(*command)
        async with Redis.from_url(f"unix://probe:probe@{socket}") as probe:
            assert await probe.ping()
            with pytest.raises(exceptions.NoPermissionError):
                await probe.get("jackpot:{control}:jobs")
        async with Redis.from_url(f"unix://{socket}") as nobody:
            with pytest.raises(exceptions.ConnectionError, match="authenticated"):
                await nobody.ping()
