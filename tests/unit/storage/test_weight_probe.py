"""What counts as the log-probabilities that the learner published, and what does not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jackpot.errors import WeightCorruptError
from jackpot.storage.weight_probe import PROBE_TOKENS, ProbeCheck, WeightProbe, probe_tokens

LOGPROBS = [-2.0, -4.0, -6.0]  # |mean| 4


def probe(dtype: str = "float32", **changes: Any) -> WeightProbe:
    content = {"token_ids": [5, 6, 7, 8], "logprobs": LOGPROBS, "initial_logprobs": LOGPROBS, "dtype": dtype}
    return WeightProbe(**content | changes)


def off_by(nats: float) -> list[float]:
    """In turn above and below; the relative error is nats / 4."""
    return [logprob + (nats if index % 2 else -nats) for index, logprob in enumerate(LOGPROBS)]


def test_tokens_are_a_jobs_own_and_fit_its_model() -> None:
    tokens = probe_tokens(50_000, 4096, seed=3)
    assert len(tokens) == PROBE_TOKENS and len(set(tokens)) > PROBE_TOKENS // 2
    assert tokens == probe_tokens(50_000, 4096, seed=3)
    assert tokens != probe_tokens(50_000, 4096, seed=4)
    assert all(0 <= token < 7 for token in probe_tokens(7, 4096, seed=3))
    assert len(probe_tokens(50_000, 10, seed=3)) == 9


@pytest.mark.parametrize(("dtype", "passes", "fails"), [("float32", 2e-3, 3e-3), ("bfloat16", 0.19, 0.21)])
def test_rounding_of_the_number_format_passes_and_more_does_not(dtype: str, passes: float, fails: float) -> None:
    check = ProbeCheck(dtype)
    check.check(probe(dtype), off_by(passes), 7)
    with pytest.raises(WeightCorruptError, match=f"version 7 does not give .* {fails:.2g} nats at most"):
        check.check(probe(dtype), off_by(fails), 7)


def test_not_a_number_and_a_missing_position_fail() -> None:
    for found in ([math.nan, -4.0, -6.0], LOGPROBS[:2], []):
        with pytest.raises(WeightCorruptError):
            ProbeCheck("float32").check(probe(), found, 1)


def test_a_cheaper_engine_may_differ_four_times_as_much_as_it_did_at_first() -> None:
    check = ProbeCheck("bfloat16", cheaper=True)
    assert check.compares_initial(probe("bfloat16"))
    with pytest.raises(WeightCorruptError):
        check.check(probe("bfloat16"), off_by(0.5), 1)
    check.measure_initial(probe("bfloat16"), off_by(0.3))
    check.check(probe("bfloat16"), off_by(1.19), 1)
    with pytest.raises(WeightCorruptError):
        check.check(probe("bfloat16"), off_by(1.21), 1)


def test_an_exact_engine_is_not_measured_and_one_of_another_format_is() -> None:
    assert not ProbeCheck("float32").compares_initial(probe("float32"))
    assert ProbeCheck("bfloat16").compares_initial(probe("float32"))
    ProbeCheck("bfloat16").check(probe("float32"), off_by(0.19), 1)


def test_restored_weights_must_give_what_they_gave() -> None:
    check = ProbeCheck("float32")
    check.check_restored([LOGPROBS, LOGPROBS], [LOGPROBS, off_by(1e-3)])
    with pytest.raises(WeightCorruptError, match="restored"):
        check.check_restored([LOGPROBS, LOGPROBS], [LOGPROBS, off_by(0.1)])


def test_metadata_carry_it_and_damage_is_refused() -> None:
    assert WeightProbe.from_metadata({"obrs_lambda": 1.0}) is None
    assert WeightProbe.from_metadata({"probe": probe().as_json()}) == probe()
    for damage in (
        {"logprobs": LOGPROBS[:2]},
        {"token_ids": []},
        {"logprobs": [math.nan, -1.0, -1.0]},
        {"logprobs": ["x", -1.0, -1.0]},
        {"more": 1},
    ):
        with pytest.raises(WeightCorruptError, match="probe"):
            WeightProbe.from_metadata({"probe": probe().as_json() | damage})
    with pytest.raises(WeightCorruptError, match="probe"):
        WeightProbe.from_metadata({"probe": 3})
