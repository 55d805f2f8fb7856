"""p_ref from the learner's own pass: the very step that a scorer on the newest weights would have led to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from jackpot.config import JobSpec
from jackpot.errors import ConfigError, PayloadError
from jackpot.learner.batch import build_batch
from jackpot.learner.trainer import Trainer
from jackpot.runtime.codec import decode_scored, encode_scored
from jackpot.runtime.models import load_causal_lm
from jackpot.runtime.weights import WeightStore
from jackpot.scorer.deferred import DeferredScorer, PolicyVersion
from jackpot.scorer.scoring import GroupScorer
from jackpot.trajectory import DEFERRED, ScoredGroup

REUSE = "scorer.reuse_reference=true"


class Target:
    """The initial policy, as the scorer sees it."""

    version, obrs_lambda = 0, 1.0

    def __init__(self, job: JobSpec) -> None:
        self.model = load_causal_lm(job.policy.model, "float32", "cpu")
        self.vocabulary = self.model.config.vocab_size


def deferred(job: JobSpec, groups: list[ScoredGroup], store: WeightStore) -> list[ScoredGroup]:
    """The groups as a scorer without a model passes them on, over the bus's own format."""
    store.publish("policy", 0, lambda directory: (directory / "weights").touch(), {"obrs_lambda": 1.0})
    version = PolicyVersion(job.policy.model, store, 0.5)
    pending = version.read_newer()
    assert pending is not None
    version.apply(pending)
    assert version.read_newer() is None
    passed_on = DeferredScorer(job, version).score_groups([scored.group for scored in groups])
    assert {(one.normalizer, one.policy_version, one.obrs_lambda) for one in passed_on} == {(DEFERRED, 0, 1.0)}
    return [
        decode_scored(encode_scored(one, compress=False, max_bytes=1 << 20), max_bytes=1 << 20) for one in passed_on
    ]


@pytest.mark.parametrize("max_batch_tokens", [4096, 16])
@pytest.mark.parametrize("correction", ["jackpot", "tis", "mis"])
def test_a_step_is_that_of_scores_by_the_newest_policy(
    correction: str,
    max_batch_tokens: int,
    make_job: Callable[..., JobSpec],
    make_groups: Callable[..., list[ScoredGroup]],
    make_trainer: Callable[[JobSpec], Trainer],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = [f"algorithm.correction={correction}", f"learner.max_batch_tokens={max_batch_tokens}"]
    job, reusing = make_job(*settings), make_job(*settings, REUSE)
    groups = make_groups(job, with_topk=True)
    scored = GroupScorer(job, Target(job)).score_groups([one.group for one in groups])
    passed_on = deferred(reusing, groups, WeightStore(tmp_path_factory.mktemp("weights")))
    assert (passed_on[0].group.trajectories[0].topk_ids is None) == (correction != "jackpot")

    trainer, other = make_trainer(job), make_trainer(reusing)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    other.models["policy"].base_model.register_forward_hook(count)
    (expected,) = trainer.train_batch(build_batch(scored, job.algorithm.advantage), 0)
    (found,) = other.train_batch(build_batch(passed_on, reusing.algorithm.advantage), 0)
    num_passes = 1 if max_batch_tokens == 4096 else 2 * len(other._passes(build_batch(scored, job.algorithm.advantage)))
    assert passes == num_passes  # scores and losses share the only pass
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    for role in ("policy", "actor"):
        for one, same in zip(other.models[role].parameters(), trainer.models[role].parameters(), strict=True):
            # Adam's first step is lr · sign(g): equal but for gradients that are nothing but rounding.
            assert (one - same).abs().gt(1e-5).float().mean() < 0.01


def test_where_the_reference_cannot_be_the_policy_itself(make_job: Callable[..., JobSpec]) -> None:
    for setting in (
        "learner.updates_per_batch=2",
        "algorithm.correction.target=policy",
        "algorithm.correction.normalizer=full",
    ):
        name, value = setting.split("=")
        with pytest.raises(ConfigError, match=r"reuse_reference") as caught:
            make_job(REUSE, setting)
        assert value in str(caught.value) and name in str(caught.value)


def test_groups_are_checked_before_they_are_passed_on(
    make_job: Callable[..., JobSpec],
    make_groups: Callable[..., list[ScoredGroup]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    job = make_job(REUSE)
    groups = make_groups(job, with_topk=True)
    group = replace(groups[0].group, prompt_token_ids=np.array([10**6], dtype=np.uint32))
    with pytest.raises(PayloadError, match="beyond the vocabulary"):
        deferred(job, [replace(groups[0], group=group)], WeightStore(tmp_path_factory.mktemp("weights")))
