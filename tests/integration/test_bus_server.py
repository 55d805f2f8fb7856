"""The embedded server: private, durable, one per data directory, and never an orphan."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from bus_world import bus_settings, eventually
from patience import TEST_SECONDS
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from jackpot.bus import TrajectoryBus
from jackpot.bus.server import EmbeddedServer, find_server_binary
from jackpot.errors import BusError, ConfigError

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "bus")
    await server.start()
    yield server
    await server.stop()


def socket_of(url: str) -> Path:
    return Path(urlsplit(url).path)


def password_of(url: str) -> str:
    return str(urlsplit(url).password)


def is_running(pid: int) -> bool:
    """Whether a process that is not a zombie has this id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_it_is_private(server: EmbeddedServer, tmp_path: Path) -> None:
    async with Redis.from_url(server.url) as redis:
        assert await redis.ping()
        assert (await redis.config_get("port"))["port"] == "0"
    with pytest.raises(exceptions.ConnectionError, match="authenticated"):
        async with Redis(unix_socket_path=str(socket_of(server.url)), retry=Retry(NoBackoff(), 0)) as redis:
            await redis.ping()
    command_line = Path(f"/proc/{server.pid}/cmdline").read_bytes() + Path(f"/proc/{server.pid}/environ").read_bytes()
    assert password_of(server.url).encode() not in command_line
    holders = [path for path in (tmp_path / "bus").rglob("*") if path.is_file() and _holds(path, server.url)]
    assert {path.name for path in holders} == {"server.conf", "address.json"}
    assert {path.stat().st_mode & 0o777 for path in holders} == {0o600}
    assert socket_of(server.url).parent.stat().st_mode & 0o777 == 0o700


def _holds(path: Path, url: str) -> bool:
    return password_of(url).encode() in path.read_bytes()


async def test_data_address_and_password_survive_a_kill(server: EmbeddedServer) -> None:
    url = server.url
    async with Redis.from_url(url) as redis:
        await redis.set("key", "value")
        assert server.poll() is None
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: _died(server), "the server to be dead")
        assert server.poll() == -signal.SIGKILL
        await server.start()
        assert server.url == url
        assert await redis.get("key") == b"value"


async def _died(server: EmbeddedServer) -> bool:
    return server.poll() is not None


async def test_stopping_leaves_no_process_and_no_socket_and_keeps_the_data(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "bus")
    await server.start()
    url, pid = server.url, server.pid
    assert pid is not None
    async with Redis.from_url(url) as redis:
        await redis.set("key", "value")
    await server.stop()
    await server.stop()
    assert not is_running(pid)
    assert not socket_of(url).parent.exists()
    again = EmbeddedServer(tmp_path / "bus")
    await again.start()
    assert again.url == url
    async with Redis.from_url(again.url) as redis:
        assert await redis.get("key") == b"value"
    await again.stop()


async def test_two_servers_cannot_share_a_data_directory(server: EmbeddedServer, tmp_path: Path) -> None:
    second = EmbeddedServer(tmp_path / "bus")
    with pytest.raises(BusError, match="is in use by another server"):
        await second.start(timeout_seconds=0.1)
    await second.stop()
    async with Redis.from_url(server.url) as redis:
        assert await redis.ping()


LAUNCHER = """
import asyncio, sys, time
from pathlib import Path
from jackpot.bus.server import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
asyncio.run(server.start())
print(server.pid, server.url, flush=True)
time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
async def test_it_dies_with_its_launcher_and_the_next_launcher_takes_over(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid, url = launcher.stdout.readline().split()
    launcher.kill()
    # At once: the next launcher has to wait for the old server to finish writing.
    server = EmbeddedServer(tmp_path)
    await server.start()
    assert not is_running(int(pid))
    assert server.url == url
    await server.stop()
    launcher.stdout.close()
    launcher.wait()


async def test_a_server_that_gives_up_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("a file where a directory belongs")
    server = EmbeddedServer(tmp_path)
    with pytest.raises(BusError, match=r"exited with status 1: .*append"):
        await server.start()
    with pytest.raises(BusError, match="has not been started"):
        server.poll()


async def test_a_long_temporary_directory_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    server = EmbeddedServer(tmp_path)
    await server.start()
    assert len(str(socket_of(server.url))) <= 100
    await server.stop()


async def test_a_socket_directory_that_others_can_write_to_is_not_used_again(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    url = server.url
    await server.stop()
    socket_of(url).parent.mkdir(mode=0o755)
    await server.start()
    assert socket_of(server.url) != socket_of(url)
    assert password_of(server.url) == password_of(url)
    await server.stop()
    socket_of(url).parent.rmdir()


def test_servers_on_the_path_come_first_unless_they_are_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = find_server_binary()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, version in (("valkey-server", "Redis server v=6.2.1 sha=0"), ("redis-server", "no version at all")):
        _fake_binary(tmp_path / name, version)
    assert find_server_binary().parent.name == bundled.parent.name
    _fake_binary(tmp_path / "redis-server", "Redis server v=7.0.15 sha=00000000:0")
    assert find_server_binary() == tmp_path / "redis-server"


def _fake_binary(path: Path, answer: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)


async def test_servers_that_evict_are_refused(server: EmbeddedServer, tmp_path: Path) -> None:
    async with Redis.from_url(server.url) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigError, match="Set maxmemory-policy to noeviction"):
        await TrajectoryBus.connect(server.url, "job", bus_settings("redis"), "0", tmp_path)


async def test_starting_twice_is_one_server(server: EmbeddedServer) -> None:
    pid = server.pid
    await asyncio.gather(server.start(), server.start())
    assert server.pid == pid
