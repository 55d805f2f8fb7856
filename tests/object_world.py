"""A server that speaks S3 (moto's, in a process of its own), behind a door that can be shut and opened again."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from patience import PATIENCE_SECONDS

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Door:
    """Passes connections on to a port. Shut, it breaks those that are open and refuses others: to clients the server is
    down, with its disk intact."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._port = 0
        self.open()

    @property
    def url(self) -> str:
        """What clients connect to; the same after a shut and open."""
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Take connections, on the port of before."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(64)
        self._port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse connections, and break those that are open."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._behind)) as server:
            pair = {client: server, server: client}
            self._open |= pair.keys()
            try:
                while True:
                    for ready in select.select(list(pair), [], [])[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        pair[ready].sendall(data)
            except OSError:
                return
            finally:
                self._open -= pair.keys()


class ObjectWorld:
    """The server, its door, and a bucket."""

    def __init__(self, port: int) -> None:
        self.door = Door(port)
        self.environ = {
            "AWS_ENDPOINT_URL": self.door.url,
            "AWS_ACCESS_KEY_ID": "jackpot",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # without credentials nothing on the network is asked for them
        }
        self.bucket = f"jackpot-{uuid.uuid4().hex[:8]}"
        self.url = f"s3://{self.bucket}/runs"

    @property
    def client(self) -> Any:
        """boto3's own client, straight to the server."""
        import boto3

        return boto3.session.Session(
            aws_access_key_id="jackpot", aws_secret_access_key="not-a-secret", region_name="us-east-1"
        ).client("s3", endpoint_url=self.door.url)

    def keys(self, prefix: str = "") -> list[str]:
        """What is in the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        """What an object holds."""
        content: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def spoil(self, key: str) -> None:
        """Change a byte in the middle of an object."""
        data = bytearray(self.read(key))
        data[len(data) // 2] ^= 1
        self.client.put_object(Bucket=self.bucket, Key=key, Body=bytes(data))


@contextmanager
def object_world() -> Iterator[ObjectWorld]:
    """Run a server with one bucket."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    world = None
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (line := process.stdout.readline()).strip().isdecimal():
            assert line and time.monotonic() < deadline, "the S3 server does not start"
        world = ObjectWorld(int(line))
        world.client.create_bucket(Bucket=world.bucket)
        yield world
    finally:
        if world is not None:
            world.door.shut()
        process.kill()
        process.communicate()
