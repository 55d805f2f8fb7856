"""vLLM's outputs as our trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np

from jackpot.errors import EngineError
from jackpot.rollout.engine import GroupRequest
from jackpot.trajectory import Trajectory, VersionSpan

# vLLM's name for the weights that it started with.
_FIRST_WEIGHTS = "default"
NO_VERSION = -1


def trajectory_from_output(request: GroupRequest, index: int, output: Any) -> Trajectory:
    """The trajectory in one finished ``CompletionOutput`` with flat log-probabilities.

    Raises:
        EngineError: the log-probabilities are not finite, or the output is not finished.
    """
    if output.finish_reason not in ("stop", "length") or output.weight_versions is None:
        raise EngineError(f"vLLM ended a trajectory with {output.finish_reason!r}. Send the request again.")
    spans = tuple(VersionSpan(_version(span.version), span.start, span.end) for span in output.weight_versions)
    token_ids = np.asarray(output.token_ids, dtype=np.uint32)
    ids, logprobs = _columns(output.logprobs, len(token_ids))
    if not np.isfinite(logprobs[:, 0]).all():
        versions = sorted({span.version for span in spans})
        raise EngineError(f"weights of version {versions} give logits that are not finite. Look at the learner.")
    top_k = request.sampling.top_logprobs
    return Trajectory(
        trajectory_id=f"{request.group_id}#{index}",
        token_ids=token_ids,
        actor_logprobs=logprobs[:, 0].copy(),
        topk_ids=ids[:, 1 : 1 + top_k].copy() if top_k else None,
        topk_logprobs=logprobs[:, 1 : 1 + top_k].astype(np.float16) if top_k else None,
        version_spans=spans,
        finish_reason=output.finish_reason,
    )


def _columns(flat: Any, num_tokens: int) -> tuple[Any, Any]:
    """``FlatLogprobs`` as ids uint32 and log-probabilities float32, [T, 1 + k]; column 0 is the sampled token."""
    shape = (num_tokens, -1)
    return (
        np.asarray(flat.token_ids, dtype=np.uint32).reshape(shape),
        np.asarray(flat.logprobs, dtype=np.float32).reshape(shape),
    )


def version_label(version: int) -> str:
    """vLLM's name for the weights of a version."""
    return _FIRST_WEIGHTS if version == NO_VERSION else str(version)


def _version(label: str) -> int:
    return NO_VERSION if label == _FIRST_WEIGHTS else int(label)
