import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from jackpot.algorithm.advantages import ADVANTAGES
from jackpot.algorithm.advantages.grpo import GrpoAdvantage
from jackpot.algorithm.advantages.rloo import RlooAdvantage
from jackpot.algorithm.corrections import CORRECTIONS
from jackpot.algorithm.corrections.icepop import IcepopCorrection
from jackpot.algorithm.corrections.is_ import IsCorrection
from jackpot.algorithm.corrections.jackpot import JackpotCorrection
from jackpot.algorithm.corrections.mis import MisCorrection
from jackpot.algorithm.corrections.none import NoCorrection
from jackpot.algorithm.corrections.tis import TisCorrection
from jackpot.config import (
    ActorConfig,
    InvalidJobError,
    JobSpec,
    job_json_schema,
    load_job,
    parse_job,
)
from jackpot.errors import ConfigError

MINIMAL: dict[str, Any] = {"policy": {"model": "m"}, "actor": "policy", "task": {"name": "complement"}}


def problem_with(*overrides: str, **sections: Any) -> ConfigError:
    """The one problem that a minimal job has after these changes."""
    with pytest.raises(InvalidJobError) as caught:
        parse_job(MINIMAL | sections, overrides)
    assert len(caught.value.problems) == 1, str(caught.value)
    return caught.value.problems[0]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("policy: {model: models/big}\nactor: {model: models/small}\ntask: {name: complement}\n")
    return path


def test_a_minimal_job_is_complete() -> None:
    job = parse_job(MINIMAL)
    assert job.on_policy and job.rollout_role == "policy" and job.rollout_model == job.policy
    assert (job.num_batches, job.num_groups) == (100, 1600)
    assert isinstance(job.algorithm.correction, JackpotCorrection)


def test_an_actor_of_its_own_makes_the_job_off_policy() -> None:
    job = parse_job(MINIMAL | {"actor": {"model": "small", "train": False}})
    assert not job.on_policy and job.rollout_role == "actor"
    assert job.rollout_model == ActorConfig(model="small", train=False)


