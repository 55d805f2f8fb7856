"""Records what a job's page shows beyond the learner's and the orchestrator's files: queue depths, throughput of each
service, and sample trajectories. The session's own process writes them; a figure that cannot be read is left out."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

from jackpot.config import JobSpec
from jackpot.control_plane.observing.live_view import Snapshot, View
from jackpot.control_plane.observing.samples import SampleTaker
from jackpot.storage.json_files import JsonLinesWriter
from jackpot.storage.run_directory import RunDirectory
from jackpot.telemetry.scrape_targets import read_targets

RECORD_SECONDS = 1.0
SCRAPE_TIMEOUT_SECONDS = 0.5

# Counters of the services, and the columns that hold their growth.
RATES: Mapping[str, str] = {
    "jackpot_tokens_generated_total": "throughput/rollout_tokens_per_second",
    "jackpot_tokens_scored_total": "throughput/scorer_tokens_per_second",
    "jackpot_tokens_trained_total": "throughput/learner_tokens_per_second",
}
_SAMPLE_LINE = re.compile(r"^(\w+)\{[^}]*\} ([0-9.eE+-]+)$")


class Recorder:
    """A view that records telemetry and samples, and passes each snapshot on.

    Args:
        run: the run directory.
        job: the job as resolved.
        view: the view that snapshots are passed on to.
    """

    def __init__(self, run: RunDirectory, job: JobSpec, view: View) -> None:
        self._run = run
        self._view = view
        self._telemetry = JsonLinesWriter(run.files.telemetry)
        self._samples = SampleTaker(run.path, job)
        self._counters: dict[str, Mapping[str, float]] = {}
        self._seen: Snapshot | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._record, name="recorder", daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=5)

    def show(self, snapshot: Snapshot) -> None:
        """Show the run; remember it for the next row."""
        self._seen = snapshot
        self._view.show(snapshot)

    def close(self) -> None:
        """Close the view."""
        self._view.close()

    def _record(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(RECORD_SECONDS):
            snapshot, self._seen = self._seen, None
            if snapshot is None:
                continue
            moment = time.monotonic()
            row: dict[str, Any] = {"step": snapshot.step, "time": time.time(), "restarts": snapshot.restarts}
            if snapshot.depths is not None:
                row |= {
                    "bus/rollouts_waiting": snapshot.depths.rollouts_waiting + snapshot.depths.rollouts_pending,
                    "bus/scored_waiting": snapshot.depths.scored_waiting,
                    "bus/scored_pending": snapshot.depths.scored_pending,
                    "bus/used_bytes": snapshot.depths.bytes_used,
                }
            if snapshot.ledger is not None:
                row |= {"ledger/dispatched": snapshot.ledger.dispatched, "ledger/open": snapshot.ledger.open}
            row |= self._rates(moment - before)
            before = moment
            try:
                self._telemetry.append([row])
                self._samples.take(snapshot.step)
            except OSError:
                continue  # a full disk stops the learner, which reports it

    def _rates(self, seconds: float) -> dict[str, float]:
        """How fast each service's counters have grown since the last look, summed over its replicas."""
        rates: dict[str, float] = {}
        for address in (target for group in read_targets(self._run.path) for target in group["targets"]):
            counters = scrape(address)
            before = self._counters.get(address)
            self._counters[address] = counters
            for counter, column in RATES.items():
                if before is not None and counter in counters and counter in before:
                    # A restarted process counts from zero again.
                    growth = max(0.0, counters[counter] - before[counter])
                    rates[column] = rates.get(column, 0.0) + growth / seconds
        return rates


def scrape(address: str) -> dict[str, float]:
    """The counters of :data:`RATES` at ``http://address/metrics``; empty if there is no answer."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=SCRAPE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException):
        return {}
    finally:
        connection.close()
    matches = (_SAMPLE_LINE.match(line) for line in text.splitlines())
    return {match[1]: float(match[2]) for match in matches if match and match[1] in RATES}
