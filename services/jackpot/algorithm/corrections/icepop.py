"""IcePop: F(s) = s inside a band, else 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from jackpot.algorithm.corrections.base import Correction, SampledTokens, Weights, masked_outside, target_ratio
from jackpot.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class IcepopCorrection(Correction):
    """IcePop: F(s) = s if s is in [low, high], else 0. Tokens outside carry no gradient but stay in the mean."""

    name: Literal["icepop"] = "icepop"
    low: NonNegativeFloat = 0.5
    """α. 0.5 is IcePop's published value. 0 keeps only the upper bound (TRL's ``token_mask``)."""
    high: PositiveFloat = 5.0
    """β. 5 is IcePop's published value."""

    @model_validator(mode="before")
    @classmethod
    def _low_and_high_in_one(cls, data: Any) -> Any:
        """``threshold: "0.5_5.0"``, verl's notation, is short for low and high."""
        if not isinstance(data, dict) or "threshold" not in data:
            return data
        low, underscore, high = str(data["threshold"]).partition("_")
        if not underscore or "low" in data or "high" in data:
            raise ValueError(
                f"threshold = {data['threshold']!r} is not of the form low_high, or stands beside low or high. "
                "Write threshold: '0.5_5.0', or low and high"
            )
        rest = {key: value for key, value in data.items() if key != "threshold"}
        try:
            return rest | {"low": float(low), "high": float(high)}
        except ValueError:
            raise ValueError(f"threshold = {data['threshold']!r} is not two numbers. Write e.g. '0.5_5.0'") from None

    @model_validator(mode="after")
    def _ordered(self) -> IcepopCorrection:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}. Write the smaller one as low")
        return self

    def weights(self, tokens: SampledTokens) -> Weights:
        """s if it is in [low, high], else 0."""
        return icepop_weights(tokens.target_logprobs, tokens.actor_logprobs, low=self.low, high=self.high)


def icepop_weights(target_logprobs: Tensor, actor_logprobs: Tensor, *, low: float, high: float) -> Weights:
    """F(s) = s where low ≤ s ≤ high, else 0 (IcePop). [tokens] each."""
    return masked_outside(*target_ratio(target_logprobs, actor_logprobs), low, high)
