"""What follows measurements while training: λ, towards an acceptance rate; λ_distill and the actor's pace, to a KL."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jackpot.algorithm.budget import greatest_lambda, smoothed_lambda, solve_lambda
from jackpot.algorithm.kl_control import KlControlSettings, KlControlState, initial_state, update
from jackpot.config import AlgorithmConfig, DistillationConfig


class LambdaControl:
    """λ and λ_distill in force. Constants unless the job asks for a rate or a KL.

    Args:
        algorithm: the objective's settings.
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self._obrs = algorithm.correction.obrs
        self._kl_settings = kl_control_settings(algorithm.distillation)
        self._constant_weight = algorithm.distillation.weight
        self._kl: KlControlState | None = initial_state(self._kl_settings) if self._kl_settings else None
        self._lambda_was_solved = False
        self.obrs_lambda = self._obrs.initial_lambda if self._obrs else 1.0

    @property
    def distillation_weight(self) -> float:
        """λ_distill of the next optimizer step."""
        return self._constant_weight if self._kl is None else self._kl.weight

    @property
    def actor_pace(self) -> float:
        """What the actor's learning rate is multiplied by in the next optimizer step."""
        return 1.0 if self._kl is None or self._kl_settings is None else self._kl.pace(self._kl_settings.target)

    def observe_tokens(self, target_logprobs: Tensor, actor_logprobs: Tensor) -> None:
        """Set λ by a batch's sampled tokens, [tokens] each.

        The first solution is taken as it is: what came before was a guess.
        """
        if self._obrs is None or self._obrs.acceptance_rate is None:
            return
        rate, lower, upper = self._obrs.acceptance_rate, self._obrs.lambda_min, self._obrs.lambda_max
        solved_lambda = solve_lambda(target_logprobs, actor_logprobs, rate, lower=lower, upper=upper)
        smoothing = self._obrs.lambda_smoothing if self._lambda_was_solved else 0.0
        smoothed = smoothed_lambda(self.obrs_lambda, solved_lambda, smoothing)
        # What the past asks for must not reject for nothing either.
        self.obrs_lambda = min(smoothed, greatest_lambda(target_logprobs, actor_logprobs, lower=lower, upper=upper))
        self._lambda_was_solved = True

    def observe_kl(self, kl: float) -> None:
        """Set λ_distill and the actor's pace by the mean KL(policy ‖ actor) of an optimizer step, in nats per token."""
        if self._kl is not None and self._kl_settings is not None:
            self._kl = update(self._kl, kl, self._kl_settings)

    def state(self) -> dict[str, float]:
        """What a checkpoint has to keep for training to go on as if it had not stopped."""
        state = {"lambda_was_solved": float(self._lambda_was_solved)}
        if self._kl is not None:
            state |= {"kl_integral": self._kl.integral, "distillation_weight": self._kl.weight}
            state |= {} if self._kl.log_kl is None else {"log_kl": self._kl.log_kl}
        return state

    def restore(self, obrs_lambda: float, state: Mapping[str, float]) -> None:
        """Take up what :meth:`state` gave; what an older checkpoint lacks stays as at the start."""
        self.obrs_lambda = obrs_lambda
        self._lambda_was_solved = bool(state.get("lambda_was_solved", False))
        if self._kl is not None and "distillation_weight" in state:
            self._kl = KlControlState(
                integral=state["kl_integral"], log_kl=state.get("log_kl"), weight=state["distillation_weight"]
            )


def kl_control_settings(distillation: DistillationConfig) -> KlControlSettings | None:
    """The controller's settings; None where λ_distill is a constant."""
    if distillation.kl_target is None:
        return None
    return KlControlSettings(
        target=distillation.kl_target,
        initial=distillation.weight,
        lower=distillation.weight_min,
        upper=distillation.weight_max,
        proportional=distillation.proportional_gain,
        integral=distillation.integral_gain,
        smoothing=distillation.kl_smoothing,
    )
