"""A real Prometheus for tests, and the dashboards' queries as it is asked them."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "helm" / "jackpot" / "dashboards"
RULES = ROOT / "helm" / "jackpot" / "rules"


def binary(name: str) -> str:
    """A program of Debian's package ``prometheus``; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install prometheus)")
    return found


@dataclass(frozen=True)
class PanelQuery:
    """One query of one panel."""

    dashboard: str
    row: str
    panel: str
    expr: str

    def expanded(self, job: str, window: str) -> str:
        """The query as Grafana sends it, with *All* namespaces chosen.

        Args:
            job: value of ``$job``, a regular expression.
            window: value of ``$__rate_interval``.
        """
        text = self.expr.replace("$namespace", ".*").replace("$job", job)
        return text.replace("$__rate_interval", window)

    def __str__(self) -> str:
        return f"{self.dashboard} / {self.row} / {self.panel}"


def panels(dashboard: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel of a committed dashboard, with the row that it stands in."""
    row = ""
    for panel in json.loads((DASHBOARDS / f"{dashboard}.json").read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            yield from ((row, inner) for inner in panel.get("panels", ()))
        else:
            yield row, panel


def queries() -> list[PanelQuery]:
    """Every query of every committed dashboard."""
    return [
        PanelQuery(path.stem, row, panel["title"], target["expr"])
        for path in sorted(DASHBOARDS.glob("*.json"))
        for row, panel in panels(path.stem)
        for target in panel["targets"]
    ]


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    def query(self, expr: str, moment: float | None = None) -> list[tuple[Mapping[str, str], float]]:
        """Labels and value of each series that an expression has now, or at a Unix time."""
        params = {"query": expr} | ({} if moment is None else {"time": str(moment)})
        answer = httpx.get(f"{self.url}/api/v1/query", params=params, timeout=PATIENCE_SECONDS).json()
        assert answer["status"] == "success", f"{expr}: {answer}"
        data = answer["data"]
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def wait_for(
        self,
        expr: str,
        deadline_seconds: float = PATIENCE_SECONDS,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[tuple[Mapping[str, str], float]]:
        """The answer to an expression once there is one; fails loudly."""
        deadline = time.monotonic() + deadline_seconds
        while not (found := self.query(expr)):
            assert self._process.poll() is None, f"Prometheus ended:\n{self._log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {deadline_seconds} s for {expr}"
            meanwhile()
            time.sleep(0.2)
        return found


def is_filled(found: Sequence[tuple[Mapping[str, str], float]]) -> bool:
    """Whether there is a series, and none is NaN."""
    return bool(found) and not any(math.isnan(value) for _, value in found)


@contextmanager
def prometheus(
    directory: Path,
    scrape_configs: Sequence[Mapping[str, Any]],
    *,
    rule_files: Sequence[Path] = (),
    interval: str = "500ms",
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes, until the block ends."""
    program = binary("prometheus")
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rule_files],
        "scrape_configs": [dict(each) for each in scrape_configs],
    }
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_port()
    log = directory / "prometheus.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=sink,
            stderr=sink,
        )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}", process, log)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _ready(server.url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    """A port that nobody uses right now: Prometheus 2.42 cannot say which one it took."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=PATIENCE_SECONDS).status_code == 200
    except httpx.TransportError:
        return False
