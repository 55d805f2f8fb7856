"""Reloads the server's certificate when its files are replaced, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

LOG = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # two calls of stat; certificates are renewed days before they expire


def _stamp(*paths: Path) -> tuple[tuple[int, int], ...]:
    """What changes when one of the files is replaced, also behind a link; empty while one is missing."""
    try:
        return tuple((status.st_ino, status.st_mtime_ns) for status in (path.stat() for path in paths))
    except OSError:
        return ()


async def follow_renewals(
    context: Callable[[], ssl.SSLContext | None], certificate: Path, key: Path, stopping: asyncio.Event
) -> None:
    """Load certificate and key into the server's context whenever they are replaced; new connections use them.

    Args:
        context: the server's, once it has one.
        certificate: PEM file, with its chain.
        key: PEM file.
        stopping: ends this.
    """
    seen = _stamp(certificate, key)
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), LOOK_SECONDS)
        current, serving = _stamp(certificate, key), context()
        if current in ((), seen) or serving is None:
            continue
        try:
            # Try the pair on a separate context: a mismatched pair would leave the server's own half loaded.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            serving.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            LOG.warning("the new certificate cannot be loaded, and the old one stays in use: %s", error)
            continue
        seen = current
        LOG.info("serving with a new certificate", extra={"certificate": str(certificate)})
