"""Groups that go past the scorers: what the learner gets, and what it never sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bus_world import make_group, plain

from jackpot.config import parse_job
from jackpot.errors import ConfigError, PayloadError
from jackpot.orchestrator.deferral import Deferral
from jackpot.trajectory import DEFERRED, Group

VOCABULARY = 49  # of the tiny models


@pytest.fixture
def make_deferral(make_model):
    def make(correction: str = "jackpot") -> Deferral:
        model = {"model": str(make_model())}
        settings = ["scorer.reuse_reference=true", f"algorithm.correction={correction}"]
        return Deferral(parse_job({"policy": model, "actor": model, "task": {"name": "complement"}}, settings))

    return make


@pytest.fixture
def group() -> Group:
    """A group whose ids are those of a tiny model."""
    made = make_group("job-1")
    trajectories = tuple(
        replace(t, token_ids=t.token_ids % VOCABULARY, topk_ids=t.topk_ids % VOCABULARY) for t in made.trajectories
    )
    return replace(made, prompt_token_ids=made.prompt_token_ids % VOCABULARY, trajectories=trajectories)


def test_the_scores_stand_for_none(make_deferral, group):
    scored = make_deferral().defer(group, 7)
    assert plain(scored.group) == plain(group)
    assert (scored.normalizer, scored.policy_version, scored.obrs_lambda) == (DEFERRED, 7, 0.0)
    for scores, trajectory in zip(scored.scores, group.trajectories, strict=True):
        assert scores.target_logprobs.tolist() == trajectory.actor_logprobs.tolist()
        assert scores.mask.tolist() == [True] * trajectory.num_tokens
        assert scores.normalizer_head.tolist() == [1.0] * trajectory.num_tokens


@pytest.mark.parametrize("correction", ["tis", "mis", "none"])
def test_the_actors_candidates_stay_only_where_z_needs_them(make_deferral, group, correction):
    scored = make_deferral(correction).defer(group, 0)
    assert {(t.topk_ids, t.topk_logprobs) for t in scored.group.trajectories} == {(None, None)}
    assert [t.token_ids.tolist() for t in scored.group.trajectories] == [
        t.token_ids.tolist() for t in group.trajectories
    ]


def beyond(array):
    return np.full_like(array, VOCABULARY)


DAMAGES = {
    "prompt": (lambda g: replace(g, prompt_token_ids=beyond(g.prompt_token_ids)), "beyond the vocabulary, 49"),
    "temperature": (lambda g: replace(g, temperature=0.0), "temperature 0.0 is not positive"),
    "ids": (lambda g: with_first(g, token_ids=beyond(g.trajectories[0].token_ids)), r"#0: it has .* vocabulary, 49"),
    "no tokens": (lambda g: with_first(g, token_ids=np.zeros(0, np.uint32)), "it has no tokens"),
    "not finite": (
        lambda g: with_first(g, actor_logprobs=g.trajectories[0].actor_logprobs * np.inf),
        "log-probabilities are not finite",
    ),
    "no candidates": (lambda g: with_first(g, topk_ids=None, topk_logprobs=None), "lacks the actor's most probable"),
    "candidates": (lambda g: with_first(g, topk_ids=beyond(g.trajectories[0].topk_ids)), "tokens are beyond"),
}


def with_first(group: Group, **changes) -> Group:
    first, *others = group.trajectories
    return replace(group, trajectories=(replace(first, **changes), *others))


@pytest.mark.parametrize("case", DAMAGES)
def test_what_the_policy_cannot_be_asked_about_is_refused(make_deferral, group, case):
    damage, message = DAMAGES[case]
    with pytest.raises(PayloadError, match=message):
        make_deferral().defer(damage(group), 0)


def test_candidates_that_nobody_needs_are_not_looked_at(make_deferral, group):
    damage, _ = DAMAGES["no candidates"]
    assert make_deferral("tis").defer(damage(group), 0).group.trajectories[0].topk_ids is None


def test_a_policy_of_unknown_vocabulary_is_a_configuration_error(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    job = parse_job({"policy": {"model": str(tmp_path)}, "actor": "policy", "task": {"name": "complement"}})
    with pytest.raises(ConfigError, match=r"policy\.model = .*does not state vocab_size"):
        Deferral(job)
