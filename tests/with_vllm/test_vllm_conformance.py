"""The vLLM engine passes the tests that every engine passes."""

from __future__ import annotations

import pytest
from unit.rollout.test_conformance import *  # noqa: F403


@pytest.fixture(params=["vllm-qwen3", "vllm-llama"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """``<engine>-<architecture>``: qwen3 with tied embeddings, llama without."""
    return str(request.param)
