"""The process of one session: what `jackpot run` does, on a run directory that the control plane has made."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from rich.console import Console

from jackpot.control_plane.observing.live_view import PlainLines
from jackpot.control_plane.observing.recorder import Recorder
from jackpot.control_plane.run_directory import RunDirectory
from jackpot.control_plane.sessions.job_run import run_job
from jackpot.control_plane.sessions.preparation import prepare_job
from jackpot.control_plane.sessions.session import SessionStatus
from jackpot.errors import JackpotError
from jackpot.runtime.logs import redact_url


def main(arguments: list[str]) -> int:
    """Run session ``arguments[1]`` of the run directory ``arguments[0]``; the exit code."""
    run_dir, session = Path(arguments[0]), int(arguments[1])
    # Until the job itself runs, a request to stop ends this process at once; there is nothing to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    SessionStatus(session, os.getpid(), "preparing").write(run_dir)
    try:
        state, error = _run(RunDirectory.open(run_dir), session)
    except JackpotError as problem:
        state, error = "failed", redact_url(str(problem))
        print(f"error: {error}", flush=True)
    except Exception:
        traceback.print_exc()
        state, error = "failed", f"an unexpected error; the end of {run_dir / 'logs' / 'launcher.log'} tells more"
    SessionStatus(session, os.getpid(), "finished", state, error).write(run_dir)
    return 0 if state == "succeeded" else 1


def _run(run: RunDirectory, session: int) -> tuple[str, str | None]:
    job = prepare_job(run.load_job())
    aside = run.path / ".job.json"
    aside.write_text(job.model_dump_json(indent=2), encoding="utf-8")
    aside.replace(run.path / "job.json")
    console = Console(width=160)
    with Recorder(run, job, PlainLines(console)) as recorder:
        summary = run_job(
            run,
            job,
            console,
            resumed=session > 1,
            view=recorder,
            on_started=lambda: SessionStatus(session, os.getpid(), "running").write(run.path),
        )
    return summary["state"], summary.get("error")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
