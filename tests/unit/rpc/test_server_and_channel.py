import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from patience import PATIENCE_SECONDS
from prometheus_client import CollectorRegistry

from jackpot.errors import (
    BusLostError,
    ConfigError,
    DeadlineError,
    EngineError,
    JackpotError,
    PayloadError,
    QueueFullError,
    RequestRefusedError,
    UnsupportedSamplingError,
    WeightCorruptError,
    WeightMissingError,
)
from jackpot.rpc.channel import call, open_channel, wait_ready
from jackpot.rpc.server import RpcServer, create_server
from jackpot.telemetry import Metrics
from jackpot.v1 import scoring_pb2, scoring_pb2_grpc

SERVICE = "jackpot.v1.ScoringService"
Context = grpc.aio.ServicerContext[scoring_pb2.ScoreRequest, scoring_pb2.ScoreResponse]

# group_id → what the servicer raises when it is asked for that group.
ERRORS: dict[str, Exception] = {
    "config": ConfigError("scorer.device", "cuda", "is not there", "Use cpu."),
    "sampling": UnsupportedSamplingError("top_p"),
    "payload": PayloadError("t#0 mask: 3 bytes"),
    "queue": QueueFullError(0.25),
    "missing": WeightMissingError("version 7 is pruned"),
    "corrupt": WeightCorruptError("version 7 is damaged"),
    "deadline": DeadlineError("version 9", 3.0),
    "engine": EngineError("out of memory"),
    "bus": BusLostError("flushed"),
    "own": JackpotError("no idea"),
    "bug": ZeroDivisionError("surprise"),
}


class Scoring(scoring_pb2_grpc.ScoringServiceServicer):
    """Echoes the group id, or raises, aborts or hangs when the id says so."""

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Context) -> scoring_pb2.ScoreResponse:
        group_id = request.group.group_id
        if group_id in ERRORS:
            raise ERRORS[group_id]
        if group_id == "abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such group")
        if group_id == "cancelled inside":
            inner = asyncio.create_task(asyncio.sleep(600))
            inner.cancel()
            await inner
        if group_id == "cancelled":
            await context.abort(grpc.StatusCode.CANCELLED)
        if group_id == "hang":
            await asyncio.sleep(600)
        return scoring_pb2.ScoreResponse(
            group_id=group_id,
            scores=[scoring_pb2.TokenScores(mask=request.group.prompt_token_ids)],
        )


def register(server: grpc.aio.Server) -> None:
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(Scoring(), server)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def server(tmp_path: Path, registry: CollectorRegistry) -> AsyncIterator[RpcServer]:
    server = create_server(f"unix:{tmp_path}/s.sock", register, [SERVICE], metrics=Metrics("job-1", registry))
    await server.start()
    await server.health.set_ready(True)
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> scoring_pb2_grpc.ScoringServiceStub:
    return scoring_pb2_grpc.ScoringServiceStub(channel)


def request_for(group_id: str, prompt: bytes = b"") -> scoring_pb2.ScoreRequest:
    request = scoring_pb2.ScoreRequest()
    request.group.group_id = group_id
    request.group.prompt_token_ids = prompt
    return request


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_a_call_is_answered_over_tcp_on_a_free_port(host: str) -> None:
    if host == "[::1]" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    server = create_server(f"{host}:0", register, [SERVICE])
    await server.start()
    assert server.address.startswith(f"{host}:") and not server.address.endswith(":0")
    async with open_channel(server.address) as channel:
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        response = await call(stub.Score, request_for("g"), 5, awaited="Score")
    assert response.group_id == "g"
    await server.stop(0)


async def test_messages_of_many_megabytes_pass(stub: scoring_pb2_grpc.ScoringServiceStub) -> None:
    prompt = bytes(range(256)) * (16 << 12)  # 16 MiB, where gRPC's own limit is 4
    response = await call(stub.Score, request_for("g", prompt), 30, awaited="Score")
    assert response.scores[0].mask == prompt


