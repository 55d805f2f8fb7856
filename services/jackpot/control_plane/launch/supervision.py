"""When a process that died is restarted, and when it is given up."""

from __future__ import annotations

from dataclasses import dataclass

BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STABLE_SECONDS = 120.0
"""A process that stayed up this long has recovered: its earlier deaths no longer count against it."""


@dataclass(slots=True)
class Deaths:
    """The deaths of one process.

    Args:
        allowed: how many in a row lead to a restart.
    """

    allowed: int
    recent: int = 0

    def restart_delay(self, uptime_seconds: float) -> float | None:
        """Record a death: seconds until the process is restarted, or None if it is given up.

        Args:
            uptime_seconds: how long the process had been up.
        """
        if uptime_seconds > STABLE_SECONDS:
            self.recent = 0
        self.recent += 1
        if self.recent > self.allowed:
            return None
        return BACKOFF_SECONDS[min(self.recent, len(BACKOFF_SECONDS)) - 1]


def told(code: int) -> str:
    """An exit status in words; negative ones are signals."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
