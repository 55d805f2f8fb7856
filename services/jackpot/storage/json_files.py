"""Files of JSON and of JSON lines: written atomically; errors of reading name the damaged file and line.

A writer may be killed in the middle of a line. A last line without its end is therefore no damage: readers skip it,
and the next writer removes it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from jackpot.errors import DamagedRecordError

LOG = logging.getLogger(__name__)

MAX_READ_BYTES = 4 << 20

Row = dict[str, Any]
Record = TypeVar("Record")


def read_object(path: Path) -> Row:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedRecordError: the file cannot be read, or holds something else.
    """
    return _object(_bytes(path), path, None)


def read_record(path: Path, kind: type[Record]) -> Record:
    """The dataclass ``kind`` in a file, its fields' types checked.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedRecordError: the file cannot be read, or holds something else.
    """
    return parse_record(_bytes(path), kind, path)


def read_object_if_whole(path: Path) -> Row | None:
    """As :func:`read_object`, for callers that can do without: None if the file is missing or damaged.

    Damage is logged.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except DamagedRecordError as error:
        warn_once(str(error))
        return None


def read_record_if_whole(path: Path, kind: type[Record]) -> Record | None:
    """As :func:`read_record`, for callers that can do without: None if the file is missing or damaged.

    Damage is logged.
    """
    try:
        return read_record(path, kind)
    except FileNotFoundError:
        return None
    except DamagedRecordError as error:
        warn_once(str(error))
        return None


def parse_record(text: bytes, kind: type[Record], path: Path, line: int | None = None) -> Record:
    """The dataclass ``kind`` from JSON; unknown fields are left out.

    Raises:
        DamagedRecordError: names the text's file and line.
    """
    try:
        hashable: Any = kind  # which mypy does not believe of type[Record]
        record: Record = _adapter(hashable).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DamagedRecordError(path, line, f"{field}: {first['msg']}" if field else first["msg"]) from None
    return record


def replace_json(path: Path, content: object, indent: int | None = None) -> None:
    """Replace a file by JSON, written aside and renamed: readers find the old content or the new, complete.

    Not durable: use :func:`jackpot.storage.durable_files.replace_synced` where a crash of the machine matters.

    Raises:
        OSError: the disk is full or gone.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    aside.replace(path)


class JsonLinesWriter:
    """Appends to a file of JSON lines. One writer at a time.

    Args:
        path: of the file; created with its first row.
        durable: whether rows are on the disk when :meth:`append` returns.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self._path = path
        self._durable = durable

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows in one write. First removes a last line that was cut short, since a row would run into it.

        Raises:
            OSError: the disk is full or gone.
        """
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not text:
            return
        with self._path.open("ab+") as file:
            _remove_half_line(file)
            file.write(text.encode())
            if self._durable:
                file.flush()
                os.fsync(file.fileno())


def _remove_half_line(file: BinaryIO) -> None:
    end = position = file.seek(0, os.SEEK_END)
    size = 1  # the last byte shows whether there is one; then ever larger pieces
    while position:
        start = max(0, position - size)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position, size = start, MAX_READ_BYTES
    if position < end:
        file.truncate(position)


class JsonLinesReader:
    """The rows of a growing file, each once. An incomplete last line is read once its rest is written.

    Args:
        path: of the file; it need not exist yet.
        offset: where to begin, in bytes; an earlier value of :attr:`offset`.
        strict: whether a damaged line is an error. Otherwise it is logged and left out, so that observers of a run do
            not fail.
    """

    def __init__(self, path: Path, offset: int = 0, *, strict: bool = False) -> None:
        self._path = path
        self._strict = strict
        self.offset = offset

    def read(self, max_bytes: int = MAX_READ_BYTES) -> list[tuple[Row, int]]:
        """The new rows, each with the offset after it; at most ``max_bytes`` at once.

        Raises:
            DamagedRecordError: a line is not a JSON object, and the reader is strict.
        """
        return [
            (row, offset) for line, offset in self._lines(max_bytes) if (row := self._parsed(line, offset)) is not None
        ]

    def rows(self) -> list[Row]:
        """All new rows, however many.

        Raises:
            DamagedRecordError: as :meth:`read`.
        """
        rows: list[Row] = []
        while lines := self._lines(MAX_READ_BYTES):
            rows += (row for line, offset in lines if (row := self._parsed(line, offset)) is not None)
        return rows

    def records(self, kind: type[Record]) -> list[Record]:
        """All new rows as dataclasses of this kind.

        Raises:
            DamagedRecordError: as :meth:`read`, also where a field is missing or of another type.
        """
        records: list[Record] = []
        while lines := self._lines(MAX_READ_BYTES):
            for line, offset in lines:
                try:
                    records.append(parse_record(line, kind, self._path))
                except DamagedRecordError as error:
                    self._complain(offset, error.why)
        return records

    def _lines(self, max_bytes: int) -> list[tuple[bytes, int]]:
        """The new complete lines, each with the offset after it."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(max_bytes)
        except FileNotFoundError:
            return []
        lines = []
        # Not bytes.splitlines(), which also ends a line at a lone \r.
        for line in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]:
            self.offset += len(line) + 1
            lines.append((line, self.offset))
        return lines

    def _parsed(self, line: bytes, end: int) -> Row | None:
        try:
            return _object(line, self._path, None)
        except DamagedRecordError as error:
            self._complain(end, error.why)
            return None

    def _complain(self, end: int, why: str) -> None:
        with self._path.open("rb") as file:
            error = DamagedRecordError(self._path, file.read(end).count(b"\n"), why)
        if self._strict:
            raise error from None
        warn_once(str(error))


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning only the first time, so that polling does not fill the log."""
    LOG.warning("%s", message)


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedRecordError(path, None, str(error)) from None


def _object(text: bytes, path: Path, line: int | None) -> Row:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DamagedRecordError(path, line, str(error)) from None
    if not isinstance(content, dict):
        raise DamagedRecordError(path, line, "it is not a JSON object")
    return content
