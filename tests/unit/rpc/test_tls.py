"""Real handshakes between real servers and clients."""

import asyncio
import datetime as dt
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import HOUR, Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from patience import PATIENCE_SECONDS

from jackpot.errors import ConfigError, DeadlineError, EngineError, RequestRefusedError
from jackpot.rpc.channel import call, open_channel, wait_ready
from jackpot.rpc.server import RpcServer, create_server
from jackpot.v1 import scoring_pb2, scoring_pb2_grpc

SERVICE = "jackpot.v1.ScoringService"
PEER = "jackpot-worker"


class Scoring(scoring_pb2_grpc.ScoringServiceServicer):
    """Echoes the group id; ``slow`` after a second."""

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Any) -> scoring_pb2.ScoreResponse:
        if request.group.group_id == "slow":
            await asyncio.sleep(1)
        return scoring_pb2.ScoreResponse(group_id=request.group.group_id)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@asynccontextmanager
async def serving(tls_dir: Path | None, address: str = "127.0.0.1:0", **options: str) -> AsyncIterator[RpcServer]:
    server = create_server(
        address,
        lambda grpc_server: scoring_pb2_grpc.add_ScoringServiceServicer_to_server(Scoring(), grpc_server),
        [SERVICE],
        tls_dir=str(tls_dir or ""),
        **options,
    )
    await server.start()
    await server.health.set_ready(True)
    try:
        yield server
    finally:
        await server.stop(0)


async def score(channel: grpc.aio.Channel) -> str:
    return await stub_score(scoring_pb2_grpc.ScoringServiceStub(channel), "g")


async def stub_score(stub: scoring_pb2_grpc.ScoringServiceStub, group_id: str) -> str:
    request = scoring_pb2.ScoreRequest()
    request.group.group_id = group_id
    return (await call(stub.Score, request, 10, awaited="Score")).group_id


def by_name(server: RpcServer) -> str:
    return server.address.replace("127.0.0.1", "localhost")


async def test_both_sides_show_certificates_of_one_authority(tmp_path: Path, authority: Authority) -> None:
    async with serving(authority.issue(tmp_path / "server", "localhost")) as server:
        client = authority.issue(tmp_path / "client", "anybody")
        async with open_channel(by_name(server), tls_dir=str(client)) as channel:
            await wait_ready(channel, "readiness", 10)
            assert await score(channel) == "g"


@pytest.mark.parametrize("stranger", ["other authority", "expired", "not yet valid", "no certificate", "plaintext"])
async def test_a_server_refuses_strangers(tmp_path: Path, authority: Authority, stranger: str) -> None:
    ours = authority.issue(tmp_path / "ours", "localhost")
    match stranger:
        case "other authority":  # that trusts ours, so that it is the server that refuses
            theirs = Authority().issue(tmp_path / "theirs", "localhost")
            (theirs / "ca.crt").write_bytes(authority.pem)
        case "expired":
            theirs = authority.issue(tmp_path / "theirs", "localhost", valid=(-HOUR, -dt.timedelta(minutes=1)))
        case "not yet valid":
            theirs = authority.issue(tmp_path / "theirs", "localhost", valid=(dt.timedelta(minutes=30), HOUR))
        case _:
            theirs = ours
    async with serving(ours) as server:
        if stranger == "no certificate":
            credentials = grpc.ssl_channel_credentials(authority.pem)
            channel = grpc.aio.secure_channel(by_name(server), credentials)
        else:
            channel = open_channel(by_name(server), tls_dir="" if stranger == "plaintext" else str(theirs))
        async with channel, open_channel(by_name(server), tls_dir=str(ours)) as known:
            with pytest.raises(EngineError):
                await score(channel)
            assert await score(known) == "g"


@pytest.mark.parametrize(
    ("names", "valid", "foreign"),
    [
        (("localhost",), (-HOUR, HOUR), True),
        (("localhost",), (-HOUR, -dt.timedelta(minutes=1)), False),
        (("elsewhere.example",), (-HOUR, HOUR), False),
    ],
    ids=["other authority", "expired", "other host"],
)
async def test_a_client_refuses_servers_that_are_not_who_they_should_be(
    tmp_path: Path, authority: Authority, names: tuple[str], valid: tuple[dt.timedelta, dt.timedelta], foreign: bool
) -> None:
    impostor = (Authority() if foreign else authority).issue(tmp_path / "server", *names, valid=valid)
    (impostor / "ca.crt").write_bytes(authority.pem)  # it takes our client's certificate: it is the client that refuses
    client = authority.issue(tmp_path / "client", "localhost")
    async with serving(impostor) as server, open_channel(by_name(server), tls_dir=str(client)) as channel:
        with pytest.raises(EngineError):
            await score(channel)
        with pytest.raises(DeadlineError, match=r"readiness of localhost:\d+ \(last: UNAVAILABLE"):
            await wait_ready(channel, "readiness", 0.5)


async def test_one_name_on_every_certificate_stands_for_host_names_and_lets_callers_in(
    tmp_path: Path, authority: Authority
) -> None:
    worker = str(authority.issue(tmp_path / "worker", PEER))
    outsider = str(authority.issue(tmp_path / "outsider", "web-shop", "localhost"))
    async with serving(Path(worker), tls_peer_name=PEER) as server:
        async with open_channel(server.address, tls_dir=worker, tls_peer_name=PEER) as channel:
            assert await score(channel) == "g"
        async with open_channel(server.address, tls_dir=worker) as channel:  # looks for the host: no such name
            with pytest.raises(EngineError):
                await score(channel)
        async with open_channel(server.address, tls_dir=outsider, tls_peer_name=PEER) as channel:
            with pytest.raises(RequestRefusedError) as caught:
                await score(channel)
            expected = "Score: only certificates that carry jackpot-worker may call; yours carries localhost, web-shop"
            assert str(caught.value) == expected
            await wait_ready(channel, "readiness", 5)  # health tells nothing that is worth guarding


