"""p_ref from the learner's own pass: the very step that a scorer on the newest weights would have led to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import model_rounding

from jackpot.bus.payload_format import decode_scored, encode_scored
from jackpot.compute.model_loading import load_causal_lm
from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.learner.trainer import Trainer
from jackpot.orchestrator.deferral import Deferral
from jackpot.scoring.batch import build_batch
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.trajectory import ScoredGroup

from .conftest import MOST_TOKENS, log_error, same_figures

REUSE = "scorer.reuse_reference=true"


class Target:
    """The initial policy, as the scorer sees it."""

    version, obrs_lambda = 0, 1.0

    def __init__(self, job: JobSpec) -> None:
        self.model = load_causal_lm(job.policy.model, "float32", "cpu")
        self.vocabulary = self.model.config.vocab_size


def passed_on(job: JobSpec, groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The groups as the orchestrator gives them to the learner, over the bus's own format."""
    deferral = Deferral(job)
    deferred = [deferral.defer(scored.group, 0) for scored in groups]
    return [decode_scored(encode_scored(one, compress=False, max_bytes=1 << 20), max_bytes=1 << 20) for one in deferred]


@pytest.mark.parametrize("max_batch_tokens", [4096, 16])
@pytest.mark.parametrize("correction", ["jackpot", "tis", "mis"])
def test_a_step_is_that_of_scores_by_the_newest_policy(
    correction: str,
    max_batch_tokens: int,
    make_job: Callable[..., JobSpec],
    make_groups: Callable[..., list[ScoredGroup]],
    make_trainer: Callable[[JobSpec], Trainer],
) -> None:
    settings = [f"algorithm.correction={correction}", f"learner.max_batch_tokens={max_batch_tokens}"]
    job, reusing = make_job(*settings), make_job(*settings, REUSE)
    groups = make_groups(job, with_topk=True)
    scored = GroupScorer(job, Target(job)).score_groups([one.group for one in groups])
    deferred = passed_on(reusing, groups)
    assert (deferred[0].group.trajectories[0].topk_ids is None) == (correction != "jackpot")

    trainer, other = make_trainer(job), make_trainer(reusing)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    other.models["policy"].base_model.register_forward_hook(count)
    (expected,) = trainer.train_batch(build_batch(scored, job.algorithm.advantage), 0)
    (found,) = other.train_batch(build_batch(deferred, reusing.algorithm.advantage), 0)
    num_passes = 1 if max_batch_tokens == 4096 else 2 * len(other._plan(build_batch(scored, job.algorithm.advantage)))
    assert passes == num_passes  # scores and losses share the only pass
    assert found.keys() == expected.keys()
    batch = build_batch(groups, job.algorithm.advantage)
    assert found == same_figures(expected, trainer, batch)
    # A gradient has three errors of log p from its weight, and its own passes'.
    for role, model in trainer.models.items():
        gradients = [[p.grad for p in one.parameters() if p.grad is not None] for one in (model, other.models[role])]
        largest = max(float(one.abs().max()) for one in gradients[0])
        own = model_rounding(model.config, MOST_TOKENS, largest, backward=True)
        for one, same in zip(*gradients, strict=True):
            torch.testing.assert_close(same, one, rtol=0, atol=own + 3 * log_error(trainer, batch) * largest)


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
