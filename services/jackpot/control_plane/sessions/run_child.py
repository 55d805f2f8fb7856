"""The process of one session: what `jackpot run` does, in a run directory that the control plane has created."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from jackpot.control_plane.launch.launcher_choice import LauncherChoice
from jackpot.control_plane.observing.live_view import PlainLines
from jackpot.control_plane.observing.recorder import Recorder
from jackpot.control_plane.sessions.job_run import run_job
from jackpot.control_plane.sessions.preparation import prepare_job
from jackpot.control_plane.sessions.session_process import Phase, SessionStatus
from jackpot.errors import JackpotError
from jackpot.storage.run_directory import LAUNCHER, RunDirectory, RunFiles
from jackpot.telemetry.logs import redact_url

REQUEST_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Run session ``arguments[1]`` of the run directory ``arguments[0]``; the exit code."""
    run_dir, session = Path(arguments[0]), int(arguments[1])
    files = RunFiles(run_dir)
    # Until the job runs there is nothing to finish, so that a stop request ends this process at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    files.stop_request.unlink(missing_ok=True)
    threading.Thread(target=_heed_requests, args=(files.stop_request,), daemon=True).start()

    def tell(phase: Phase, state: str | None = None, error: str | None = None) -> None:
        SessionStatus(session, os.getpid(), socket.gethostname(), phase, state, error).write(run_dir)

    tell("preparing")
    try:
        state, error = _run(RunDirectory.open(run_dir), session, lambda: tell("running"))
    except JackpotError as problem:
        state, error = "failed", redact_url(str(problem))
        print(f"error: {error}", flush=True)
    except Exception:
        traceback.print_exc()
        state, error = "failed", f"an unexpected error; see the end of {files.log(LAUNCHER)}"
    tell("finished", state, error)
    return 0 if state == "succeeded" else 1


def _heed_requests(path: Path) -> None:
    """End this process, as a SIGTERM would, when a server on another host asks for it."""
    while not path.exists():
        time.sleep(REQUEST_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(run: RunDirectory, session: int, on_started: Callable[[], None]) -> tuple[str, str | None]:
    launcher_choice = LauncherChoice.from_env()
    job = run.load_job()
    launcher_choice.check_job(job)
    job = prepare_job(job)
    run.files.write_job(job)
    console = Console(width=160)
    with Recorder(run, job, PlainLines(console)) as recorder:
        summary = run_job(
            run,
            job,
            console,
            resumed=session > 1,
            view=recorder,
            on_started=on_started,
            launcher_choice=launcher_choice,
        )
    return summary["state"], summary.get("error")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
