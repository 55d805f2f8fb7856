"""Shows a run in progress: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from jackpot.bus import BusDepths, Ledger
from jackpot.storage.json_files import Row

PLAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    job_id: str
    total_steps: int
    steps: list[Row]
    evaluations: list[Row]
    depths: BusDepths | None
    ledger: Ledger | None
    restarts: int
    elapsed_seconds: float

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def eta_seconds(self) -> float | None:
        """Time left at the pace of the last twenty steps; None while there is no pace."""
        recent = self.steps[-20:]
        if len(recent) < 2:
            return None
        pace = (recent[-1]["time"] - recent[0]["time"]) / max(1, recent[-1]["step"] - recent[0]["step"])
        return float(pace * (self.total_steps - self.step))

    def figure(self, name: str, digits: int = 3) -> str:
        """The newest value of a column, or a dash."""
        value = self.steps[-1].get(name) if self.steps else None
        return "–" if value is None else f"{value:.{digits}f}"

    @property
    def accuracy(self) -> str:
        """The newest held-out accuracy of the policy and its step."""
        if not self.evaluations:
            return "–"
        last = self.evaluations[-1]
        error = last.get("accuracy_stderr")
        return f"{last['policy_accuracy']:.3f}{'' if error is None else f' ± {error:.3f}'} (step {last['step']})"

    @property
    def queues(self) -> str:
        """Groups waiting for the scorer, for the learner, and for the checkpoint that will include them."""
        if self.depths is None:
            return "–"
        scoring = self.depths.rollouts_waiting + self.depths.rollouts_pending
        waiting, pending = self.depths.scored_waiting, self.depths.scored_pending
        return f"{scoring} to score, {waiting} to train, {pending} to commit"


class View(Protocol):
    """Shows a run."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the run as it is now."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_view(console: Console) -> View:
    """A live panel where the console is a terminal, else plain lines."""
    return LivePanel(console) if console.is_terminal else PlainLines(console)


class LivePanel:
    """A panel that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        """Redraw the panel."""
        self._live.update(_panel(snapshot))

    def close(self) -> None:
        """Remove the panel."""
        self._live.stop()


class PlainLines:
    """One line every few seconds, and one per evaluation."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_at = 0.0
        self._shown_step = -1
        self._evaluations = 0

    def show(self, snapshot: Snapshot) -> None:
        """Print a line if there is news."""
        for row in snapshot.evaluations[self._evaluations :]:
            self._print(f"step {row['step']:>5}  policy accuracy {row['policy_accuracy']:.3f} on held-out prompts")
        self._evaluations = len(snapshot.evaluations)
        now = time.monotonic()
        if snapshot.step == self._shown_step or now - self._shown_at < PLAIN_SECONDS:
            return
        self._shown_at, self._shown_step = now, snapshot.step
        eta = snapshot.eta_seconds
        self._print(
            f"step {snapshot.step:>5}/{snapshot.total_steps}  reward {snapshot.figure('reward/mean')}"
            f"  acceptance {snapshot.figure('rollout_corr/obrs_acceptance_rate')}"
            f"  KL policy‖actor {snapshot.figure('kl/policy_actor')}"
            f"  staleness {snapshot.figure('staleness/mean', 1)}"
            f"  {snapshot.figure('throughput/tokens_per_second', 0)} tokens/s"
            f"  queues: {snapshot.queues}" + (f"  ETA {_clock(eta)}" if eta is not None else "")
        )

    def close(self) -> None:
        """Nothing to undo."""

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _panel(snapshot: Snapshot) -> Panel:
    table = Table.grid(padding=(0, 2))
    eta = snapshot.eta_seconds
    rows = [
        ("step", f"{snapshot.step} / {snapshot.total_steps}" + (f"   ETA {_clock(eta)}" if eta is not None else "")),
        ("policy accuracy", snapshot.accuracy),
        ("reward", snapshot.figure("reward/mean")),
        ("acceptance rate", snapshot.figure("rollout_corr/obrs_acceptance_rate")),
        ("KL policy‖actor", snapshot.figure("kl/policy_actor")),
        ("staleness", snapshot.figure("staleness/mean", 1)),
        ("tokens/s", snapshot.figure("throughput/tokens_per_second", 0)),
        ("queues", snapshot.queues),
        ("restarts", str(snapshot.restarts)),
    ]
    table.add_row("", ProgressBar(total=snapshot.total_steps, completed=snapshot.step, width=40))
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", value)
    started = "" if snapshot.steps else "  starting …"
    return Panel(table, title=snapshot.job_id, subtitle=f"{_clock(snapshot.elapsed_seconds)}{started}", expand=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
