"""Checks on every request (host names, origins, tokens, limits), and headers on every response."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jackpot.control_plane.api.problems import ProblemError
from jackpot.control_plane.service_metrics import ServiceMetrics
from jackpot.control_plane.settings import ServeSettings
from jackpot.control_plane.tokens import TokenFile

MAX_CLIENTS = 10_000
FAILED_TOKENS_PER_SECOND = 2.0
FAILED_TOKENS_BURST = 20

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (
        b"content-security-policy",
        b"default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
)
_HSTS = (b"strict-transport-security", b"max-age=31536000")


class TokenBucket:
    """Requests of many clients, each held to ``rate`` a second with bursts of ``burst``."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, moment: float | None = None) -> float:
        """Count one request; 0 if it may pass, else the seconds until the next may."""
        if self._rate <= 0:
            return 0.0
        moment = time.monotonic() if moment is None else moment
        level, before = self._levels.pop(client, (float(self._burst), moment))
        level = min(self._burst, level + (moment - before) * self._rate)
        allowed = level >= 1
        self._levels[client] = (level - 1 if allowed else level, moment)
        if len(self._levels) > MAX_CLIENTS:
            self._levels.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self._rate


class Guard:
    """ASGI middleware; the outermost one.

    Args:
        app: the application to guard.
        settings: limits, names, whether a token is needed.
        tokens: the tokens that the server accepts.
        metrics: counts requests.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, tokens: TokenFile, metrics: ServiceMetrics) -> None:
        self._app = app
        self._settings = settings
        self._tokens = tokens
        self._metrics = metrics
        self._requests = TokenBucket(settings.requests_per_second, settings.burst)
        self._failures = TokenBucket(FAILED_TOKENS_PER_SECOND, FAILED_TOKENS_BURST)
        self._hosts = {name.lower() for name in settings.allowed_hosts} | {settings.host.strip("[]").lower()}
        if settings.loopback:
            self._hosts |= _LOCAL_NAMES
        self._extra = (*_HEADERS, _HSTS) if settings.tls or settings.tls_elsewhere else _HEADERS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        self._metrics.request_began()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._headers(message["headers"])]
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, self._limited(scope, receive), answer)
        except ProblemError as problem:
            await problem.response(scope["path"])(scope, receive, answer)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "") or "other"
            self._metrics.count_request(scope["method"], path, status, time.monotonic() - started)

    def _headers(self, present: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name.lower() for name, _ in present}
        return [*self._extra, *(() if b"cache-control" in names else ((b"cache-control", b"no-store"),))]

    def _admit(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        name = (urlsplit(f"//{host}").hostname or "") if _is_host(host) else ""
        if not self._settings.tls_elsewhere and name not in self._hosts and "*" not in self._hosts:
            # DNS rebinding: a web site can point its own name at this machine. The Host header shows the name used.
            remedy = "Use the server's own address, or start it with --allowed-host."
            raise ProblemError(421, "unknown-host", f"This server does not go by the name {name[:80]!r}. {remedy}")
        origin = headers.get(b"origin")
        crosses = headers.get(b"sec-fetch-site") in ("cross-site", "same-site")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and (
            crosses or (origin is not None and urlsplit(origin).netloc != host)
        ):
            raise ProblemError(403, "cross-origin", "Other web sites may not act on this server in your name.")
        client = self._identify(scope, headers)
        if wait := self._requests.take(client):
            raise _too_many(wait, "Too many requests")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _identify(self, scope: Scope, headers: MutableMapping[bytes, str]) -> str:
        """The caller: the token's id, else the address."""
        address = (scope.get("client") or ("local", 0))[0]
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["token"] = None
        if not token or not self._settings.token_required:
            return str(address)
        record = self._tokens.check(token.strip()) if scheme.lower() == "bearer" else None
        if record is None:
            if wait := self._failures.take(str(address)):
                raise _too_many(wait, "Too many requests with invalid tokens")
            return str(address)
        state["token"] = record
        return record.id

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Bodies without a declared length are cut off at the limit, too."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._settings.max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ProblemError:
        limit = self._settings.max_body_bytes >> 10
        return ProblemError(413, "body-too-large", f"A body may have at most {limit} KiB. Job files are small.")


def _is_host(text: str) -> bool:
    try:
        return bool(urlsplit(f"//{text}").hostname)
    except ValueError:
        return False


def _too_many(wait: float, what: str) -> ProblemError:
    seconds = max(1, math.ceil(wait))
    return ProblemError(429, "too-many-requests", f"{what}. Wait {seconds} s.", headers={"Retry-After": str(seconds)})
