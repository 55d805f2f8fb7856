"""The probe of a weight version: log-probabilities of a few tokens, which every engine that takes it up must give.

The hash of a file says that the bytes are the learner's. The probe says that the model which the engine made of them is
the learner's, too: that no tensor was skipped, swapped or left packed as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from jackpot.errors import WeightCorruptError

METADATA_KEY = "probe"
PROBE_TOKENS = 16

# Mean |difference| over mean |log-probability| that rounding explains. A state passes some ten roundings a layer, which
# add up like a random walk: √(10·36) = 19 of 2⁻⁹ in bfloat16 and of 2⁻¹² in float16. In float32 a sum of 10⁴ terms
# counts more than the rounding of its result: 19·√10⁴·2⁻²⁵ = 6e-5, and ten times that for the order of other kernels.
_ROUNDING = {"float32": 6e-4, "float16": 0.01, "bfloat16": 0.05}
# An engine in a cheaper format differs from the learner at each version about as much as it did at the initial one.
_TIMES_INITIAL = 4.0


@dataclass(frozen=True, slots=True)
class WeightProbe:
    """What the learner found with the weights that it published."""

    token_ids: Sequence[int]  # [T]
    logprobs: Sequence[float]  # [T − 1]: of each token but the first, given those before it
    initial_logprobs: Sequence[float]  # [T − 1]: the same with the job's initial weights
    dtype: str  # number format of the published weights

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self | None:
        """The probe in a manifest's metadata; None if its publisher made none.

        Raises:
            WeightCorruptError: it has another form.
        """
        content = metadata.get(METADATA_KEY)
        if content is None:
            return None
        try:
            probe = cls(**content)
            numbers = [*map(int, probe.token_ids), *map(float, (*probe.logprobs, *probe.initial_logprobs))]
            if not len(probe.token_ids) - 1 == len(probe.logprobs) == len(probe.initial_logprobs) > 0:
                raise ValueError("its lengths do not fit")
        except (TypeError, ValueError) as error:
            raise WeightCorruptError(f"the version's probe cannot be read ({error}). Publish it again.") from None
        if not all(map(math.isfinite, numbers)):
            raise WeightCorruptError("the version's probe is not finite. Look at the learner.")
        return probe

    def as_json(self) -> dict[str, Any]:
        """For a manifest's metadata."""
        return {
            "token_ids": list(self.token_ids),
            "logprobs": list(self.logprobs),
            "initial_logprobs": list(self.initial_logprobs),
            "dtype": self.dtype,
        }


def probe_tokens(vocab_size: int, max_positions: int, seed: int) -> list[int]:
    """Token ids drawn from the whole vocabulary, always the same for a job."""
    drawn = random.Random(f"probe {seed} {vocab_size}")
    # One position stays free: vLLM samples at least one token.
    return [drawn.randrange(vocab_size) for _ in range(min(PROBE_TOKENS, max_positions - 1))]


class ProbeCheck:
    """Holds one engine to the probes of the versions that it takes up.

    Args:
        dtype: number format of its weights.
        cheaper: whether it computes in a cheaper format beside that, such as quantized weights or an 8-bit cache.
    """

    def __init__(self, dtype: str, *, cheaper: bool = False) -> None:
        self._dtype = dtype
        self._cheaper = cheaper
        self._initial_error = 0.0

    def compares_initial(self, probe: WeightProbe) -> bool:
        """Whether the engine's own error is to be measured on the initial weights before the first version."""
        return self._cheaper or probe.dtype != self._dtype

    def measure_initial(self, probe: WeightProbe, logprobs: Sequence[float]) -> None:
        """Take the engine's error with the initial weights as the one to expect."""
        error = _relative_error(probe.initial_logprobs, logprobs)
        self._initial_error = error if math.isfinite(error) else 0.0

    def check(self, probe: WeightProbe, logprobs: Sequence[float], version: int) -> float:
        """Compare what the engine computes with a version with what the learner did; the relative error.

        Raises:
            WeightCorruptError: they differ by more than rounding, or than the engine's format explains.
        """
        bound = max(_ROUNDING.get(self._dtype, 0.0), _ROUNDING.get(probe.dtype, 0.0))
        bound = max(bound, _TIMES_INITIAL * self._initial_error)
        error = _relative_error(probe.logprobs, logprobs)
        if not error <= bound:  # so that NaN fails
            pairs = zip(probe.logprobs, logprobs, strict=False)
            largest = max((abs(left - right) for left, right in pairs), default=math.nan)
            raise WeightCorruptError(
                f"version {version} does not give the log-probabilities that the learner published with it: they "
                f"differ by {error:.2g} of their size on average, of which rounding explains {bound:.2g}, and by "
                f"{largest:.2g} nats at most. The weights did not arrive as they were, or this engine makes another "
                "model of them: if the next version is refused as well, use the other rollout.engine."
            )
        return error

    def check_restored(self, before: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> None:
        """Compare what restored weights give with what they gave before.

        Raises:
            WeightCorruptError: they differ by more than rounding.
        """
        bound = _ROUNDING.get(self._dtype, 0.0)
        errors = [_relative_error(left, right) for left, right in zip(before, found, strict=True)]
        if not all(error <= bound for error in errors):
            raise WeightCorruptError(
                f"the restored weights give other log-probabilities than before, by {max(errors):.2g} of their size"
            )


def _relative_error(expected: Sequence[float], found: Sequence[float]) -> float:
    if len(expected) != len(found):
        return math.nan
    differences = sum(abs(left - right) for left, right in zip(expected, found, strict=True))
    return differences / max(sum(map(abs, expected)), 1e-30)
