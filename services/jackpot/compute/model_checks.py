"""Trials of a loaded model: its hidden states give its logits, and a sequence does not depend on its company."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.models import (
    OTHER_ARCHITECTURE,
    architecture,
    hidden_states,
    max_positions,
    output_head,
    vocabulary_size,
)
from jackpot.errors import ConfigError

# Largest |logit difference| accepted by the self-check, relative to the largest |logit|: rounding, no more.
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# The same for log-probabilities of one sequence in two passes of one shape.
_COMPANY_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
_COMPANY_TOKENS = 8
_TRIAL_TOKENS = 192


@torch.no_grad()
def self_check(model: PreTrainedModel, *, field: str = "model") -> None:
    """Check that hidden states and output head reproduce the model's own logits, right padding included.

    For a sharded model all ranks must call it.

    Raises:
        ConfigError: they do not, or cannot be computed: scores and losses would belong to another model.
    """
    try:
        agrees = _reproduces_logits(model)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        problem = f"its hidden states cannot be computed apart from its logits ({' '.join(str(error).split())[:200]})"
        raise ConfigError(field, architecture(model), problem, OTHER_ARCHITECTURE) from error
    if not agrees:
        raise ConfigError(
            field,
            architecture(model),
            "its logits are not those of its last hidden states through its output layer",
            OTHER_ARCHITECTURE,
        )


def _reproduces_logits(model: PreTrainedModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_size(model)
    smaller = min(vocabulary, model.config.get_text_config().vocab_size)
    ids = torch.randint(smaller, (2, 8), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = model(input_ids=ids[1:, :5], use_cache=False).logits[0, :, :vocabulary].float()
    # After a pass a sharded model's output layer has the compute dtype.
    bound = _CHECK_TOLERANCE[output_head(model).weight.dtype] * max(1.0, float(expected.abs().max()))
    for attention_mask in (mask, None):
        hidden = hidden_states(model, ids, attention_mask)
        logits = output_head(model).logits(hidden)[1, :5].float()
        # Written so that NaN fails as well.
        if logits.shape != expected.shape or not float((logits - expected).abs().max()) <= bound:
            return False
    return True


@torch.no_grad()
def check_company(model: PreTrainedModel, *, field: str = "model", longest: int | None = None) -> None:
    """Check that a sequence's log-probabilities do not depend on what else is in its pass, nor on the passes before.

    Some architectures scale all rotary embeddings of a pass by its greatest position (dynamic NTK, longrope): a short
    sequence then has other log-probabilities beside a long one, in engine, scorer and learner alike. A few tokens show
    it, since positions alone matter: a sequence of the first positions is passed beside itself, beside one that ends at
    the last position, and beside itself again. All passes have one shape, so that rounding is the same.

    For a sharded model all ranks must call it.

    Args:
        model: a model that passes :func:`self_check`.
        field: the setting that named the model.
        longest: tokens of the job's longest sequence; None is :func:`max_positions`.

    Raises:
        ConfigError: they do, with the difference.
    """
    positions = longest or max_positions(model)
    if positions is None or positions <= _COMPANY_TOKENS:
        return
    ids = torch.arange(_COMPANY_TOKENS, device=model.device) % vocabulary_size(model)
    first = torch.arange(_COMPANY_TOKENS, device=model.device)
    last = first + positions - _COMPANY_TOKENS
    try:
        logits = [_logits_beside(model, ids, first, other) for other in (first, last, first)]
    except (TypeError, ValueError):  # its layers take no positions, so that none of the pass can matter
        return
    reference = torch.log_softmax(logits[0], -1)
    difference = max(float((torch.log_softmax(other, -1) - reference).abs().max()) for other in logits[1:])
    greatest = max(1.0, float(logits[0].abs().max()))
    # Written so that NaN fails as well.
    if not difference <= _COMPANY_TOLERANCE[output_head(model).weight.dtype] * greatest:
        raise ConfigError(
            field,
            architecture(model),
            f"the log-probabilities of a sequence of {_COMPANY_TOKENS} tokens change by {difference:.2g} nats when one "
            f"of {positions} is in the same pass or in the one before it",
            "Give its config.json rotary embeddings that do not depend on the length, or use another model.",
        )


def _logits_beside(model: PreTrainedModel, ids: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Logits [L, V] of tokens at their ``own`` positions, in a pass with the same tokens at ``other`` positions."""
    hidden = hidden_states(model, torch.stack([ids, ids]), position_ids=torch.stack([own, other]))
    return output_head(model).logits(hidden)[0].float()


def trial_length(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence in a model's trials: as many as are cheap, and as the model has positions."""
    return min(_TRIAL_TOKENS, max_positions(model) or _TRIAL_TOKENS)
