"""A proxy between clients and a server that cuts connections after the server has worked and before it is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit


class CuttingProxy:
    """Passes bytes between a unix socket of its own and the server's. Every ``cut_every``-th reply to a script (0: only
    the next one after ``cut_next`` was set) is thrown away together with its connection. The server has executed the
    script by then."""

    def __init__(self, server_url: str, socket: Path, cut_every: int) -> None:
        self._server_path = urlsplit(server_url).path
        self._cut_every = cut_every
        self._replies = 0
        self.cut_next = False
        self.num_cuts = 0
        self.socket = socket
        self.url = f"unix://:{urlsplit(server_url).password}@{quote(str(socket))}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one client connection."""
        server_reader, server_writer = await asyncio.open_unix_connection(self._server_path)
        scripts: list[bytes] = []  # sent on this connection, not answered yet
        requests = asyncio.create_task(_pump(reader, server_writer, scripts))
        try:
            while data := await server_reader.read(1 << 16):
                if scripts:
                    scripts.clear()
                    self._replies += 1
                    if self.cut_next or (self._cut_every and self._replies % self._cut_every == 0):
                        self.cut_next = False
                        self.num_cuts += 1
                        break
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            requests.cancel()
            for open_writer in (writer, server_writer):
                open_writer.close()
                with suppress(OSError):
                    await open_writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scripts: list[bytes]) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            if b"EVALSHA" in data:
                scripts.append(data)
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def cutting_proxy(server_url: str, socket: Path, cut_every: int = 0) -> AsyncIterator[CuttingProxy]:
    """Run a proxy; ``proxy.url`` is what clients connect to."""
    proxy = CuttingProxy(server_url, socket, cut_every)
    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(proxy.serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_unix_server(accept, str(socket))
    try:
        yield proxy
    finally:
        server.close()
        await asyncio.gather(*connections)
