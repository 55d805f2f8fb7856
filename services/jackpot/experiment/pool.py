"""Worker processes that execute a study's runs, and a thread for each that feeds it. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jackpot.demo.recipe import models_directory
from jackpot.errors import JackpotError
from jackpot.experiment.grid import Run
from jackpot.process.children import HASH_SEED, ending_with_us

Report = Callable[[Run, Mapping[str, Any]], None]


class Waiting:
    """Runs that no worker has taken yet. A worker that would have to wait for models takes a later run instead."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = list(runs)
        self._being_made: list[str] = []  # keys of recipes
        self._lock = threading.Lock()

    def take(self) -> Run | None:
        """The next run; None if there is none left."""
        with self._lock:
            if not self._runs:
                return None
            free = (run for run in self._runs if run.recipe is None or run.recipe.key not in self._being_made)
            run = next(free, self._runs[0])
            self._runs.remove(run)
            if run.recipe is not None and not models_directory(run.recipe).is_dir():
                self._being_made.append(run.recipe.key)
            return run

    def ended(self, run: Run) -> None:
        """Mark a run's models as made, or no longer being made."""
        with self._lock:
            if run.recipe is not None and run.recipe.key in self._being_made:
                self._being_made.remove(run.recipe.key)


def make_runs(runs: Sequence[Run], directory: Path, workers: int, report: Report) -> list[str]:
    """Execute runs in order; each writes a file into ``directory``.

    Args:
        runs: the missing runs, each key once.
        directory: where the files go.
        workers: processes at a time.
        report: receives each finished run and its worker's answer; called from several threads, one at a time.

    Returns:
        A message for each run that failed.
    """
    waiting = Waiting(runs)
    errors: list[str] = []
    lock = threading.Lock()
    stopping = threading.Event()
    processes = [_start(directory) for _ in range(min(workers, len(runs)))]

    def feed(process: subprocess.Popen[str]) -> None:
        while not stopping.is_set() and (run := waiting.take()) is not None:
            answer = _ask(process, run)
            waiting.ended(run)
            if stopping.is_set():
                return  # the run did not fail: its process was ended
            with lock:
                if answer["error"] is not None:
                    errors.append(f"seed {run.job.seed}, {run.key}: {answer['error']}")
                report(run, answer)
            if process.poll() is not None:
                return

    threads = [threading.Thread(target=feed, args=(process,), daemon=True) for process in processes]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C, above all
        stopping.set()
        for process in processes:
            process.kill()
            process.wait()
        raise
    for process in processes:
        _end(process)
    if waiting.take() is not None:
        errors.append("every worker process has ended early; what is finished is kept")
    return errors


def _start(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ending_with_us([sys.executable, "-m", "jackpot.experiment.worker", str(directory)]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=HASH_SEED | os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a Ctrl-C reaches it through us
    )


def _ask(process: subprocess.Popen[str], run: Run) -> Mapping[str, Any]:
    try:
        _pipe(process.stdin).write(json.dumps({"key": run.key, **run.request()}) + "\n")
        _pipe(process.stdin).flush()
        line = _pipe(process.stdout).readline()
    except BrokenPipeError:
        line = ""
    if not line:
        return {"error": f"its worker process ended with {process.wait()}; see the lines above"}
    answer: Mapping[str, Any] = json.loads(line)
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        _pipe(process.stdin).close()
    process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise JackpotError("a worker process has no pipe")
    return stream