@pytest.mark.parametrize(
    ("override", "field", "value", "problem", "remedy"),
    [
        # Misspelt keys, at every depth.
        ("learner.lrr=1", "learner.lrr", 1, "unknown key", "Did you mean 'lr'?"),
        ("lerner.lr=1", "lerner", {"lr": 1}, "unknown key", "Did you mean 'learner'?"),
        ("policy.modle=x", "policy.modle", "x", "unknown key", "Did you mean 'model'?"),
        ("algorithm.advantage.nrm=1", "algorithm.advantage.nrm", 1, "unknown key", "Known here: filter_zero_variance"),
        ("algorithm.correction.obrs_lamda=2", "algorithm.correction.obrs_lamda", 2, "unknown key", "'obrs_lambda'?"),
        # Places in a bucket.
        ("weights.store=/mnt/weights", "weights.store", "/mnt/weights", "is no place in a bucket", "Write s3://bucket"),
        ("weights.store=s3://b", "weights.store", "s3://b", "is no place in a bucket", "Write s3://bucket"),
        ("weights.store=s3://runs/../a", "weights.store", "s3://runs/../a", "do not know", "without them"),
        # Numbers.
        ("learner.lr=0", "learner.lr", 0, "greater than 0", "jackpot schema"),
        ("learner.lr=fast", "learner.lr", "fast", "is not a number", "Write a plain number, without quotes."),
        ("learner.steps='10'", "learner.steps", "10", "is not a number", "without quotes"),
        ("learner.steps=yes", "learner.steps", True, "is not a number", "without quotes"),
        ("learner.steps=1.5", "learner.steps", 1.5, "fractional part", "jackpot schema"),
        ("learner.lr=.inf", "learner.lr", float("inf"), "finite", "jackpot schema"),
        ("learner.betas=[0.9, 2]", "learner.betas.1", 2, "less than or equal to 1", "jackpot schema"),
        ("seed=-1", "seed", -1, "greater than or equal to 0", "jackpot schema"),
        ("weights.keep_versions=1", "weights.keep_versions", 1, "greater than or equal to 2", "jackpot schema"),
        # Choices.
        ("policy.dtype=int8", "policy.dtype", "int8", "'float32', 'bfloat16' or 'float16'", "Use one of 'float32'"),
        ("rollout.engine=vlm", "rollout.engine", "vlm", "'auto', 'transformers' or 'vllm'", "Use one of 'auto'"),
        ("learner.device=gpu", "learner.device", "gpu", "should match pattern", "jackpot schema"),
        ("name=Bad Name", "name", "Bad Name", "should match pattern", "jackpot schema"),
        (
            "algorithm.correction=jackpott",
            "algorithm.correction.name",
            "jackpott",
            "unknown name",
            "Did you mean 'jackpot'?",
        ),
        (
            "algorithm.correction=ppo",
            "algorithm.correction.name",
            "ppo",
            "unknown name",
            "Known here: icepop, is, jackpot",
        ),
        ("algorithm.advantage=grop", "algorithm.advantage.name", "grop", "unknown name", "Did you mean 'grpo'?"),
        ("actor=police", "actor", "police", "unknown actor", "Write 'policy', or a mapping with the actor's model."),
        # Shapes.
        ("learner=3", "learner", 3, "is not a mapping of settings", "Known here: activation_checkpointing"),
        (
            "algorithm.correction=3",
            "algorithm.correction",
            3,
            "is not a mapping",
            "Known here: acceptance_rate, c1, c2",
        ),
        ("task.params=[1]", "task.params", [1], "valid dictionary", "jackpot schema"),
        # Settings that would make the log-probabilities wrong.
        ("sampling.top_p=0.9", "sampling.top_p", 0.9, "reshapes the distribution", "Set top_p to 1.0"),
        ("sampling.top_k=50", "sampling.top_k", 50, "reshapes the distribution", "Set top_k to 0"),
        ("sampling.min_p=0.1", "sampling.min_p", 0.1, "reshapes the distribution", "Set min_p to 0.0"),
        ("sampling.repetition_penalty=1.1", "sampling.repetition_penalty", 1.1, "reshapes", "Set repetition_penalty"),
        ("sampling.temperature=0", "sampling.temperature", 0, "greater than 0", "jackpot schema"),
        # Overrides themselves.
        ("learner.lr", "override", "learner.lr", "is not of the form key=value", "Write e.g. learner.lr=1e-3."),
        ("=3", "override", "=3", "is not of the form key=value", "Write e.g. learner.lr=1e-3."),
        ("learner..lr=3", "override", "learner..lr=3", "is not of the form key=value", "Write e.g."),
    ],
)
def test_a_slip_is_named_with_field_value_and_remedy(
    override: str, field: str, value: object, problem: str, remedy: str
) -> None:
    found = problem_with(override)
    assert found.field == field
    assert found.value == value
    assert problem in found.problem
    assert remedy in found.remedy
    assert str(found).startswith(f"{field} = {value!r}: ")


def test_an_evaluation_samples_as_training_does_unless_it_says_otherwise() -> None:
    def temperature(*overrides: str) -> float:
        return parse_job(MINIMAL, overrides).evaluation_temperature

    assert temperature() == 1.0
    assert temperature("sampling.temperature=0.7") == 0.7
    assert temperature("sampling.temperature=0.7", "evaluation.temperature=0.3") == 0.3
    assert temperature("sampling.temperature=0.7", "evaluation.temperature=0") == 0.0


def test_settings_that_contradict_each_other_say_how() -> None:
    found = problem_with(evaluation={"temperature": 0, "samples_per_prompt": 4})
    assert found.field == "evaluation"
    assert "evaluation.temperature = 0 makes all 4 samples of a prompt the same" in str(found)
    found = problem_with(learner={"groups_per_batch": 5, "updates_per_batch": 2})
    assert found.field == "learner"
    assert "groups_per_batch = 5 cannot be split evenly into updates_per_batch = 2" in str(found)
    found = problem_with(learner={"steps": 5, "groups_per_batch": 4, "updates_per_batch": 2})
    assert str(found).endswith("Use a multiple of 2.")
    found = problem_with("algorithm.correction.target=policy", "algorithm.correction.normalizer=full")
    assert found.field == "algorithm.correction"
    assert found.remedy == "Use normalizer 'tail' or 'union_kappa', or target 'reference'."