async def test_plaintext_callers_have_no_name() -> None:
    async with serving(None, tls_peer_name=PEER) as server, open_channel(server.address) as channel:
        with pytest.raises(RequestRefusedError, match="yours carries no name"):
            await score(channel)


async def certificate_of(address: str) -> bytes:
    """What a client that checks nothing is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return shown


async def test_renewed_files_are_served_without_a_restart(tmp_path: Path, authority: Authority) -> None:
    directory = authority.issue(tmp_path / "server", "localhost")
    async with serving(directory) as server, open_channel(by_name(server), tls_dir=str(directory)) as before:
        assert await score(before) == "g"
        first = await certificate_of(server.address)
        assert await certificate_of(server.address) == first
        authority.issue(directory, "localhost")
        second = await certificate_of(server.address)
        assert second != first
        assert await score(before) == "g"  # an open connection goes on
        # A new authority, too: clients of the old one are strangers from now on.
        other = Authority()
        other.issue(directory, "localhost")
        async with open_channel(by_name(server), tls_dir=str(directory)) as channel:
            assert await score(channel) == "g"
        old = authority.issue(tmp_path / "old", "localhost")
        (old / "ca.crt").write_bytes(other.pem)
        async with open_channel(by_name(server), tls_dir=str(old)) as channel:
            with pytest.raises(EngineError):
                await score(channel)


async def test_half_replaced_files_change_nothing_until_they_are_whole(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    directory = authority.issue(tmp_path / "server", "localhost")
    renewed = authority.issue(tmp_path / "renewed", "localhost")
    async with serving(directory) as server:
        first = await certificate_of(server.address)
        shutil.copy(renewed / "tls.crt", directory / "tls.crt")  # its key is still on the way
        assert await certificate_of(server.address) == first
        assert "the old certificate stays in use" in caplog.text
        shutil.copy(renewed / "tls.key", directory / "tls.key")
        deadline = time.monotonic() + 5
        while await certificate_of(server.address) == first:
            assert time.monotonic() < deadline, "the renewed certificate is not served"


async def test_a_client_calls_with_renewed_files_without_being_opened_again(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Both sides move to another authority: what the client read first is worth nothing to the server started anew."""
    directory, other = authority.issue(tmp_path / "tls", PEER), Authority()
    renewed = other.issue(tmp_path / "renewed", PEER)
    async with serving(directory, tls_peer_name=PEER) as server:
        address = server.address
        channel = open_channel(address, tls_dir=str(directory), tls_peer_name=PEER)
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        hanging = asyncio.create_task(stub_score(stub, "slow"))
        assert await stub_score(stub, "g") == "g"
        shutil.copy(renewed / "tls.crt", directory / "tls.crt")  # its key is still on the way
        assert await stub_score(stub, "g") == "g"
        assert "the old certificate stays in use" in caplog.text
        for name in ("tls.key", "ca.crt"):
            shutil.copy(renewed / name, directory / name)
        assert await stub_score(stub, "g") == "g"  # the server looks, too
        assert await hanging == "slow"
    async with serving(directory, address, tls_peer_name=PEER):
        await wait_ready(channel, "readiness", 20)
        assert await stub_score(stub, "g") == "g"
    await channel.close()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda d: (d / "tls.key").unlink(), r"cannot be read \(tls.key\)"),
        (lambda d: (d / "ca.crt").write_text("no PEM"), "holds files that do not match"),
        (
            lambda d: Authority().issue(d / "x", "a") and shutil.copy(d / "x" / "tls.key", d),
            "holds files that do not match",
        ),
    ],
    ids=["missing", "not PEM", "another's key"],
)
def test_files_that_cannot_work_are_refused_at_once(
    tmp_path: Path, authority: Authority, spoil: Any, problem: str
) -> None:
    directory = authority.issue(tmp_path / "tls", "localhost")
    spoil(directory)
    with pytest.raises(ConfigError, match=f"JACKPOT_TLS_DIR = .*{problem}.* It must hold tls.crt, tls.key and ca.crt"):
        open_channel("localhost:1", tls_dir=str(directory))


async def test_probes_without_tls_have_a_port_that_knows_health_alone(tmp_path: Path, authority: Authority) -> None:
    directory = authority.issue(tmp_path / "tls", "localhost")
    async with serving(directory, health_listen="0.0.0.0:0") as server:
        assert not server.health_address.endswith(":0")
        address = server.health_address.replace("0.0.0.0", "127.0.0.1")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def status(service: str) -> int:
                return (
                    await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_SECONDS)
                ).status

            assert await status("liveness") == health_pb2.HealthCheckResponse.SERVING
            assert await status("readiness") == health_pb2.HealthCheckResponse.SERVING
            await server.health.set_ready(False)
            assert await status("readiness") == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await status("liveness") == health_pb2.HealthCheckResponse.SERVING
            for method in (f"/{SERVICE}/Score", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(method)(b"", timeout=PATIENCE_SECONDS)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:", "192.0.2.1:1"])
async def test_a_health_address_that_cannot_be_bound_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^JACKPOT_HEALTH_LISTEN = "):
        create_server("127.0.0.1:0", lambda server: None, [], health_listen=address)
