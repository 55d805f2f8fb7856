"""Files of JSON and of JSON lines: damage is named by file and line, a half line at the end is none."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from jackpot.errors import DamagedRecordError
from jackpot.storage.json_files import (
    JsonLinesReader,
    JsonLinesWriter,
    read_object,
    read_object_if_whole,
    read_record,
    read_record_if_whole,
    replace_json,
)


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float


def test_an_object_is_replaced_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    replace_json(path, {"x": 1, "y": 0.5})
    replace_json(path, {"x": 2, "y": 0.25, "of a later version": True})
    assert read_object(path) == {"x": 2, "y": 0.25, "of a later version": True}
    assert read_record(path, Point) == Point(2, 0.25)
    assert [file.name for file in tmp_path.iterdir()] == ["point.json"]


@pytest.mark.parametrize(
    ("text", "why"), [("{", "Expecting property name"), ("[1]", "it is not a JSON object"), ("", "Expecting value")]
)
def test_a_damaged_object_is_named(tmp_path: Path, text: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "point.json"
    assert read_object_if_whole(path) is None and not caplog.records
    path.write_text(text)
    with pytest.raises(DamagedRecordError, match=rf"{re.escape(str(path))} is damaged \({why}.*restore it or start"):
        read_object(path)
    assert read_object_if_whole(path) is None
    assert f"{path} is damaged ({why}" in caplog.text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Invalid JSON"),
        ('{"x": 1}', "y: Field required"),
        ('{"x": "far", "y": 0.5}', "x: Input should be a valid integer"),
    ],
)
def test_a_damaged_record_is_named_with_its_field(
    tmp_path: Path, text: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "point.json"
    assert read_record_if_whole(path, Point) is None and not caplog.records
    path.write_text(text)
    with pytest.raises(DamagedRecordError, match=rf"{re.escape(str(path))} is damaged \({re.escape(why)}"):
        read_record(path, Point)
    for _ in range(2):
        assert read_record_if_whole(path, Point) is None
    assert len(caplog.records) == 1  # a file that is polled does not fill the log


def test_a_reader_gives_each_row_once_and_can_be_taken_up_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    reader = JsonLinesReader(path)
    assert reader.read() == []
    path.write_text('{"n": 1}\nnonsense\n{"n": 2}\n{"n":')
    rows = reader.read()
    assert [row["n"] for row, _ in rows] == [1, 2]
    assert f"{path}, line 2, is damaged" in caplog.text
    with path.open("a") as file:
        file.write(" 3}\n")
    assert [row["n"] for row, _ in reader.read()] == [3]
    assert [row["n"] for row in JsonLinesReader(path, rows[0][1]).rows()] == [2, 3]
    assert [row["n"] for row, _ in JsonLinesReader(path).read(max_bytes=12)] == [1]


@pytest.mark.parametrize(("line", "why"), [("nonsense", "Expecting value"), ("[]", "it is not a JSON object")])
def test_a_strict_reader_refuses_a_damaged_row_and_names_its_line(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"x": 1, "y": 2}}\n\r{{"x": 3, "y": 4}}\n{line}\n{{"x": 5, "y": 6}}\n')
    reader = JsonLinesReader(path, strict=True)
    with pytest.raises(DamagedRecordError, match=rf"{re.escape(str(path))}, line 3, is damaged \({why}"):
        reader.rows()
    second_line = len(b'{"x": 1, "y": 2}\n')
    with pytest.raises(DamagedRecordError, match="line 3, is damaged"):
        JsonLinesReader(path, second_line, strict=True).records(Point)


def test_rows_are_checked_as_records_and_a_lenient_reader_leaves_out_what_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 1, "y": 2, "z": 3}\n{"x": 1}\n{"x": 3, "y": 4}\n{"x": 5, "y')
    reader = JsonLinesReader(path)
    assert reader.records(Point) == [Point(1, 2.0), Point(3, 4.0)]
    assert f"{path}, line 2, is damaged (y: Field required)" in caplog.text
    assert reader.records(Point) == []


@pytest.mark.parametrize("half", ['{"n": 1', "x" * 100, ""])
@pytest.mark.parametrize("whole", ["", '{"n": 0}\n', '{"n": -1}\n{"n": 0}\n'])
def test_a_row_never_runs_into_a_line_that_a_crash_cut_short(tmp_path: Path, whole: str, half: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(whole + half)
    writer = JsonLinesWriter(path)
    writer.append([])
    assert path.read_text() == whole + half  # nothing to write: the file is left alone
    writer.append([{"n": 2}, {"n": 3}])
    assert path.read_text() == whole + '{"n": 2}\n{"n": 3}\n'
    with path.open("a") as file:
        file.write('{"n":')  # the disk was full for a moment
    writer.append([{"n": 4}])
    assert path.read_text() == whole + '{"n": 2}\n{"n": 3}\n{"n": 4}\n'


def test_a_durable_writer_has_its_rows_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    JsonLinesWriter(path).append([{"n": 1}])
    assert sizes == []
    JsonLinesWriter(path, durable=True).append([{"n": 2}])
    assert sizes == [2 * len('{"n": 1}\n')]
