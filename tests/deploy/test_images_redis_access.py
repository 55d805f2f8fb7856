"""Each role on a Redis with TLS and users: what it has to do works, everything else is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from bus_world import make_group, make_scored
from certificates import Authority
from patience import PATIENCE_SECONDS, TEST_SECONDS
from secured_redis import ROLES, SecuredRedis, secured_redis

from jackpot.bus import TrajectoryBus
from jackpot.config import BusConfig
from jackpot.config.environment import ServiceEnvironment
from jackpot.control_plane.jobs.records import JobRecord, now
from jackpot.control_plane.jobs.redis_job_store import RedisJobStore
from jackpot.control_plane.jobs.states import JobState
from jackpot.control_plane.observing.bus_observer import BusObserver
from jackpot.errors import BusError
from jackpot.trajectory import deferred

pytestmark = pytest.mark.timeout(TEST_SECONDS)

JOB_ID = "tiny-1123-140645-b1bc4f0d"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[SecuredRedis]:
    with secured_redis(tmp_path_factory.mktemp("redis"), authority) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_refused(server: SecuredRedis, request: pytest.FixtureRequest) -> Iterator[None]:
    with redis.Redis.from_url(server.full_url("test-admin")) as admin:
        admin.acl_log_reset()
    yield
    if "refused" not in request.node.name:
        assert server.refusals() == []


async def connect(server: SecuredRedis, role: str, tmp_path: Path, **settings: float) -> TrajectoryBus:
    """As a service of this role does, from its variables."""
    environment = ServiceEnvironment.from_env(
        {
            "JACKPOT_RUN_DIR": str(tmp_path),
            "JACKPOT_JOB_ID": JOB_ID,
            "JACKPOT_REDIS_URL": server.url(role),
            "JACKPOT_TLS_DIR": str(server.tls_dir),
        }
    )
    bus = await TrajectoryBus.connect(
        environment.redis_url, JOB_ID, BusConfig(**settings), f"{role}-0", tmp_path / "payloads"
    )
    await bus.open()
    return bus


async def test_roles_do_all_that_they_ever_do(server: SecuredRedis, tmp_path: Path) -> None:
    orchestrator = await connect(server, "orchestrator", tmp_path)
    scorer = await connect(server, "scorer", tmp_path, lease_seconds=0.2)
    taking_over = await connect(server, "scorer", tmp_path, lease_seconds=0.2)
    learner = await connect(server, "learner", tmp_path)
    observer = BusObserver(JOB_ID, BusConfig())
    *groups, straight = [make_group(JOB_ID, slot) for slot in range(7)]
    assert await orchestrator.reserve(straight.group_id, 4096)
    assert await orchestrator.publish_deferred(deferred(straight, 0)) == "published"
    for group in groups:
        assert await orchestrator.reserve(group.group_id, 4096)
        assert await orchestrator.publish(group) == "published"
    await orchestrator.drop(groups[5].group_id, "engine_failed", "for the test")
    [first, *others] = await scorer.take_groups(4, 5.0)
    assert await scorer.renew() == []
    await scorer.publish_scored(first, make_scored(first.value))
    await scorer.fail(others[0], "scoring_failed")
    await scorer.release(others[1:2])
    await scorer.drop(others[2].group_id, "scoring_failed")
    deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    scored = 1
    while scored < 4:  # the rest, given back or left behind by a consumer whose lease ran out
        for delivery in await taking_over.take_groups(4, 0.5):
            await taking_over.publish_scored(delivery, make_scored(delivery.value))
            scored += 1
        assert asyncio.get_running_loop().time() < deadline
    taken = []
    while len(taken) < 5:
        taken += await learner.take_scored(4, 5.0)
    assert await learner.renew() == []
    ids = [delivery.group_id for delivery in taken]
    assert set(await learner.fetch_scored(ids)) == set(ids)
    await learner.set_value("lambda", "1.5")
    assert await learner.commit_trained(dict.fromkeys(ids[:4], 1)) == []
    await learner.drop(ids[4], "zero_advantage")
    url = server.full_url("control-plane")
    assert await observer.depths(url) is not None
    ledger = await observer.ledger(url)
    assert ledger is not None and ledger.trained == 4
    assert await orchestrator.readings.dispatched() == {}
    assert (await orchestrator.readings.depths()).bytes_used == 0
    assert await orchestrator.readings.read_terminal("", 100)
    assert await orchestrator.close_job() == 0
    await observer.close()
    for bus in (orchestrator, scorer, taking_over, learner):
        await bus.close()


async def test_the_control_plane_keeps_its_jobs(server: SecuredRedis) -> None:
    store = RedisJobStore(server.full_url("control-plane"))
    await store.check_server()
    await store.ping()
    records = []
    for index in range(3):
        record = JobRecord(
            id=f"job-{index}", name="tiny", state=JobState.QUEUED, reason="submitted", created=now(), updated=now(),
            labels={"team": "a"}, steps=8,
        )  # fmt: skip
        records.append((await store.create(record, b"{}"))[0])
    assert [record.id for record in await store.queue(5)] == ["job-0", "job-1", "job-2"]
    await store.transition("job-0", JobState.STARTING, "has a slot")
    assert len((await store.page((), {"team": "a"}, None, 2)).records) == 2
    assert [record.id for record in await store.in_states(JobState.STARTING)] == ["job-0"]
    assert (await store.counts())[JobState.QUEUED] == 2
    await store.transition("job-1", JobState.CANCELLED, "enough", finished=now() + timedelta(0))
    assert [step.state for step in await store.transitions("job-1")] == [JobState.QUEUED, JobState.CANCELLED]
    assert await store.spec("job-1") == b"{}"
    await store.delete("job-1")
    await store.close()


@pytest.mark.parametrize("role", ROLES)
def test_everything_else_is_refused(server: SecuredRedis, role: str) -> None:
    forbidden = [
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("CONFIG", "SET", "appendonly", "no"),
        ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("ACL", "LIST"),
        ("ACL", "SETUSER", "default", "on", "nopass", "+@all"),
        ("MONITOR",),
        ("SHUTDOWN",),
        ("SAVE",),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("REPLICAOF", "h", "1"),
        ("MIGRATE", "h", "1", "k", "0", "1"),
        ("EVAL", "return 1", "0"),
        ("FUNCTION", "LIST"),
        ("PUBLISH", "c", "m"),
        ("SUBSCRIBE", "c"),
        ("GET", "a-key-of-another-program"),
        ("SET", "a-key-of-another-program", "1"),
    ]
    if role != "control-plane":
        forbidden += [
            ("CONFIG", "GET", "appendonly"),
            ("GET", "jackpot:{control}:sequence"),
            ("ZCARD", "jackpot:{j-1}:x"),
        ]
        forbidden += [("HSET", "jackpot:{control}:idempotency:a:b", "f", "v")]
    if role == "orchestrator":
        forbidden += [("XREADGROUP", "GROUP", "scorers", "me", "STREAMS", f"jackpot:{{{JOB_ID}}}:rollouts", ">")]
    if role in ("scorer", "learner"):
        forbidden += [("XRANGE", f"jackpot:{{{JOB_ID}}}:ledger", "-", "+")]
    with redis.Redis.from_url(server.full_url(role), protocol=2) as client:
        for command in forbidden:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
        # A script of one's own can do no more than its author.
        script = client.script_load("return redis.call('FLUSHALL')")
        with pytest.raises(redis.exceptions.ResponseError, match=r"(?i)permission|can't run this command"):
            client.evalsha(script, 0)
        assert client.ping()


def test_without_a_name_everything_but_a_ping_of_the_probe_is_refused(server: SecuredRedis) -> None:
    query = server.full_url("test-admin").partition("?")[2]
    with redis.Redis.from_url(server.full_url("test-admin")) as admin:
        # Were it there, the server's protected mode would turn away everybody from another machine.
        assert "nopass" not in admin.acl_getuser("default")["flags"]
    for user, password in (("default", ""), ("scorer", "wrong"), ("scorer", "password-of-learner"), ("nobody", "x")):
        credentials = f"{user}:{password}@" if password else ""
        url = f"rediss://{credentials}localhost:{server.port}/0?{query}"
        with redis.Redis.from_url(url) as client, pytest.raises(redis.exceptions.AuthenticationError):
            client.ping()
    with redis.Redis.from_url(f"rediss://probe:x@localhost:{server.port}/0?{query}", protocol=2) as probe:
        assert probe.execute_command("PING")
        with pytest.raises(redis.exceptions.NoPermissionError):
            probe.execute_command("INFO")


async def test_connections_that_are_not_what_they_should_be_are_refused(
    server: SecuredRedis, authority: Authority, tmp_path: Path
) -> None:
    url = server.full_url("scorer")
    stranger = Authority().issue(tmp_path / "tls", "client")
    wrong = {
        "other authority": url.replace(str(server.tls_dir), str(stranger)),
        "no certificate": f"{server.url('scorer')}?ssl_ca_certs={server.tls_dir}/ca.crt",
        "other host": url.replace("@localhost", "@127.0.0.1"),
        "plaintext": url.replace("rediss:", "redis:").partition("?")[0],
    }
    connecting = [TrajectoryBus.connect(one, JOB_ID, BusConfig(), "scorer-0", tmp_path) for one in wrong.values()]
    for name, outcome in zip(wrong, await asyncio.gather(*connecting, return_exceptions=True), strict=True):
        assert isinstance(outcome, BusError) and "does not answer" in str(outcome), (name, outcome)
