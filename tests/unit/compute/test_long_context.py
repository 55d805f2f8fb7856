"""Models whose rotary frequencies change with the length of a pass: fixed once for a job, the same in every pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel

from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.models import output_head
from jackpot.compute.shared_prompts import attention_cost
from jackpot.errors import ConfigError
from jackpot.rollout.engine import GroupRequest, Sampling
from jackpot.rollout.transformers.decode_batch import DecodeBatch
from jackpot.rollout.transformers.rows import Row

SHORT, LONG = 32, 128
SIZES = {
    "vocab_size": 49,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONG,
    "initializer_range": 0.4,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 3.0, 7.0, 15.0],
}
EXACT = 1e-4  # nats


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-3.5 in small: short factors up to 32 positions, long ones up to 128."""
    config = Phi3Config(**SIZES, original_max_position_embeddings=SHORT, rope_scaling=LONGROPE, sliding_window=None)
    return _saved(config, tmp_path_factory.mktemp("phi3"))


def _saved(config: PreTrainedConfig, directory: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _plain(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def _with_long_factors_only(directory: Path, copy: Path) -> PreTrainedModel:
    """Plain transformers on the same model, its config.json edited by hand."""
    model = _plain(directory)
    model.save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["short_factor"] = LONGROPE["long_factor"]
    (copy / "config.json").write_text(json.dumps(config))
    return _plain(copy)


def _sequences(*lengths: int) -> list[NDArray[np.int64]]:
    return [np.random.default_rng(length).integers(3, 49, length) for length in lengths]


@torch.no_grad()
def _alone(model: PreTrainedModel, sequence: NDArray[Any], prompt: int) -> Tensor:
    """Log-probabilities [T, V] of the completion by a plain forward pass of this sequence only."""
    logits = model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None, :-1]).logits[0, prompt - 1 :]
    return torch.log_softmax(logits.float(), dim=-1)


def _logprobs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return torch.log_softmax(output_head(model).logits(hidden).float(), dim=-1)


@torch.inference_mode()
def _decoded(model: PreTrainedModel, requests: Sequence[GroupRequest]) -> dict[str, tuple[NDArray[Any], Any]]:
    """Tokens and log-probabilities of requests that join one after the other."""
    batch = DecodeBatch(model, eos_ids=())
    finished = []
    for request in requests:
        batch.add([Row(request, 0, [(0, 0)])])
        finished += batch.step()
    while batch.rows:
        finished += batch.step()
    return {row.request.group_id: (trajectory.token_ids, trajectory.actor_logprobs) for row, trajectory in finished}


def _request(name: str, prompt: int, max_tokens: int) -> GroupRequest:
    ids = _sequences(prompt)[0].astype(np.uint32)
    return GroupRequest(
        group_id=name,
        prompt_token_ids=ids,
        num_trajectories=1,
        sampling=Sampling(temperature=1.0, max_tokens=max_tokens),
    )


@torch.no_grad()
def _worst_of_passes(model: PreTrainedModel, plain: PreTrainedModel, lengths: Sequence[int]) -> float:
    """The greatest error of the scorer's and the learner's passes: rows, one packed row, siblings in a row."""
    sequences, prompts = _sequences(*lengths), [5] * len(lengths)
    siblings = [np.concatenate([sequences[0][:5], sequence[5:]]) for sequence in sequences]
    assert attention_cost([model], torch.device("cpu")) is not None
    pairs = [
        (completion_hidden(model, sequences, prompts), sequences),
        (packed_completion_hidden(model, sequences, prompts), sequences),
        (completion_hidden(model, siblings, prompts, [len(siblings)]), siblings),
    ]
    pairs += [(completion_hidden(model, [each], [5]), [each]) for each in sequences]
    return max(
        float((_logprobs(model, hidden) - torch.cat([_alone(plain, each, 5) for each in rows])).abs().max())
        for hidden, rows in pairs
    )


def _worst_of_decoding(model: PreTrainedModel, plain: PreTrainedModel, requests: Sequence[GroupRequest]) -> float:
    """The greatest error of log-probabilities while sampling, alone and in the others' company."""
    worst = 0.0
    for company in ([request] for request in requests), [requests]:
        for batch in company:
            for name, (tokens, logprobs) in _decoded(model, batch).items():
                prompt = next(request.prompt_token_ids for request in batch if request.group_id == name)
                sequence = np.concatenate([prompt, tokens]).astype(np.int64)
                expected = _alone(plain, sequence, len(prompt)).gather(
                    1, torch.from_numpy(sequence[len(prompt) :, None])
                )
                worst = max(worst, float(np.abs(expected[:, 0].numpy() - logprobs).max()))
    return worst


def test_up_to_the_short_factors_every_pass_is_that_of_plain_transformers(phi3: Path) -> None:
    model, plain = load_causal_lm(phi3, "float32", "cpu"), _plain(phi3)
    # A packed row, and one that siblings share, are far longer than each of their sequences.
    assert _worst_of_passes(model, plain, [20, 30, 30, 30, 32]) < EXACT
    assert _worst_of_decoding(model, plain, [_request("a", 4, 16), _request("b", 12, 20), _request("c", 31, 1)]) < EXACT


def test_beyond_them_every_pass_is_that_of_plain_transformers_with_the_long_factors(phi3: Path, tmp_path: Path) -> None:
    model = load_causal_lm(phi3, "float32", "cpu", context_length=LONG)
    plain, unfixed = _with_long_factors_only(phi3, tmp_path), _plain(phi3)
    assert _worst_of_passes(model, plain, [20, 60, 25, 100]) < EXACT
    assert (
        _worst_of_decoding(model, plain, [_request("a", 4, 16), _request("b", 20, 40), _request("c", 31, 60)]) < EXACT
    )
    long, short = _sequences(60, 20)
    # A long sequence has the long factors in any case; a short one must not change with the job's other sequences.
    assert float((_alone(plain, long, 5) - _alone(unfixed, long, 5)).abs().max()) < EXACT
    assert float((_alone(plain, short, 5) - _alone(unfixed, short, 5)).abs().max()) > 100 * EXACT


def test_dynamic_scaling_leaves_all_sequences_of_a_models_positions_alone(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    directory = _saved(LlamaConfig(**SIZES | {"max_position_embeddings": 64}, rope_scaling=scaling), tmp_path)
    model, plain = load_causal_lm(directory, "float32", "cpu"), _plain(directory)
    assert _worst_of_passes(model, plain, [20, 60, 64, 64]) < EXACT
    assert _worst_of_decoding(model, plain, [_request("a", 4, 16), _request("b", 20, 44)]) < EXACT


@pytest.mark.parametrize(
    ("context_length", "field"), [(LONG + 1, r"policy\.context_length = 129"), (10**6, r"policy\.context_length")]
)
def test_more_than_the_models_positions_is_refused(phi3: Path, context_length: int, field: str) -> None:
    with pytest.raises(ConfigError, match=field + r".* has 128 positions\. Set it to at most 128, or leave it out\."):
        load_causal_lm(phi3, "float32", "cpu", field="policy.model", context_length=context_length)
