"""Bearer tokens: random, shown once, stored as hashes, with a scope and an expiry."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from pathlib import Path

from jackpot.control_plane.jobs.records import now
from jackpot.errors import ConfigError

_TOKEN = re.compile(r"jp_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}")


class Scope(IntEnum):
    """What a token allows; each includes the ones before it."""

    READ = 1  # look at jobs
    WRITE = 2  # submit, cancel, resume
    ADMIN = 3  # delete

    @classmethod
    def of(cls, name: str) -> Scope:
        """The scope of this name.

        Raises:
            ConfigError: there is none.
        """
        try:
            return cls[name.upper()]
        except KeyError:
            raise ConfigError("--scope", name, "is not a scope", "Use read, write or admin.") from None


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token as stored: the token itself cannot be derived from it."""

    id: str
    name: str
    scope: str
    sha256: str
    created: str
    expires: str | None

    @property
    def expired(self) -> bool:
        """Whether it has expired."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= now()


class TokenFile:
    """The tokens of one server, in a file that only its owner can read. Changes take effect at once.

    Args:
        path: of the file; made with the first token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, TokenRecord] = {}
        self._read_at: tuple[int, int] | None = None

    @property
    def exists(self) -> bool:
        """Whether a token was ever made; a file whose last token was revoked still requires one."""
        return self._path.exists()

    def create(self, name: str, scope: Scope, lifetime: timedelta | None) -> str:
        """Make a token and return it; it cannot be shown again.

        Raises:
            ConfigError: the name is not valid.
        """
        if _NAME.fullmatch(name) is None:
            raise ConfigError("--name", name, "is not a token's name", "Use letters, digits and . _ @ -, at most 63.")
        secret, token_id = secrets.token_urlsafe(32), secrets.token_hex(4)
        moment = now()
        record = TokenRecord(
            id=token_id,
            name=name,
            scope=scope.name.lower(),
            # The secret has 256 random bits: no dictionary helps, and one round of a fast hash is enough.
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            created=moment.isoformat(),
            expires=None if lifetime is None else (moment + lifetime).isoformat(),
        )
        with self._changing() as records:
            records[token_id] = record
        return f"jp_{token_id}_{secret}"

    def list(self) -> list[TokenRecord]:
        """All tokens, as stored."""
        return list(self._records().values())

    def revoke(self, token_id: str) -> TokenRecord:
        """Revoke a token, at once.

        Raises:
            ConfigError: there is no such token.
        """
        with self._changing() as records:
            if token_id not in records:
                raise ConfigError("token", token_id, "is not the id of a token", "See `jackpot token list`.")
            return records.pop(token_id)

    def check(self, token: str) -> TokenRecord | None:
        """The record of a token that is valid now, else None."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        record = self._records().get(match[1])
        # Compared in constant time, even when there is no such token.
        expected = record.sha256 if record is not None else "0" * 64
        same = hmac.compare_digest(hashlib.sha256(match[2].encode()).hexdigest(), expected)
        return record if record is not None and same and not record.expired else None

    def _records(self) -> dict[str, TokenRecord]:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return {}
        changed = (status.st_mtime_ns, status.st_ino)
        if changed != self._read_at:
            self._known, self._read_at = self._read(), changed
        return self._known

    def _read(self) -> dict[str, TokenRecord]:
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))["tokens"]
            return {row["id"]: TokenRecord(**row) for row in rows}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "Restore it, or remove it and make new tokens."
            raise ConfigError("tokens", str(self._path), f"cannot be read ({type(error).__name__})", remedy) from None

    @contextmanager
    def _changing(self) -> Iterator[dict[str, TokenRecord]]:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self._read()
            yield records
            aside = self._path.with_suffix(".tmp")
            aside.unlink(missing_ok=True)
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"tokens": [asdict(record) for record in records.values()]}, file, indent=2)
            aside.replace(self._path)
        finally:
            os.close(lock)


def parse_lifetime(text: str) -> timedelta | None:
    """``30d``, ``12h``, ``15m``, ``90s``; ``never`` is None.

    Raises:
        ConfigError: it is none of these.
    """
    if text == "never":
        return None
    match = re.fullmatch(r"(\d{1,5})([smhd])", text)
    if match is None or int(match[1]) == 0:
        raise ConfigError("--expires", text, "is not a time span", "Write e.g. 12h, 30d or never.")
    return timedelta(**{{"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[match[2]]: int(match[1])})


def without_hash(record: TokenRecord) -> dict[str, object]:
    """A token's record for people."""
    fields = asdict(record)
    del fields["sha256"]
    return fields | {"expired": record.expired}
