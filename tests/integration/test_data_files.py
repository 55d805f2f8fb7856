"""A file of prompts and answers of every kind that people have, from `jackpot validate` through all services."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_world import JACKPOT, MAX_GROUP_BYTES, assert_ledger_adds_up, jackpot_run
from patience import PATIENCE_SECONDS, TEST_SECONDS

from jackpot.bus.kept_trajectories import KeptTrajectories

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]

CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "system", "content": "you calculate."}, {"role": "user", "content": "3*2="}]
NO_TEXT, TOO_LONG = 10, 13
"""Lines that no engine takes: half a character, and a prompt beyond the models' positions."""

LINES: dict[int, tuple[Any, Any]] = {
    1: ("mira has 3 stamps and gets 6 more. how many?", "3+6=<<3+6=9>>9\n#### 9"),
    2: (r"find $\frac{2}{5}$ of 4.", r"it is $\boxed{\frac{8}{5}}$."),
    3: ("number 1: find it.", r"5\sqrt{7}"),
    4: ("what is left of 41 after division by 1000?", 41),
    5: (CHAT, "6"),
    6: ("小红有3本书，又买了4本，一共有几本？请以“答案：”结尾。", "7"),
    7: ("nul \0 3+3=", "6"),
    8: ("line\u2028separator 4+4=", "8"),
    9: ("escape \x1b[31m red 5+5=", "10"),
    NO_TEXT: ("half an emoji \ud83d 2+2=", "4"),
    11: ("3-3=", 0),
    12: ("3-4=", -1),
    TOO_LONG: ("word " * 100, "7"),
    14: ("what is 7+5?", "12"),
}
HELD_OUT = (("what  is 7+5? ", "12"), ("what is 7+5?\t", "12"), ("term " * 100, "7"), ("what is 8+5?", "13"))


def write_rows(path: Path, rows: list[tuple[Any, Any]]) -> str:
    """With a mark of byte order and the line ends of Windows, the answers deeper than one key."""
    lines = [json.dumps({"prompt": prompt, "reward_model": {"ground_truth": answer}}) for prompt, answer in rows]
    path.write_bytes("".join(["\ufeff", *(line + "\r\n" for line in lines)]).encode())
    return str(path)


def chat_model(directory: Path, model: Path) -> str:
    shutil.copytree(model, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return str(directory)


@pytest.fixture
def job_file(tmp_path: Path, make_model: MakeModel) -> Path:
    params = {
        "path": write_rows(tmp_path / "rows.jsonl", list(LINES.values())),
        "eval_path": write_rows(tmp_path / "held_out.jsonl", list(HELD_OUT)),
        "answer_key": "reward_model.ground_truth",
        "reward": "math_verify",
    }
    actor = make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1)
    job = {
        "policy": {"model": chat_model(tmp_path / "policy", make_model("qwen3", seed=1))},
        "actor": {"model": chat_model(tmp_path / "actor", actor)},
        "task": {"name": "jsonl", "params": params},
        "sampling": {"max_tokens": 8, "group_size": 2},
        "learner": {"steps": 2, "groups_per_batch": 7},  # 14 slots: each of the 13 prompts has its turn
        "evaluation": {"every": 2, "prompts": 8},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def test_rows_of_every_kind_are_graded_and_trained_on(tmp_path: Path, job_file: Path) -> None:
    checked = subprocess.run(
        [*JACKPOT, "validate", str(job_file)], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert checked.returncode == 0, checked.stderr
    lines = checked.stdout.splitlines()
    assert lines[0] == "training prompts         11 of 13 can be used"  # line 14 is held out, but for white space
    assert lines[1].startswith(f"  left out: the prompt of line {NO_TEXT} cannot be encoded")
    num_tokens = len("<user>" + "word " * 100 + "\n<assistant>")  # the tokenizer's tokens are characters
    assert lines[2].startswith(f"  left out: the prompt of line {TOO_LONG} has {num_tokens} tokens")
    assert lines[3] == "held-out prompts         2 of 4 are asked"
    assert lines[6:-2] == [
        "the right answer         1.00 on average, 8 of 8 earn 1",
        "the right answer, boxed  1.00 on average, 8 of 8 earn 1",
        "an empty text            0.00 on average, 0 of 8 earn 1",
    ]
    assert lines[-2].startswith("wrong texts              0.00 on average, 0 of ")
    directory = tmp_path / "run"
    with jackpot_run(str(job_file), "--run-dir", str(directory), directory=directory) as run:
        code, _, stderr = run.finish()
    assert code == 0, stderr
    assert_ledger_adds_up(run.summary, trained=14)
    assert set(run.summary["ledger"]["dropped"]) == {"prompt_unusable"}
    assert run.summary["restarts"] == run.summary["reward_failures"] == 0
    kept = KeptTrajectories(directory, MAX_GROUP_BYTES)
    trained = {scored.group.prompt_index + 1 for batch in (0, 1) for scored in kept.read(batch)}
    assert trained == set(range(1, 14)) - {NO_TEXT, TOO_LONG}
    records = [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()]
    reasons = {record["detail"].split(" of ")[1].split()[1] for record in records if record["state"] == "dropped"}
    assert reasons == {str(NO_TEXT), str(TOO_LONG)}
    evaluations = [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["num_prompts"], row["comparable"]) for row in evaluations] == [(0, 2, True), (2, 2, True)]
