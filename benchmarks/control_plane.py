"""How fast the control plane is: `python benchmarks/control_plane.py`.

Starts `jackpot serve` on a fresh directory, with every write synced to disk, and measures over HTTP:

- submits per second, from 20 connections, with persistence and without an idempotency key;
- the first page of the list (50 jobs), with 10,000 jobs in the store and 20 clients asking without a pause;
- the lag of the event stream: from a row's line in ``metrics.jsonl`` to its event at the client, 20 followers.

Prints one JSON object. The targets: ≥ 200 submits/s, p95 ≤ 50 ms, lag ≤ 1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import psutil

from jackpot.client import AsyncClient

JOB = {
    "name": "bench",
    "policy": {"model": "builtin:complement/policy"},
    "actor": {"model": "builtin:complement/actor"},
    "task": {"name": "complement"},
    "learner": {"steps": 1},
}
CLIENTS = 20


async def submits(url: str, count: int) -> dict[str, float]:
    """Submit ``count`` jobs from :data:`CLIENTS` connections."""
    content, headers = json.dumps(JOB).encode(), {"Content-Type": "application/json"}
    left = iter(range(count))
    seconds: list[float] = []

    async def worker(http: httpx.AsyncClient) -> None:
        for _ in left:
            started = time.perf_counter()
            answer = await http.post("/v1/jobs", content=content, headers=headers)
            assert answer.status_code == 201, answer.text
            seconds.append(time.perf_counter() - started)

    elapsed = await together(url, worker)
    return {"count": count, "per_second": round(count / elapsed, 1), **quantiles(seconds)}


async def lists(url: str, count: int) -> dict[str, float]:
    """Ask ``count`` times for the first page, from :data:`CLIENTS` connections without a pause."""
    left = iter(range(count))
    seconds: list[float] = []

    host, _, port = url.removeprefix("http://").rpartition(":")
    request = f"GET /v1/jobs HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()

    async def worker() -> None:
        # By hand: httpx takes five times as long over a page as the server, on the same two cores.
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in left:
            started = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            assert head.startswith(b"HTTP/1.1 200") and body.count(b'"id"') == 50
            seconds.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CLIENTS)))
    return {"count": count, "per_second": round(count / (time.perf_counter() - started), 1), **quantiles(seconds)}


async def events(url: str, run_dir: Path, job_id: str, rows: int) -> dict[str, float]:
    """Write rows as a learner does, and see when the followers have them."""
    lags: list[float] = []
    run_dir.mkdir(parents=True, exist_ok=True)

    async def follower() -> None:
        async with AsyncClient(url) as client:
            async for event in client.events(job_id):
                if event.name == "step":
                    lags.append(time.time() - event.data["time"])
                    if event.data["step"] == rows:
                        return

    followers = [asyncio.create_task(follower()) for _ in range(CLIENTS)]
    await asyncio.sleep(2)
    for step in range(1, rows + 1):
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "reward/mean": 0.5}) + "\n")
        await asyncio.sleep(0.17)  # out of step with the server's own looks
    await asyncio.wait_for(asyncio.gather(*followers), 60)
    return {"count": len(lags), **quantiles(lags)}


async def together(url: str, worker: Any) -> float:
    """Run a worker per client; the seconds that all took together."""
    clients = [httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) for _ in range(CLIENTS)]
    started = time.perf_counter()
    await asyncio.gather(*(worker(http) for http in clients))
    elapsed = time.perf_counter() - started
    for http in clients:
        await http.aclose()
    return elapsed


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and worst, in milliseconds."""
    ordered = sorted(seconds)
    picks = {"p50_ms": 0.5, "p95_ms": 0.95, "max_ms": 1.0}
    return {name: round(1000 * ordered[min(len(ordered) - 1, int(at * len(ordered)))], 1) for name, at in picks.items()}


async def measure(url: str, data_dir: Path, jobs: int, server: psutil.Process) -> dict[str, Any]:
    """All three."""

    async def with_cpu(what: Awaitable[dict[str, float]]) -> dict[str, float]:
        """The figures, and what one request costs the server: that does not depend on who else uses the machine."""
        before = sum(server.cpu_times()[:2])
        figures = await what
        return figures | {"server_cpu_ms": round(1000 * (sum(server.cpu_times()[:2]) - before) / figures["count"], 2)}

    figures: dict[str, Any] = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    figures["submit"] = await with_cpu(submits(url, 2000))
    if jobs > 2000:
        await submits(url, jobs - 2000)
    figures["list"] = {"jobs": jobs} | await with_cpu(lists(url, 2000))
    async with AsyncClient(url) as client:
        one = await anext(aiter(client.jobs()))
    figures["events"] = await events(url, data_dir / "runs" / one.id, one.id, 60)
    return figures


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs in the store when the list is measured")
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory(prefix="jackpot-bench-") as directory:
        data_dir = Path(directory)
        command = [sys.executable, "-c", "from jackpot.cli import main; main()", "serve", "--port", "0", "--slots", "0"]
        with (data_dir / "serve.log").open("ab") as log:
            server = subprocess.Popen(
                [*command, "--rate-limit", "0", "--data-dir", directory], stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            assert server.stdout is not None and select.select([server.stdout], [], [], 60)[0], "no server"
            url = server.stdout.readline().split()[3]
            print(json.dumps(asyncio.run(measure(url, data_dir, jobs, psutil.Process(server.pid))), indent=2))
        finally:
            server.terminate()
            server.wait(20)


if __name__ == "__main__":
    main()
