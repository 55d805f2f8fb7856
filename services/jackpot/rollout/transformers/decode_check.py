"""Checks that decoding token by token, with padding and joining rows, samples from the same model."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from jackpot.algorithm.output_head import exact_logits
from jackpot.compute.model_checks import trial_length
from jackpot.compute.models import hidden_states, output_head, vocabulary_size
from jackpot.errors import ConfigError
from jackpot.rollout.engine import GroupRequest, Sampling
from jackpot.rollout.transformers.decode_batch import DecodeBatch
from jackpot.rollout.transformers.rows import Row
from jackpot.trajectory import Trajectory

# Largest |difference of log-probabilities| that rounding may cause. An unsuitable cache is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 1.0}
_NUM_TOKENS = 4


@torch.inference_mode()
def check_decoding(model: PreTrainedModel, *, field: str = "model") -> None:
    """Decode rows of different lengths, which join one after the other, and compare with full forward passes of each
    alone. The last is as long as is cheap, so that the others are tried in short and in long company.

    Raises:
        ConfigError: they differ: the architecture needs more than a cache of keys and values per position.
    """
    rng = np.random.default_rng(0)
    vocab_size = vocabulary_size(model)
    requests = [
        GroupRequest(
            group_id=f"check-{length}",
            prompt_token_ids=rng.integers(0, vocab_size, length).astype(np.uint32),
            num_trajectories=1,
            sampling=Sampling(temperature=1.0, max_tokens=_NUM_TOKENS),
        )
        for length in (6, 2, trial_length(model) - _NUM_TOKENS)
    ]
    problem = "cannot be decoded with a cache of keys and values"
    remedy = "Use an architecture with attention in every layer, such as Qwen3 or Llama."
    try:
        worst = max(_error(model, request, sampled) for request, sampled in _decode(model, requests))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        # Raised by architectures that receive a cache of an unknown kind.
        raise ConfigError(field, type(model).__name__, f"{problem} ({error})", remedy) from error
    # Written so that NaN fails as well.
    if not worst <= _TOLERANCE[model.dtype]:
        raise ConfigError(field, type(model).__name__, f"{problem}: log-probabilities are off by {worst:.2g}", remedy)


def _decode(model: PreTrainedModel, requests: list[GroupRequest]) -> list[tuple[GroupRequest, Trajectory]]:
    batch = DecodeBatch(model, eos_ids=())
    finished = []
    for request in requests:
        batch.add([Row(request, 0, [(0, 0)])])
        finished += batch.step()
    while batch.rows:
        finished += batch.step()
    return [(row.request, trajectory) for row, trajectory in finished]


def _error(model: PreTrainedModel, request: GroupRequest, sampled: Trajectory) -> float:
    ids = np.concatenate([request.prompt_token_ids, sampled.token_ids]).astype(np.int64)
    hidden = hidden_states(model, torch.from_numpy(ids[None, :-1]).to(model.device))
    logprobs = torch.log_softmax(exact_logits(output_head(model), hidden[0, -_NUM_TOKENS:]), dim=-1)
    expected = logprobs.gather(1, torch.from_numpy(ids[-_NUM_TOKENS:, None]).to(model.device))[:, 0]
    return float(np.abs(expected.cpu().numpy() - sampled.actor_logprobs).max())
