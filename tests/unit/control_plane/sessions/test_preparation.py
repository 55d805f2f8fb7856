"""What is refused, and what is made, before any process starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jackpot.config import JobSpec, parse_job
from jackpot.control_plane.sessions.preparation import check_bus_url, make_builtin_models, prepare_job, resolve_models
from jackpot.demo.recipe import COMPLEMENT, models_directory
from jackpot.errors import ConfigError, JackpotError

MakeModel = Callable[..., Path]


def job_of(policy: str, actor: str, **sections: Any) -> JobSpec:
    described = actor if actor == "policy" else {"model": actor}
    base = {"policy": {"model": policy}, "actor": described, "task": {"name": "complement"}}
    return parse_job({**base, "sampling": {"max_tokens": 16}, **sections})


def test_a_job_that_can_work_comes_back_as_it_is(make_model: MakeModel) -> None:
    model = str(make_model("qwen3", seed=1))
    job = job_of(model, model)
    assert prepare_job(job) == job


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"bus": {"url": "localhost:6379"}}, "bus.url"),
        ({"sampling": {"max_tokens": 4096}}, "sampling.max_tokens"),
        ({"task": {"name": "complment"}}, "task.name"),
    ],
)
def test_what_cannot_work_is_refused(make_model: MakeModel, sections: dict[str, Any], field: str) -> None:
    model = str(make_model("qwen3", seed=1))
    with pytest.raises(ConfigError) as caught:
        prepare_job(job_of(model, model, **sections))
    assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://:pw@h:6379/0", "rediss://user:pw@h:1", "unix:///run/redis.sock", None]
)
def test_addresses_of_a_redis(url: str | None) -> None:
    check_bus_url(job_of("/m", "/m", bus={"url": url}))


@pytest.mark.parametrize("url", ["", "redis", "http://h", "redis://", "unix://", "redis://h:port", "redis://h:99999"])
def test_what_is_no_address_of_a_redis(url: str) -> None:
    with pytest.raises(ConfigError, match=r"bus\.url"):
        check_bus_url(job_of("/m", "/m", bus={"url": url}))


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        check_bus_url(job_of("/m", "/m", bus={"url": "redis://me:geheim@h:port"}))
    assert "geheim" not in str(caught.value) and "me:***@h" in str(caught.value)


def test_builtin_models_become_directories_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path))
    job = resolve_models(job_of("builtin:complement/policy", "builtin:complement/actor"))
    directory = models_directory(COMPLEMENT, tmp_path)
    assert job.policy.model == str(directory / "policy")
    assert not isinstance(job.actor, str) and job.actor.model == str(directory / "actor")
    assert resolve_models(job_of("builtin:complement/policy", "policy")).actor == "policy"
    with pytest.raises(ConfigError, match="is no built-in model"):
        resolve_models(job_of("builtin:complement/referee", "policy"))


def test_models_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path))
    models_directory(COMPLEMENT, tmp_path).mkdir(parents=True)
    make_builtin_models(job_of("builtin:complement/policy", "builtin:complement/actor"))


def test_a_warm_up_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, so that no directory can be made in it")
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(JackpotError, match="'complement' could not be made"):
        make_builtin_models(job_of("builtin:complement/policy", "policy"))
