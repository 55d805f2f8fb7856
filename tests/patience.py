"""How long tests wait for other processes. A test that passes never waits so long: these bound how late one fails.

Tests share their machine, often two cores, with each other and with anything else: starting Python with torch may take
a minute there. So no test draws a conclusion from the clock; each waits for what it needs, and names that if it fails.
"""

from __future__ import annotations

PATIENCE_SECONDS = 240.0
"""One wait: for a process to be ready, to get somewhere or to end."""

TEST_SECONDS = 1200
"""A test that starts processes: several such waits, one after the other."""