async def test_a_call_without_a_deadline_is_refused_with_the_remedy(stub: scoring_pb2_grpc.ScoringServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(request_for("g"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "Score was called without a deadline. Pass timeout=<seconds>."


@pytest.mark.parametrize(
    ("group_id", "code", "kind", "message"),
    [
        ("config", "INVALID_ARGUMENT", RequestRefusedError, "scorer.device = 'cuda': is not there. Use cpu."),
        ("sampling", "INVALID_ARGUMENT", RequestRefusedError, "top_p"),
        ("payload", "INVALID_ARGUMENT", RequestRefusedError, "t#0 mask: 3 bytes"),
        ("queue", "RESOURCE_EXHAUSTED", QueueFullError, "retry after 0.25 s"),
        ("missing", "FAILED_PRECONDITION", WeightMissingError, "version 7 is pruned"),
        ("corrupt", "FAILED_PRECONDITION", WeightMissingError, "version 7 is damaged"),
        ("deadline", "DEADLINE_EXCEEDED", DeadlineError, "waited 5 s for Score of scorer-0"),
        ("engine", "UNAVAILABLE", EngineError, "Score of scorer-0: out of memory"),
        ("bus", "UNAVAILABLE", EngineError, "flushed"),
        ("own", "INTERNAL", EngineError, "no idea"),
        ("bug", "INTERNAL", EngineError, "ZeroDivisionError in Score; the traceback is in the server's log"),
        ("abort", "NOT_FOUND", EngineError, "no such group"),
        # gRPC itself would not answer at all until the deadline.
        (
            "cancelled inside",
            "UNAVAILABLE",
            EngineError,
            "Score was cancelled inside the server. Send the request again",
        ),
        ("cancelled", "CANCELLED", EngineError, "cancelled by the server or on the way (no details). Send it again."),
    ],
)
async def test_errors_travel_as_status_codes_and_come_back_as_errors(
    stub: scoring_pb2_grpc.ScoringServiceStub,
    registry: CollectorRegistry,
    group_id: str,
    code: str,
    kind: type[JackpotError],
    message: str,
) -> None:
    with pytest.raises(JackpotError) as caught:
        await call(stub.Score, request_for(group_id), 5, awaited="Score of scorer-0")
    assert type(caught.value) is kind
    assert message in str(caught.value)
    labels = {"job_id": "job-1", "grpc_service": SERVICE, "grpc_method": "Score", "grpc_code": code}
    # The server counts a call once it has answered: the client may be here before.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while registry.get_sample_value("jackpot_rpc_requests_total", labels) is None:
            await asyncio.sleep(0.005)
    assert registry.get_sample_value("jackpot_rpc_requests_total", labels) == 1


async def test_a_full_queue_says_when_to_come_back(stub: scoring_pb2_grpc.ScoringServiceStub) -> None:
    with pytest.raises(QueueFullError) as caught:
        await call(stub.Score, request_for("queue"), 5, awaited="Score")
    assert caught.value.retry_after_seconds == 0.25


async def test_an_unexpected_error_leaves_its_traceback_in_the_servers_log_only(
    stub: scoring_pb2_grpc.ScoringServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(EngineError) as caught:
        await call(stub.Score, request_for("bug"), 5, awaited="Score")
    assert "surprise" not in str(caught.value)
    assert "ZeroDivisionError: surprise" in caplog.text


async def test_an_answer_that_does_not_come_is_a_deadline_error(stub: scoring_pb2_grpc.ScoringServiceStub) -> None:
    with pytest.raises(DeadlineError, match=r"waited 0\.2 s for Score of scorer-0"):
        await call(stub.Score, request_for("hang"), 0.2, awaited="Score of scorer-0")


async def test_a_server_that_is_not_there_is_an_engine_error(tmp_path: Path) -> None:
    async with open_channel(f"unix:{tmp_path}/nobody.sock") as channel:
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        with pytest.raises(EngineError, match="Score of nobody"):
            await call(stub.Score, request_for("g"), 5, awaited="Score of nobody")


async def test_a_message_that_grpc_finds_too_large_is_refused_not_retried(tmp_path: Path) -> None:
    server = create_server(f"unix:{tmp_path}/s.sock", register, [SERVICE])
    await server.start()
    # The same status code as a full queue, but without its hint when to come back.
    async with grpc.aio.insecure_channel(server.address, options=[("grpc.max_send_message_length", 1000)]) as channel:
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        with pytest.raises(RequestRefusedError, match="larger than max"):
            await call(stub.Score, request_for("g", bytes(1001)), 5, awaited="Score")
    await server.stop(0)


async def test_health_tells_liveness_readiness_and_services_apart(server: RpcServer, channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def status(service: str) -> str:
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_SECONDS)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    names = ("liveness", "readiness", SERVICE, "")
    assert [await status(name) for name in names] == ["SERVING"] * 4
    await server.health.set_ready(False)
    assert [await status(name) for name in names] == ["SERVING", "NOT_SERVING", "NOT_SERVING", "NOT_SERVING"]


async def test_waiting_for_readiness_ends_when_the_server_is_ready(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/late.sock"
    async with open_channel(address) as channel:
        waiting = asyncio.create_task(wait_ready(channel, "readiness", 10))
        server = create_server(address, register, [SERVICE])
        await server.start()
        await wait_ready(channel, "liveness", 10)
        assert not waiting.done()
        await server.health.set_ready(True)
        await waiting
        await server.stop(0)


async def test_waiting_in_vain_names_service_address_and_last_answer(
    server: RpcServer, channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    await server.health.set_ready(False)
    with pytest.raises(DeadlineError, match=rf"readiness of {server.address} \(last: NOT_SERVING\)"):
        await wait_ready(channel, "readiness", 0.2)
    async with open_channel(f"unix:{tmp_path}/nobody.sock") as nobody:
        with pytest.raises(DeadlineError, match=rf"{SERVICE} of unix:{tmp_path}/nobody\.sock \(last: UNAVAILABLE"):
            await wait_ready(nobody, SERVICE, 0.2)


async def test_a_channel_finds_a_restarted_server_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s.sock"
    async with open_channel(address) as channel:
        for _ in range(2):
            server = create_server(address, register, [SERVICE])
            await server.start()
            await server.health.set_ready(True)
            await wait_ready(channel, "readiness", 10)
            await server.stop(0)


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    async for response in stub.ServerReflectionInfo(requests, timeout=PATIENCE_SECONDS):
        names = {service.name for service in response.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("0.0.0.0:0", "would serve plaintext beyond this machine. Listen on unix:/path or 127.0.0.1"),
        ("[::]:0", "would serve plaintext"),
        ("scorer-0.example:50051", "would serve plaintext"),
        ("50051", "is neither unix:/path nor host:port"),
        ("localhost:", "is neither unix:/path nor host:port"),
        ("unix:", "is neither unix:/path nor host:port"),
        ("", "is neither unix:/path nor host:port"),
        (f"unix:/tmp/{'x' * 120}", "is longer than the 107 bytes"),
        ("unix:/nonexistent/s.sock", "cannot be bound"),
    ],
)
async def test_addresses_that_cannot_or_must_not_be_served_are_refused(address: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_server(address, register, [SERVICE])
    assert str(caught.value).startswith(f"JACKPOT_LISTEN = {address!r}: {problem}")


async def test_a_port_in_use_is_refused(server: RpcServer) -> None:
    first = create_server("127.0.0.1:0", register, [SERVICE])
    await first.start()
    with pytest.raises(ConfigError, match="cannot be bound"):
        create_server(first.address, register, [SERVICE])
    await first.stop(0)
