"""What an inference engine must do for the rollout service. Implementations pass one conformance suite.

An engine returns, for every sampled token, the log-probability under the distribution that it was drawn from, the
most probable alternatives, and the weight version used. Weights change between tokens without dropping requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jackpot.errors import ConfigError
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one group is sampled."""

    temperature: float  # divides the logits; 0 is greedy, with the log-probabilities of temperature 1
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end of sequence
    top_logprobs: int = 0  # candidates returned per position
    seed: int = 0  # trajectory i has its own generator, derived from (seed, i)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupRequest:
    """One group to be sampled: ``num_trajectories`` completions of one prompt."""

    group_id: str
    prompt_token_ids: NDArray[np.uint32]  # [P]
    num_trajectories: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The model's limits."""

    vocab_size: int
    max_positions: int  # prompt and completion together


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Trajectories in the engine, and the tokens that it has sampled since its start."""

    num_running: int
    num_waiting: int
    tokens_generated: int


# Name, torch's name of the dtype, shape; in sending order.
TensorLayout = Sequence[tuple[str, str, Sequence[int]]]


class WeightReceiver(Protocol):
    """Receives weight versions that the learner broadcasts. After any failure the engine keeps its version."""

    @property
    def session(self) -> str:
        """The engine's broadcast group; empty if it is in none."""

    async def join(self, session: str, info: Mapping[str, Any], timeout_seconds: float) -> None:
        """Join a group, leaving the previous one; returns once all its members have joined.

        Args:
            session: the group's name.
            info: the other fields of ``JoinTransferRequest``.
            timeout_seconds: how long to wait for them.

        Raises:
            DeadlineError: some did not join in time.
            EngineError: the group could not be joined.
        """

    async def start(self, session: str, version: int, layout: TensorLayout) -> None:
        """Check the version's tensors before they are sent.

        Raises:
            WeightMissingError: the engine is not in this group.
            WeightCorruptError: they do not fit the model.
        """

    async def update(self, session: str, version: int, timeout_seconds: float) -> None:
        """Receive the version into memory, while the learner broadcasts it. On an error the group is left.

        Raises:
            WeightMissingError: the engine is not in this group, or the version was not announced.
            DeadlineError: it did not arrive in time.
            EngineError: the broadcast broke off.
        """

    async def finish(self, session: str, version: int, probe: WeightProbe | None = None) -> int:
        """Use the received version from the next token on, unless it is older; returns the version held now.

        Args:
            session: the group's name.
            version: the announced version.
            probe: see :meth:`RolloutEngine.load_weights`.

        Raises:
            WeightMissingError: the engine is not in this group, or the version was not announced.
            WeightCorruptError: it could not be applied, or does not give its probe; the engine keeps its version.
        """


class RolloutEngine(Protocol):
    """An inference engine with one model whose weights are swapped in place."""

    @property
    def name(self) -> str:
        """``transformers`` or ``vllm``."""

    @property
    def version(self) -> int:
        """The weight version held; −1 for what was in the model directory."""

    @property
    def limits(self) -> ModelLimits:
        """The limits that requests are checked against."""

    @property
    def receiver(self) -> WeightReceiver | None:
        """Receives the learner's broadcasts; None if this engine takes weights only from the store."""

    def check(self, request: GroupRequest) -> None:
        """Refuse a request that this model cannot serve, before waiting for anything.

        Raises:
            ConfigError: naming field, value and remedy.
        """

    async def generate(self, request: GroupRequest) -> list[Trajectory]:
        """Sample a group. Trajectory i has the id ``<group id>#<i>``. Cancelling the call frees its place.

        Raises:
            ConfigError: the request cannot work with this model.
            QueueFullError: the queue is full; try again later.
            EngineError: the engine failed; the request may be retried elsewhere.
        """

    async def load_weights(self, version: int, directory: Path, probe: WeightProbe | None = None) -> None:
        """Use the weights in ``directory`` from the next token on, unless a version as new is held already.

        Running requests continue: their next tokens have the new weights' log-probabilities, given all their tokens.

        Args:
            version: its number.
            directory: its files.
            probe: log-probabilities that the engine must give with these weights; None checks nothing.

        Raises:
            WeightCorruptError: they do not fit the model, or do not give the probe; the engine keeps the version it
                has.
            FileNotFoundError: the directory is gone.
            EngineError: the previous weights could not be restored: the engine has failed.
        """

    def status(self) -> EngineStatus:
        """How busy the engine is."""

    async def wait_failed(self) -> None:
        """Never returns while the engine works.

        Raises:
            EngineError: the engine has failed; the process should be restarted.
        """

    async def close(self) -> None:
        """Stop; requests under way fail with EngineError."""


def check_request(request: GroupRequest, limits: ModelLimits, max_queue: int) -> None:
    """Refuse a request that no engine could serve with this model.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    sampling = request.sampling
    _check_numbers(request, limits, max_queue)
    for field, ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("sampling.stop_token_ids", np.asarray(sampling.stop_token_ids, dtype=np.int64)),
    ):
        if ids.size and int(ids.max()) >= limits.vocab_size:
            problem = f"is not in the vocabulary of {limits.vocab_size} tokens"
            raise ConfigError(field, int(ids.max()), problem, "Encode with the tokenizer of the model that samples.")
    prompt_length = len(request.prompt_token_ids)
    if prompt_length == 0:
        raise ConfigError("prompt_token_ids", [], "is empty", "Send at least one token, such as the model's BOS.")
    if prompt_length + sampling.max_tokens > limits.max_positions:
        raise ConfigError(
            "prompt_token_ids",
            f"{prompt_length} tokens",
            f"with max_tokens = {sampling.max_tokens} it exceeds the model's {limits.max_positions} positions",
            f"Shorten the prompt, or set max_tokens to at most {max(0, limits.max_positions - prompt_length)}.",
        )


def _check_numbers(request: GroupRequest, limits: ModelLimits, max_queue: int) -> None:
    sampling = request.sampling
    if not (np.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ConfigError(
            "sampling.temperature", sampling.temperature, "is not a number ≥ 0", "Use a positive number, or 0 (greedy)."
        )
    if sampling.max_tokens < 1:
        raise ConfigError("sampling.max_tokens", sampling.max_tokens, "asks for no tokens", "Use at least 1.")
    if not 0 <= sampling.top_logprobs <= limits.vocab_size:
        problem = f"is more than the vocabulary's {limits.vocab_size} tokens"
        raise ConfigError(
            "sampling.top_logprobs", sampling.top_logprobs, problem, f"Use at most {limits.vocab_size} (or fewer)."
        )
    if not 1 <= request.num_trajectories <= max_queue:
        problem = f"is not between 1 and this server's queue of {max_queue}"
        raise ConfigError(
            "num_trajectories", request.num_trajectories, problem, "Use smaller groups, or raise rollout.max_queue."
        )
