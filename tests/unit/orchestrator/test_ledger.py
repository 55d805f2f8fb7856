"""The ledger on disk: each group once, durable, readable after a crash in the middle of a line."""

from __future__ import annotations

import json

import pytest

from jackpot.errors import JackpotError
from jackpot.orchestrator.ledger import LedgerFile
from jackpot.storage.run_records import TerminalRecord
from jackpot.trajectory import GroupKey

TRAINED = TerminalRecord("job.s0.e0.p3.a0", "trained", "", 1, "")
DROPPED = TerminalRecord("job.s1.e0.p4.a0", "dropped", "rollout_failed", -1, "three attempts failed")


def test_rows_survive_and_are_recognised(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = LedgerFile(path)
    assert ledger.append([TRAINED, DROPPED, TRAINED]) == [TRAINED, DROPPED]
    assert LedgerFile(path).append([DROPPED]) == []
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"group_id": "job.s0.e0.p3.a0", "state": "trained", "reason": "", "step": 1, "detail": ""},
        {
            "group_id": "job.s1.e0.p4.a0",
            "state": "dropped",
            "reason": "rollout_failed",
            "step": -1,
            "detail": "three attempts failed",
        },
    ]
    assert LedgerFile(path).ended == {
        GroupKey(0, 0, 3): ("trained", ""),
        GroupKey(1, 0, 4): ("dropped", "rollout_failed"),
    }


def test_a_line_that_a_crash_cut_short_is_written_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    LedgerFile(path).append([TRAINED, DROPPED])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    ledger = LedgerFile(path)
    assert "job.s1.e0.p4.a0" not in ledger
    ledger.append([TRAINED, DROPPED])
    assert path.read_bytes() == whole


def test_a_group_declared_lost_may_turn_out_trained(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = LedgerFile(path)
    ledger.append([TerminalRecord(TRAINED.group_id, "dropped", "lost", -1, "")])
    assert ledger.append([TRAINED]) == [TRAINED]
    assert ledger.append([TRAINED, TerminalRecord(TRAINED.group_id, "dropped", "unused", -1, "")]) == []
    assert LedgerFile(path).ended == {GroupKey(0, 0, 3): ("trained", "")}


def test_a_lost_group_stays_lost_however_else_it_is_told_to_have_ended(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = LedgerFile(path)
    lost = TerminalRecord(TRAINED.group_id, "dropped", "lost", -1, "")
    ledger.append([lost])
    assert ledger.append([lost, TerminalRecord(TRAINED.group_id, "dropped", "unused", -1, "")]) == []
    assert len(path.read_text().splitlines()) == 1
    assert LedgerFile(path).ended == {GroupKey(0, 0, 3): ("dropped", "lost")}


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"group_id": \n{}\n')
    with pytest.raises(JackpotError, match="line 1, is damaged"):
        LedgerFile(path)