def test_a_key_of_another_correction_is_unknown() -> None:
    found = problem_with("algorithm.correction=tis", "algorithm.correction.obrs_lambda=2")
    assert (found.field, found.remedy) == ("algorithm.correction.obrs_lambda", "Known here: cap, level, name.")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse_job({"policy": {"modle": "x"}, "actor": {"model": "m", "trian": True}, "seed": -1})
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"policy.model", "policy.modle", "actor.trian", "task", "seed"}
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "policy.model = None: is required. Add policy.model to the job file." in lines


def test_overrides_are_read_as_yaml_and_win(job_file: Path) -> None:
    job = load_job(
        job_file,
        ["learner.lr=1e-3", "learner.betas=[0.8, 0.99]", "sampling.stop=['</s>']", "run.directory=null", "name=a-1"],
    )
    assert (job.learner.lr, job.learner.betas, job.sampling.stop) == (1e-3, (0.8, 0.99), ("</s>",))
    assert (job.run.directory, job.name) == (None, "a-1")

    found = problem_with("algorithm.advantage={name: rloo, normalize_std: false}")
    assert (found.field, found.remedy) == (
        "algorithm.advantage.normalize_std",
        "Known here: filter_zero_variance, name.",
    )


def test_an_advantage_may_be_written_short_or_long() -> None:
    assert parse_job(MINIMAL).algorithm.advantage == GrpoAdvantage()
    assert parse_job(MINIMAL, ["algorithm.advantage=rloo"]).algorithm.advantage == RlooAdvantage()
    unnamed = parse_job(MINIMAL, ["algorithm.advantage.filter_zero_variance=true"]).algorithm.advantage
    assert unnamed == GrpoAdvantage(filter_zero_variance=True)
    overrides = ["algorithm.advantage=rloo", "algorithm.advantage.filter_zero_variance=true"]
    assert parse_job(MINIMAL, overrides).algorithm.advantage == RlooAdvantage(filter_zero_variance=True)


@pytest.mark.parametrize(
    ("overrides", "correction"),
    [
        (["algorithm.correction=none"], NoCorrection()),
        (["algorithm.correction=tis", "algorithm.correction.cap=5"], TisCorrection(cap=5.0)),
        (["algorithm.correction=is", "algorithm.correction.level=sequence"], IsCorrection(level="sequence")),
        (["algorithm.correction={name: icepop, threshold: '0.2_4'}"], IcepopCorrection(low=0.2, high=4.0)),
        (["algorithm.correction=mis"], MisCorrection(cap=2.0)),
        (["algorithm.correction.obrs_lambda=2"], JackpotCorrection(obrs_lambda=2.0)),
        (["algorithm.correction={name: jackpot, mask: expected}"], JackpotCorrection(mask="expected")),
    ],
)
def test_a_correction_may_be_written_short_or_long(overrides: list[str], correction: object) -> None:
    assert parse_job(MINIMAL, overrides).algorithm.correction == correction


def test_an_override_turns_on_policy_into_an_actor() -> None:
    assert parse_job(MINIMAL, ["actor.model=small"]).actor == ActorConfig(model="small")


def test_the_mapping_given_is_left_alone() -> None:
    data = MINIMAL | {"learner": {"lr": 1.0}}
    parse_job(data, ["learner.lr=2", "sampling.max_tokens=3"])
    assert data["learner"] == {"lr": 1.0} and "sampling" not in data


def test_paths_are_relative_to_the_job_file(job_file: Path) -> None:
    job = load_job(job_file, ["task.name=jsonl", "task.params={path: train.jsonl, reward: exact_match}"])
    assert job.policy.model == str(job_file.parent / "models/big")
    assert isinstance(job.actor, ActorConfig) and job.actor.model == str(job_file.parent / "models/small")
    assert job.task.params == {"path": str(job_file.parent / "train.jsonl"), "reward": "exact_match"}
    assert load_job(job_file, ["policy.model=builtin:demo/policy"]).policy.model == "builtin:demo/policy"


def test_json_is_yaml(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(MINIMAL | {"policy": {"model": "/m"}}))
    assert load_job(path) == parse_job(MINIMAL | {"policy": {"model": "/m"}})


