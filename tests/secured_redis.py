"""A Redis as operators should run it: TLS with client certificates, users by role, everything else shut.

The server is the embedded one behind a TLS terminator of our own, or, where one is at hand that speaks TLS
(JACKPOT_TEST_TLS_SERVER, or redis-server or valkey-server on PATH), that one itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from certificates import Authority
from patience import PATIENCE_SECONDS

from jackpot.bus.server import find_server_binary

ROOT = Path(__file__).parents[1]
ROLES = ("control-plane", "orchestrator", "scorer", "learner")
ADMIN = "test-admin"


@dataclass(frozen=True)
class SecuredRedis:
    """Where it is, and how to get in."""

    port: int
    tls_dir: Path
    passwords: dict[str, str]
    native: bool

    def url(self, user: str) -> str:
        """rediss:// without files: those come from JACKPOT_TLS_DIR."""
        return f"rediss://{user}:{self.passwords[user]}@localhost:{self.port}/0"

    def full_url(self, user: str) -> str:
        """The same with all files named."""
        files = f"ssl_certfile={self.tls_dir}/tls.crt&ssl_keyfile={self.tls_dir}/tls.key"
        return f"{self.url(user)}?ssl_ca_certs={self.tls_dir}/ca.crt&{files}"

    def refusals(self) -> list[str]:
        """What users tried that their rules forbid, as the server has noted it."""
        with redis.Redis.from_url(self.full_url(ADMIN)) as admin:
            return [f"{entry['username']}: {entry['object']} ({entry['reason']})" for entry in admin.acl_log()]


@contextmanager
def secured_redis(directory: Path, authority: Authority) -> Iterator[SecuredRedis]:
    """Start one with the rules of deploy/redis/users.acl, and a user for the test's own questions."""
    directory.mkdir(parents=True, exist_ok=True)
    own = authority.issue(directory / "server-tls", "localhost")
    client = authority.issue(directory / "client-tls", "client")
    rules = (ROOT / "deploy/redis/users.acl").read_text("utf-8")
    (directory / "template.acl").write_text(f"{rules}user {ADMIN} on >{ADMIN} ~* &* +@all\n")
    passwords = {role: f"password-of-{role}" for role in ROLES}
    variables = {f"REDIS_PASSWORD_{r.upper().replace('-', '_')}": password for r, password in passwords.items()}
    native = native_server()
    variables |= {
        "REDIS_PASSWORD": "nobody-has-this-one",
        "REDIS_SERVER": str(native or find_server_binary()),
        "REDIS_USERS": str(directory / "template.acl"),
        "REDIS_RUN_DIR": str(directory),
        "REDIS_DATA_DIR": str(directory),
    }
    port, inner = _free_port(), _free_port()
    if native:
        files = (
            "--tls-cert-file",
            own / "tls.crt",
            "--tls-key-file",
            own / "tls.key",
            "--tls-ca-cert-file",
            own / "ca.crt",
        )
        options = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "yes", *map(str, files)]
    else:
        options = ["--port", str(inner), "--bind", "127.0.0.1"]
    found = SecuredRedis(port, client, passwords | {ADMIN: ADMIN}, native is not None)
    with (directory / "server.log").open("wb") as log:
        command = ["sh", str(ROOT / "deploy/redis/start.sh"), *options]
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
    try:
        with terminated(port, inner, own) if native is None else _nothing():
            _wait(found, process, directory / "server.log")
            yield found
    finally:
        process.terminate()
        process.wait(20)


def native_server() -> Path | None:
    """A server that speaks TLS itself, if there is one."""
    for candidate in (
        os.environ.get("JACKPOT_TEST_TLS_SERVER"),
        shutil.which("valkey-server"),
        shutil.which("redis-server"),
    ):
        if candidate:
            linked = subprocess.run(["ldd", candidate], capture_output=True, text=True, timeout=PATIENCE_SECONDS).stdout
            if "libssl" in linked:
                return Path(candidate)
    return None


@contextmanager
def terminated(port: int, inner: int, tls_dir: Path) -> Iterator[None]:
    """TLS on ``port``, clients' certificates required; what comes is passed to ``inner`` in plaintext."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls_dir / "tls.crt", tls_dir / "tls.key")
    context.load_verify_locations(tls_dir / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    loop = asyncio.new_event_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", inner)
        except OSError:
            writer.close()
            return
        for pair in ((reader, back), (there, writer)):
            task = loop.create_task(carry(*pair))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def end() -> None:
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.set_exception_handler(lambda *_: None)  # refused handshakes are what the tests are about
    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", port, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _wait(found: SecuredRedis, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with redis.Redis.from_url(found.full_url(ADMIN)) as admin:
                admin.ping()
                return
        except redis.exceptions.ConnectionError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
