"""An S3 object store: a few calls with our own errors, retried while the store is out of reach.

Endpoint and credentials come from the environment, by AWS's own rules: ``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``, or a profile, or the role of a pod or machine; ``AWS_DEFAULT_REGION``; for a store other than
AWS's ``AWS_ENDPOINT_URL``. The store must support conditional writes (``If-Match``, ``If-None-Match``).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jackpot.errors import (
    ConfigError,
    ObjectConflictError,
    ObjectMissingError,
    ObjectRefusedError,
    ObjectUnavailableError,
)
from jackpot.storage.object_failures import NO_CONDITIONS, NO_RIGHT, failures, flat, translated

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

ABSENT = ""
"""For ``expected`` of :meth:`Objects.put`: the object must not exist yet."""

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.2, 10.0
_CHUNK_BYTES = 1 << 20
_FRUITLESS = 5
_DELETED_AT_ONCE = 1000  # S3's own limit


Observer = Callable[[str, str, float], object]
"""Receives each call: ``list``, ``read``, ``write`` or ``delete``; ``done`` or ``failed``; seconds.
A missing object, or one that is not as expected, is an answer: ``done``."""

_OPERATIONS = {"listed": "list", "read": "read", "written": "write", "deleted": "delete"}
_observers: list[Observer] = []


def observe_calls(observer: Observer) -> None:
    """Report every call of this process to an object store to ``observer``."""
    _observers.append(observer)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's entry in a listing."""

    key: str
    """Relative to the prefix of the :class:`Objects` that listed it."""
    bytes: int
    modified: float
    """Seconds since 1970."""


