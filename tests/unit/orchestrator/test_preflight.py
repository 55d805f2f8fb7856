"""A job that cannot work is refused before any process starts."""

from __future__ import annotations

from typing import Any

import pytest

from jackpot.config import parse_job
from jackpot.errors import ConfigError
from jackpot.orchestrator.preflight import validate_job


@pytest.fixture
def job_of(make_model):
    def make(**sections: Any):
        model = str(make_model())
        return parse_job(
            {"policy": {"model": model}, "actor": {"model": model}, "task": {"name": "complement"}, **sections}
        )

    return make


def test_a_good_job_passes(job_of):
    validate_job(job_of(sampling={"stop": ["="]}))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"task": {"name": "complment"}}, "task.name"),
        ({"policy": {"model": "/nowhere"}}, "policy.model"),
        ({"task": {"name": "complement", "chat_template": "always"}}, "task.chat_template"),
        ({"sampling": {"stop": ["ab"]}}, "sampling.stop"),
        ({"bus": {"max_bytes": 100_000}}, "bus.max_bytes"),
    ],
)
def test_what_cannot_work_is_named(job_of, sections, field):
    with pytest.raises(ConfigError) as caught:
        validate_job(job_of(**sections))
    assert caught.value.field == field
    assert caught.value.remedy
