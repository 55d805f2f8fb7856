"""The local launcher on real processes that need no model: a run without a job in it, a server alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS

from jackpot.config import JobSpec, parse_job
from jackpot.control_plane.launch.launcher import LaunchStatus
from jackpot.control_plane.launch.local_launcher import LocalLauncher, end_leftovers
from jackpot.control_plane.launch.local_processes import LocalPlan
from jackpot.errors import BusError
from jackpot.storage.run_directory import RunDirectory

pytestmark = pytest.mark.timeout(TEST_SECONDS)


def job_of(**sections: object) -> JobSpec:
    base = {"policy": {"model": "/m/p"}, "actor": {"model": "/m/a"}, "task": {"name": "complement"}}
    return parse_job(base | sections)


def run_without_a_job(path: Path, job: JobSpec) -> RunDirectory:
    """Its services end at once, before they load anything heavy, with exit code 2."""
    run = RunDirectory.create(path, "job-1", job)
    (run.path / "job.json").unlink()
    return run


async def check_until(launcher: LocalLauncher, condition: Callable[[LaunchStatus], bool]) -> LaunchStatus:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition(status := await launcher.check()):
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.02)
    return status


async def test_a_process_that_cannot_work_ends_the_job_with_its_own_words(tmp_path: Path) -> None:
    job = job_of(rollout={"replicas": 2})
    run = run_without_a_job(tmp_path / "run", job)
    launcher = LocalLauncher(run, job)
    assert launcher.redis_url is None
    try:
        await launcher.start()
        assert launcher.redis_url is not None and launcher.redis_url.startswith("unix://")
        status = await check_until(launcher, lambda status: status.error is not None)
    finally:
        await launcher.stop()
    assert status.error is not None and not status.finished and status.restarts == {}
    assert "cannot work with this configuration" in status.error
    assert f"{run.path / 'logs'}" in status.error and "has no job.json" in status.error
    names = {"learner", "rollout-0", "rollout-1", "evaluator", "scorer-0", "orchestrator"}
    assert {path.stem for path in (run.path / "logs").iterdir()} == names


@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("7", "7"), ("random", "random")])
async def test_every_service_has_one_hash_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    noted = tmp_path / "noted"
    noted.mkdir()
    note = "import os; open(os.path.join({!r}, str(os.getpid())), 'w').write(os.environ['PYTHONHASHSEED'])"
    (tmp_path / "sitecustomize.py").write_text(note.format(str(noted)))  # Python runs it as it starts
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    if given is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", given)
    job = job_of()
    launcher = LocalLauncher(run_without_a_job(tmp_path / "run", job), job)
    try:
        await launcher.start()
        await check_until(launcher, lambda _: len([path for path in noted.iterdir() if path.read_text()]) == 5)
    finally:
        await launcher.stop()
    assert {path.read_text() for path in noted.iterdir()} == {expected}


def test_no_scorer_is_planned_where_the_learner_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)

    def plan(**scorer: object) -> LocalPlan:
        return LocalPlan(job_of(scorer=scorer), "job-1", tmp_path, tmp_path, lambda _: "unix:///bus", "")

    scored, straight = plan(replicas=3), plan(reuse_reference=True)
    others = ["learner", "rollout-0", "evaluator", "orchestrator"]
    assert [one.name for one in straight.processes()] == others
    assert sorted(one.name for one in scored.processes()) == sorted([*others, "scorer-0", "scorer-1", "scorer-2"])
    assert (scored.threads, straight.threads) == (2, 4)  # each of those that compute has as many


async def test_the_server_is_started_again_where_it_was_until_it_keeps_dying(tmp_path: Path) -> None:
    job = job_of(run={"max_restarts": 2})
    run = run_without_a_job(tmp_path / "run", job)
    launcher = LocalLauncher(run, job)
    try:
        await launcher.start()
        url = launcher.redis_url
        for count in (1, 2):
            kill_server(run)
            status = await check_until(launcher, lambda s, n=count: s.restarts.get("bus-server") == n)  # type: ignore[misc]
            await check_until(launcher, lambda _: server_of(run) is not None)
            assert launcher.redis_url == url
        kill_server(run)
        status = await check_until(launcher, lambda s: "embedded server" in (s.error or ""))
    finally:
        await launcher.stop()
    assert status.error is not None and "the embedded server keeps dying (signal 9)" in status.error
    assert "server.log:\n" in status.error and status.error.splitlines()[-1]
    assert server_of(run) is None


async def test_a_bus_elsewhere_that_does_not_answer_is_told_before_anything_starts(tmp_path: Path) -> None:
    job = job_of(bus={"url": f"unix://{tmp_path}/nobody.sock"})
    run = run_without_a_job(tmp_path / "run", job)
    launcher = LocalLauncher(run, job)
    with pytest.raises(BusError, match=r"does not answer .*Is its server running\?"):
        await launcher.start()
    await launcher.stop()
    assert list((run.path / "logs").iterdir()) == []


async def test_stopping_what_was_never_started_is_nothing(tmp_path: Path) -> None:
    job = job_of()
    await LocalLauncher(run_without_a_job(tmp_path / "run", job), job).stop()


@pytest.fixture
def leftover(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Processes that belong to the run in ``tmp_path``."""
    started = []

    def start(program: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"JACKPOT_RUN_DIR": str(tmp_path)}
        started.append(
            subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, bufsize=0)
        )
        assert started[-1].stdout is not None and started[-1].stdout.readline() == b"up\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def test_leftovers_may_end_by_themselves_or_are_ended(
    tmp_path: Path, leftover: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    brief = leftover("import time; print('up', flush=True); time.sleep(0.3); print('ended by itself')")
    await end_leftovers(tmp_path, timeout_seconds=30.0)
    assert not psutil.pid_exists(brief.pid)
    assert brief.stdout is not None and brief.stdout.read() == b"ended by itself\n"
    deaf = leftover("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)")
    await end_leftovers(tmp_path, timeout_seconds=0.2)
    assert not psutil.pid_exists(deaf.pid)


async def test_processes_of_other_runs_are_left_alone(
    tmp_path: Path, leftover: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    other = leftover("import time; print('up', flush=True); time.sleep(600)")
    await end_leftovers(tmp_path / "another", timeout_seconds=0.1)
    assert other.poll() is None


def server_of(run: RunDirectory) -> psutil.Process | None:
    """The live server of a run."""
    for process in psutil.Process().children():
        try:
            if Path(process.cwd()) == run.path / "redis" and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.Error:
            continue
    return None


def kill_server(run: RunDirectory) -> None:
    server = server_of(run)
    assert server is not None
    server.kill()