class Objects:
    """The objects below one prefix of a bucket. Thread-safe.

    Args:
        url: ``s3://bucket/prefix``.
        outage_seconds: how long a call is retried while the store is out of reach; 0 tries once.

    Raises:
        ConfigError: the client for S3 is not installed, or its variables are not valid.
    """

    def __init__(self, url: str, outage_seconds: float = 0.0, *, client: Any = None) -> None:
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._outage_seconds = outage_seconds
        self._client = client if client is not None else _connect(url)

    def below(self, *parts: str, outage_seconds: float | None = None) -> Objects:
        """The objects below a longer prefix, over the same connections."""
        patience = self._outage_seconds if outage_seconds is None else outage_seconds
        return Objects(self.name("/".join(parts)), patience, client=self._client)

    def name(self, key: str = "") -> str:
        """An object's address, for messages."""
        return "/".join(filter(None, (f"s3://{self._bucket}", self._prefix, key)))

    def get(self, key: str) -> tuple[bytes, str]:
        """A small object: its bytes and its tag (for ``expected`` of :meth:`put`).

        Raises:
            ObjectMissingError: it is not there.
            ObjectStoreError: the store refuses, or is out of reach for too long; all methods raise this.
        """

        def read() -> tuple[bytes, str]:
            answer = self._client.get_object(**self._at(key))
            with closing(answer["Body"]) as body:
                return body.read(), answer["ETag"]

        return self._call("read", key, read)

    def size(self, key: str) -> int:
        """Bytes of an object.

        Raises:
            ObjectMissingError: it is not there.
        """
        return self._call("read", key, lambda: int(self._client.head_object(**self._at(key))["ContentLength"]))

    def put(self, key: str, data: bytes, expected: str | None = None) -> None:
        """Write a small object.

        Args:
            key: of the object.
            data: its bytes.
            expected: the object's current tag, or :data:`ABSENT`; None writes unconditionally.

        Raises:
            ObjectConflictError: the object is not as expected. After a network failure this call itself may have
                written it: read it to find out.
        """
        condition = {} if expected is None else {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
        self._call("written", key, lambda: self._client.put_object(**self._at(key), Body=data, **condition))

    def upload(self, path: Path, key: str) -> None:
        """Write a file of any size; a large one in parts, concurrently."""

        def send() -> None:
            with path.open("rb") as file:
                self._client.upload_fileobj(file, self._bucket, self._key(key))

        self._call("written", key, send)

    def download(self, key: str, path: Path) -> None:
        """Read an object of any size into a file; a large one in parts, concurrently.

        Raises:
            ObjectMissingError: it is not there.
        """
        self._call("read", key, lambda: self._client.download_file(self._bucket, self._key(key), str(path)))

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """An object of ``size`` bytes piece by piece; after a broken connection the read resumes where it broke.

        Raises:
            ObjectUnavailableError: connections keep breaking before a single byte arrives.
        """
        done, fruitless = 0, 0
        while done < size:
            start = done
            with closing(self._call("read", key, partial(self._open_at, key, start))) as body:
                try:
                    for chunk in body.iter_chunks(_CHUNK_BYTES):
                        done += len(chunk)
                        yield chunk
                except failures() as error:
                    raised = translated(error, "read", self.name(key))
                    fruitless = 0 if done > start else fruitless + 1
                    if not isinstance(raised, ObjectUnavailableError) or fruitless > _FRUITLESS:
                        raise raised from None
                    LOG.warning("%s; resumed at byte %d", raised, done)

    def list(self, prefix: str = "") -> Sequence[ObjectInfo]:
        """Every object whose key begins with ``prefix``, in order."""
        whole = self._key(prefix) if prefix else f"{self._prefix}/" if self._prefix else ""
        start = len(self._prefix) + 1 if self._prefix else 0

        def look() -> list[ObjectInfo]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=whole)
            return [
                ObjectInfo(entry["Key"][start:], entry["Size"], entry["LastModified"].timestamp())
                for page in pages
                for entry in page.get("Contents", ())
            ]

        return self._call("listed", prefix, look)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are ignored."""
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            named = [{"Key": self._key(key)} for key in keys[first : first + _DELETED_AT_ONCE]]

            def remove(named: list[dict[str, str]] = named) -> list[dict[str, str]]:
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": named, "Quiet": True})
                return list(answer.get("Errors", ()))

            if failed := self._call("deleted", keys[first], remove):
                refusal = failed[0]
                raise ObjectRefusedError(
                    f"s3://{self._bucket}/{refusal.get('Key')} cannot be deleted ({refusal.get('Code')}). {NO_RIGHT}"
                )

    def check(self) -> None:
        """Write, read, list and delete a small object below the prefix, each once.

        Raises:
            ObjectRefusedError: the bucket does not exist, or credentials or permissions are missing.
            ObjectStoreError: anything else fails.
        """
        probe = f".jackpot-check-{random.randrange(1 << 48):012x}"
        self.put(probe, b"", ABSENT)
        try:
            self.get(probe)
            self.list(probe)
            try:
                self.put(probe, b"", ABSENT)
            except ObjectConflictError:
                return
            raise ObjectRefusedError(f"{self.name()} ignores If-None-Match. {NO_CONDITIONS}")
        finally:
            self.delete([probe])

    def _open_at(self, key: str, start: int) -> Any:
        return self._client.get_object(**self._at(key), Range=f"bytes={start}-")["Body"]

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(key)}

    def _call(self, done: str, key: str, call: Callable[[], Result]) -> Result:
        """Run a call, with retries while the store is out of reach."""
        passing, delay, deadline = failures(), FIRST_DELAY_SECONDS, time.monotonic() + self._outage_seconds
        while True:
            started, result = time.monotonic(), "failed"
            try:
                answer = call()
                result = "done"
                return answer
            except passing as error:
                raised = translated(error, done, self.name(key))
                result = "done" if isinstance(raised, (ObjectMissingError, ObjectConflictError)) else "failed"
            finally:
                _tell(done, result, time.monotonic() - started)
            pause = delay * random.uniform(0.5, 1.0)
            if not isinstance(raised, ObjectUnavailableError) or time.monotonic() + pause > deadline:
                raise raised from None
            LOG.warning("%s; retry in %.1f s", raised, pause)
            time.sleep(pause)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)


def _tell(done: str, result: str, seconds: float) -> None:
    for observer in _observers:
        observer(_OPERATIONS[done], result, seconds)


def _connect(url: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ConfigError(
            "weights.store", url, "needs boto3, which is not installed", "Install the extra: pip install 'jackpot[s3]'."
        ) from None
    settings = Config(
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=16,
        retries={"mode": "standard", "total_max_attempts": 3},
        # Our own hashes check the data; stores other than AWS's often refuse these newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        problem = f"the client cannot be created ({flat(error)})"
        raise ConfigError("weights.store", url, problem, "Correct the AWS_* variables.") from None
