"""Which of the policies at hand did best on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path


def best_step(evaluations: Path, among: Collection[int]) -> int | None:
    """The step of greatest ``policy_accuracy`` in ``evaluations.jsonl`` among the given; the newest of equals.

    None where none of them was evaluated. The orchestrator may be in the middle of a line: that one is left out.
    """
    try:
        content = evaluations.read_bytes()
    except FileNotFoundError:
        return None
    whole = content[: content.rfind(b"\n") + 1]
    rows = [json.loads(line) for line in whole.splitlines()]
    ranked = [(row["policy_accuracy"], row["step"]) for row in rows if row["step"] in among]
    return max(ranked)[1] if ranked else None
