"""`jackpot serve`: the API, the web page and the scheduler in one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn

from jackpot.control_plane.api.app import create_app
from jackpot.control_plane.backend import Backend
from jackpot.control_plane.certificate import follow_renewals
from jackpot.control_plane.settings import ServeSettings
from jackpot.errors import ConfigError
from jackpot.telemetry.logs import setup_logging

LOG = logging.getLogger(__name__)

GRACE_SECONDS = 2  # streams end when the server stops; this is for slow downloads


def serve(settings: ServeSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Jobs that run then keep running; the next server takes them over.

    Args:
        settings: of the server.
        announce: called with the server's address once it is bound.

    Raises:
        ConfigError: the settings cannot work, or the port is taken.
        JackpotError: the job store cannot be used.
    """
    settings.check()
    setup_logging("serve", "0")
    backend = Backend(settings)
    app = create_app(backend)
    bound = _bind(settings)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # a client can put any address into a header
        server_header=False,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        limit_concurrency=1024,
        h11_max_incomplete_event_size=16 << 10,
    )
    url = settings.url.replace(f":{settings.port}", f":{bound.getsockname()[1]}")
    with contextlib.closing(bound):
        asyncio.run(_serve(backend, _Server(config), bound, lambda: announce(url)))


async def _serve(backend: Backend, server: _Server, bound: socket.socket, announce: Callable[[], None]) -> None:
    """The backend is opened before the first connection is accepted, and closed after the last."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        # Streams first: uvicorn waits for open connections before anything else.
        backend.stopping.set()
        server.should_exit = True

    async with backend.open():
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        LOG.info("listening", extra={"port": bound.getsockname()[1]})
        announce()
        renewals = _follow_renewals(backend, server)
        await server.serve(sockets=[bound])
        backend.stopping.set()
        if renewals is not None:
            await renewals


def _follow_renewals(backend: Backend, server: _Server) -> asyncio.Task[None] | None:
    """Ends with the backend's stopping."""
    certificate, key = backend.settings.tls_certificate, backend.settings.tls_key
    if certificate is None or key is None:
        return None

    def context() -> ssl.SSLContext | None:
        return server.config.ssl if server.config.loaded else None

    return asyncio.create_task(follow_renewals(context, certificate, key, backend.stopping))


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would end the process on one before the backend is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing to capture."""
        yield


def _bind(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The socket names its protocol: asyncio sets TCP_NODELAY only then. Without it every answer waits 40 ms for an
    # acknowledgement between its head and its body.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        bound.close()
        remedy = "Is another server running? Choose another --port."
        raise ConfigError("--port", settings.port, f"cannot be bound ({error.strerror})", remedy) from None
    return bound