def test_a_resolved_job_is_read_back_as_it_was() -> None:
    job = parse_job(MINIMAL, ["algorithm.correction=tis", "sampling.stop=['x']", "actor={model: a, dtype: bfloat16}"])
    assert parse_job(json.loads(job.model_dump_json())) == job


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [", "is not valid YAML: while parsing a flow node"),
        ("seed: 1\nname: a\nseed: 2", "line 3: the key 'seed' stands twice"),
        ("learner: {lr: 1, lr: 2}", "line 1: the key 'lr' stands twice"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("seed: !!int abc", "invalid literal for int"),
        ("? [1]\n: 2", "unhashable type"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("seed: " + "1" * 5000, "Exceeds the limit"),
        ("a: \x01", "special characters are not allowed"),
        ("- a", "is not a mapping of settings"),
        ("", "is not a mapping of settings"),
        ("1: 2", "is not a mapping of settings"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InvalidJobError, match=f"job file = '{path}': .*{re.escape(problem)}"):
        load_job(path)


def test_an_alias_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    levels = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path.write_text("\n".join(levels))
    started = time.monotonic()
    with pytest.raises(InvalidJobError, match=r"aliases \(\*name\) are not allowed in job files"):
        load_job(path)
    assert time.monotonic() - started < 5


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobError, match=r"missing\.yaml': cannot be read .*Give the path of a YAML or JSON"):
        load_job(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InvalidJobError, match=r"binary\.yaml': cannot be read"):
        load_job(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InvalidJobError, match=r"large\.yaml': is larger than 1 MiB"):
        load_job(tmp_path / "large.yaml")


def test_dates_stay_text(tmp_path: Path) -> None:
    assert parse_job(MINIMAL, ["task.params.since=2020-13-45"]).task.params == {"since": "2020-13-45"}


def test_a_configuration_error_ends_a_process_with_2() -> None:
    assert problem_with("seed=-1").exit_code == 2


def test_the_schema_describes_every_setting() -> None:
    schema = job_json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(JobSpec.model_fields)
    assert schema["required"] == ["policy", "actor", "task"]
    undocumented = [
        f"{section}.{name}"
        for section, definition in {"JobSpec": schema, **schema["$defs"]}.items()
        for name, field in definition["properties"].items()
        if "description" not in field and not (name == "name" and "const" in field)
    ]
    assert undocumented == []
    assert all(definition["additionalProperties"] is False for definition in schema["$defs"].values())


def test_the_schema_keeps_ranges_and_knows_the_short_form() -> None:
    schema = job_json_schema()
    lr = schema["$defs"]["LearnerConfig"]["properties"]["lr"]
    assert (lr["type"], lr["exclusiveMinimum"], lr["default"]) == ("number", 0, 1e-6)
    group_size = schema["$defs"]["SamplingConfig"]["properties"]["group_size"]
    assert (group_size["type"], group_size["minimum"]) == ("integer", 1)
    algorithm = schema["$defs"]["AlgorithmConfig"]["properties"]
    assert algorithm["correction"]["anyOf"][0]["enum"] == list(CORRECTIONS)
    assert algorithm["advantage"]["anyOf"][0]["enum"] == list(ADVANTAGES)


def test_lambda_and_acceptance_rate_exclude_each_other() -> None:
    found = problem_with("algorithm.correction.acceptance_rate=0.9", "algorithm.correction.obrs_lambda=1")
    assert found.field == "algorithm.correction"
    assert "exclude each other" in found.problem
    assert "Remove one of them" in found.remedy
    found = problem_with("algorithm.correction.obrs_lambda=null")
    assert "needs an acceptance_rate" in found.problem


def test_an_acceptance_rate_survives_being_written_and_read() -> None:
    job = parse_job(MINIMAL, ["algorithm.correction.acceptance_rate=0.9"])
    assert isinstance(job.algorithm.correction, JackpotCorrection)
    assert job.algorithm.correction.obrs_lambda is None
    assert job.algorithm.correction.initial_lambda == 1.0
    assert parse_job(json.loads(job.model_dump_json())) == job


def test_settings_that_would_do_nothing_are_refused() -> None:
    assert "AdamW" in problem_with("algorithm.distillation.kl_target=0.1", "algorithm.actor_ppo=false").problem
    assert "not below" in problem_with("algorithm.correction={name: icepop, low: 3, high: 2}").problem
    assert "low_high" in problem_with("algorithm.correction={name: icepop, threshold: '2'}").problem
    bounds = problem_with("algorithm.distillation={kl_target: 0.1, weight: 0}")
    assert (bounds.field, bounds.remedy) == ("algorithm.distillation", "Move it or the bounds.")


@pytest.mark.parametrize("name", ["replicas", "processes"])
def test_scorers_that_would_not_run_are_refused(name: str) -> None:
    found = problem_with("scorer.reuse_reference=true", f"scorer.{name}=2")
    assert (found.field, found.remedy) == ("scorer", f"Set {name} to 1, or leave reuse_reference out.")
    assert f"{name} = 2 cannot be with reuse_reference, under which no scorer runs" in found.problem


def test_no_scorer_runs_where_the_learner_scores() -> None:
    assert parse_job(MINIMAL, ["scorer.replicas=3"]).scorer_replicas == 3
    assert parse_job(MINIMAL, ["scorer.reuse_reference=true"]).scorer_replicas == 0


ACTOR: dict[str, Any] = {"model": "m", "train": False}


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"actor": ACTOR | {"weights": "policy", "train": True}}, "Set actor.model to policy.model and actor.train"),
        (
            {"actor": ACTOR | {"weights": "policy", "train": False, "context_length": 9}},
            "actor.context_length = 9 is not policy.context_length = None",
        ),
        ({"actor": ACTOR | {"weights": "policy", "model": "n"}}, "Set actor.model to policy.model and actor.train"),
        ({"actor": ACTOR | {"quantization": "fp8_per_channel"}}, "computes in 16 bits. Set actor.dtype to bfloat16"),
        (
            {"actor": ACTOR | {"kv_cache_dtype": "fp8"}, "rollout": {"engine": "transformers"}},
            "actor.kv_cache_dtype = 'fp8' is beyond the transformers engine",
        ),
        (
            {"sampling": {"temperature": 2.5}, "rollout": {"engine": "vllm"}},
            "sampling.temperature = 2.5: vLLM samples at no temperature above 2",
        ),
        (
            {"evaluation": {"temperature": 0.001}, "rollout": {"engine": "vllm"}},
            "evaluation.temperature = 0.001: vLLM samples at no temperature between 0 and 0.01",
        ),
        ({"rollout": {"vllm": {"lora": {"rank": 8}}}}, "LoRA is not supported"),
        ({"rollout": {"vllm": {"gpu_memory_fraction": 1.5}}}, "less than or equal to 1"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(sections: dict[str, Any], problem: str) -> None:
    assert problem in str(problem_with(**sections))


def test_temperatures_that_only_vllm_refuses_are_left_to_the_engine_that_auto_takes() -> None:
    assert parse_job(MINIMAL | {"sampling": {"temperature": 2.5}}).sampling.temperature == 2.5
    vllm = {"rollout": {"engine": "vllm"}, "evaluation": {"temperature": 0}, "sampling": {"temperature": 2}}
    assert parse_job(MINIMAL | vllm).evaluation_temperature == 0


def test_an_actor_may_be_the_policy_in_a_cheaper_format() -> None:
    cheap = ACTOR | {
        "weights": "policy",
        "dtype": "bfloat16",
        "quantization": "fp8_per_channel",
        "kv_cache_dtype": "fp8",
    }
    job = parse_job(MINIMAL | {"actor": cheap, "rollout": {"vllm": {"tensor_parallel_size": 2, "max_model_len": 4096}}})
    assert not job.on_policy
    assert job.rollout_role == "actor"
    assert job.rollout_model.dtype == "bfloat16"


def test_payloads_in_a_bucket_need_one() -> None:
    assert "Set weights.store" in str(problem_with("bus.payload_store=s3"))
    job = parse_job(MINIMAL, ["bus.payload_store=s3", "weights.store=s3://bucket/runs/"])
    assert job.weights.store == "s3://bucket/runs"
