"""The root correction, by hand and by its name in a job file."""

from __future__ import annotations

import torch

from jackpot.algorithm.corrections import SampledTokens
from jackpot.config import parse_job


def test_the_weight_is_the_root_of_the_ratio() -> None:
    job = parse_job(
        {"policy": {"model": "big"}, "actor": "policy", "task": {"name": "complement"}}, ["algorithm.correction=root"]
    )
    one = torch.ones(2)
    tokens = SampledTokens(
        target_logprobs=torch.tensor([0.8, 0.1]).log(),
        actor_logprobs=torch.tensor([0.2, 0.4]).log(),
        sequence_index=torch.tensor([0, 0]),
        normalizer=one,
        obrs_lambda=0 * one,
    )
    torch.testing.assert_close(job.algorithm.correction.weights(tokens).value, torch.tensor([2.0, 0.5]))
