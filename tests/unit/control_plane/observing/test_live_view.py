"""What a run looks like while it goes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jackpot.bus import BusDepths
from jackpot.control_plane.observing import live_view
from jackpot.control_plane.observing.live_view import LivePanel, PlainLines, Snapshot, open_view

DEPTHS = BusDepths(
    rollouts_waiting=3, rollouts_pending=1, scored_waiting=2, scored_pending=5, bytes_used=0, bytes_budget=1
)


def row(step: int, time: float = 0.0) -> dict[str, Any]:
    return {
        "step": step, "time": time, "reward/mean": 0.25, "rollout_corr/obrs_acceptance_rate": 0.8125,
        "kl/policy_actor": 0.1234, "staleness/mean": 1.0, "throughput/tokens_per_second": 4321.4,
    }  # fmt: skip


def snapshot(steps: list[dict[str, Any]], **changes: Any) -> Snapshot:
    settings: dict[str, Any] = {
        "job_id": "demo-1", "total_steps": 100, "steps": steps, "evaluations": [], "depths": DEPTHS, "ledger": None,
        "restarts": 0, "elapsed_seconds": 61.0,
    }  # fmt: skip
    return Snapshot(**settings | changes)


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200, force_terminal=False), text


def test_the_time_left_follows_the_pace_of_the_last_steps() -> None:
    slow_then_fast = [row(1, 0.0), *(row(step, 100.0 + step * 2) for step in range(2, 31))]
    assert snapshot(slow_then_fast).eta_seconds == pytest.approx(70 * 2.0)
    assert snapshot([row(1)]).eta_seconds is None
    assert snapshot([]).eta_seconds is None and snapshot([]).step == 0


def test_a_line_says_everything_that_one_asks_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "PLAIN_SECONDS", 0.0)
    screen, text = console()
    view = PlainLines(screen)
    view.show(snapshot([row(9, 10.0), row(10, 13.0)], evaluations=[{"step": 0, "policy_accuracy": 0.5}]))
    accuracy, line = text.getvalue().splitlines()
    assert accuracy == "step     0  policy accuracy 0.500 on held-out prompts"
    assert line == (
        "step    10/100  reward 0.250  acceptance 0.812  KL policy‖actor 0.123  staleness 1.0  4321 tokens/s"
        "  queues: 4 to score, 2 to train, 5 to commit  ETA 4:30"
    )


def test_a_line_comes_only_with_news_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = console()
    view = PlainLines(screen)
    view.show(snapshot([row(1)]))
    for step in (1, 2, 3):
        view.show(snapshot([row(step)]))
    assert len(text.getvalue().splitlines()) == 1  # within PLAIN_SECONDS
    monkeypatch.setattr(live_view, "PLAIN_SECONDS", 0.0)
    evaluations = [{"step": 0, "policy_accuracy": 0.5}, {"step": 3, "policy_accuracy": 0.75}]
    for _ in range(2):
        view.show(snapshot([row(3)], evaluations=evaluations))
    assert len(text.getvalue().splitlines()) == 1 + 2 + 1


def test_what_is_not_known_yet_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "PLAIN_SECONDS", 0.0)
    screen, text = console()
    PlainLines(screen).show(snapshot([], depths=None))
    line = text.getvalue()
    assert "reward –" in line and "queues: –" in line and "ETA" not in line


@pytest.mark.parametrize(
    ("shown", "pieces"),
    [
        (snapshot([]), ("demo-1", "0 / 100", "1:01  starting")),
        (
            snapshot(
                [row(10)], evaluations=[{"step": 5, "policy_accuracy": 0.75, "accuracy_stderr": 0.04}], restarts=2
            ),
            (
                "demo-1",
                "10 / 100",
                "0.750 ± 0.040 (step 5)",
                "0.812",
                "0.123",
                "4321",
                "4 to score",
                "restarts",
                "1:01",
            ),
        ),
    ],
    ids=["starting", "training"],
)
def test_in_a_terminal_a_panel_is_drawn_and_taken_away(shown: Snapshot, pieces: tuple[str, ...]) -> None:
    text = io.StringIO()
    view = open_view(Console(file=text, width=100, force_terminal=True, color_system=None))
    view.show(shown)
    view.close()
    assert isinstance(view, LivePanel)
    assert [piece for piece in pieces if piece not in text.getvalue()] == []
    assert text.getvalue().endswith("\x1b[2K")  # the panel's lines are erased


def test_elsewhere_there_are_lines() -> None:
    assert isinstance(open_view(console()[0]), PlainLines)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert live_view._clock(seconds) == text
