"""The models that score: the target policy, which follows the newest weights, and the actor at the versions that
sampled."""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.models import resolve_device, vocabulary_size
from jackpot.compute.probe_pass import probe_logprobs
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.held_tensors import HeldTensors
from jackpot.compute.ranks.loading import load_on_ranks
from jackpot.compute.ranks.sharding import release, shard
from jackpot.config import ModelConfig
from jackpot.errors import WeightCorruptError, WeightError, WeightMissingError
from jackpot.storage.weight_probe import ProbeCheck, WeightProbe
from jackpot.storage.weights import WeightStore
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)

# A version that cannot be loaded is tried again now and then, since its publisher may repair it. Verifying means
# hashing the whole file, so not at every poll.
RETRY_SECONDS = 1.0

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PendingWeights:
    """A policy version, read and verified, not yet in the model."""

    version: int
    obrs_lambda: float
    directory: Path  # it was read from here
    state: State  # this process's part of the weights
    read_seconds: float
    probe: WeightProbe | None = None


class PolicyModel(Protocol):
    """θ's model, and the two halves of a change of its weights. They are apart, so that scoring goes on while a file is
    read. A :class:`HeldPolicy`, or that of the rank which leads several."""

    @property
    def model(self) -> PreTrainedModel:
        """This process's part of θ."""

    def read(self, directory: Path) -> State:
        """What this process holds of the version in a directory. Errors as :meth:`HeldTensors.read`."""

    def apply(self, pending: PendingWeights) -> None:
        """Swap a version in. The model must not be in use."""

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """As :func:`jackpot.compute.probe_pass.probe_logprobs`, with the weights swapped in."""


class HeldPolicy:
    """θ as one process holds it, whole or sharded: a :class:`PolicyModel`.

    Args:
        config: the policy's model; gives the architecture.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        ranks: the processes that the model is sharded over.
        vocabulary: V, where the model's rows beyond it are padding.
    """

    def __init__(self, config: ModelConfig, device: str, ranks: Ranks = SOLO, vocabulary: int | None = None) -> None:
        self.model: PreTrainedModel = _load(config, device, ranks, vocabulary, field="policy.model")
        self._held_tensors = HeldTensors(self.model)

    def read(self, directory: Path) -> State:
        """As :meth:`PolicyModel.read`."""
        return self._held_tensors.read(directory)

    def apply(self, pending: PendingWeights) -> None:
        """As :meth:`PolicyModel.apply`."""
        release(self.model)
        self._held_tensors.apply(pending.state)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """As :meth:`PolicyModel.probe`."""
        return probe_logprobs(self.model, token_ids)


class TargetPolicy:
    """Reads the versions of the policy's weights, and says which one its model holds.

    Args:
        policy: the model.
        store: the job's weight store.
        obrs_lambda: λ for versions that do not carry one.
        num_held: versions that stay in memory; the least recently used gives way.
    """

    def __init__(self, policy: PolicyModel, store: WeightStore, obrs_lambda: float, num_held: int = 2) -> None:
        self.model = policy.model
        self._policy = policy
        self.version: int | None = None  # in the model
        self.obrs_lambda = obrs_lambda
        self.newest: int | None = None  # read and found intact
        self.newest_lambda = obrs_lambda
        self.num_refused = 0
        self._damaged: set[int] = set()
        self._num_held = num_held
        self._held: OrderedDict[int, PendingWeights] = OrderedDict()
        self._default_lambda = obrs_lambda
        self._store = store
        self._probe_check = ProbeCheck(str(self.model.dtype).removeprefix("torch."))
        self._retry_at = 0.0  # monotonic

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""
        return vocabulary_size(self.model)

    def read_newer(self) -> PendingWeights | None:
        """The newest version if it is newer than :attr:`newest`, read from the store.

        A version that is damaged (logged, counted) or just pruned is left alone; older ones stay in use.
        """
        if time.monotonic() < self._retry_at:
            return None
        version = None
        try:
            newest = self._store.latest("policy")
            if newest is None or (self.newest is not None and newest.version <= self.newest):
                return None
            version = newest.version
            pending = self.read_version(version)
        except WeightCorruptError as error:
            self.num_refused += 1
            if version is not None:
                self._damaged.add(version)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            LOG.error("policy weights refused, version %s stays in use: %s", self.newest, error)
            return None
        except (WeightMissingError, FileNotFoundError) as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            LOG.warning("policy weights pruned while they were read, version %s stays in use: %s", self.newest, error)
            return None
        self.newest, self.newest_lambda = pending.version, pending.obrs_lambda
        return pending

    def held(self, version: int) -> PendingWeights | None:
        """A version held in memory."""
        if version in self._held:
            self._held.move_to_end(version)
        return self._held.get(version)

    def read_version(self, version: int) -> PendingWeights:
        """A published version, from the store or from memory.

        Raises:
            WeightMissingError: the store does not hold it (any more).
            WeightCorruptError: its bytes are damaged.
            FileNotFoundError: it was pruned while it was read.
        """
        started = time.monotonic()
        if (held := self.held(version)) is not None:
            return held
        manifest = self._store.manifest("policy", version)
        obrs_lambda = float(manifest.metadata.get("obrs_lambda", self._default_lambda))
        directory = self._store.open("policy", version)
        probe = WeightProbe.from_metadata(manifest.metadata)
        state = self._policy.read(directory)
        seconds = time.monotonic() - started
        self._held[version] = PendingWeights(version, obrs_lambda, directory, state, seconds, probe)
        if len(self._held) > self._num_held:
            self._held.popitem(last=False)
        return self._held[version]

    def read(self, directory: Path) -> State:
        """As :meth:`PolicyModel.read`."""
        return self._policy.read(directory)

    def serves(self, version: int) -> bool:
        """Whether groups that need ``version`` can be scored now: it has been published, or it came damaged, and
        another stands in for it."""
        return self.newest is not None and (version <= self.newest or version in self._damaged)

    def apply(self, pending: PendingWeights) -> None:
        """As :meth:`PolicyModel.apply`, and hold the model to the version's probe.

        Raises:
            WeightCorruptError: it does not give it. The version is no longer the newest; the newest of those in memory
                is in use, if there is one.
        """
        self._policy.apply(pending)
        try:
            if pending.probe is not None:
                self._probe_check.check(pending.probe, self._policy.probe(pending.probe.token_ids), pending.version)
        except WeightCorruptError:
            self._refuse(pending)
            raise
        self.version = pending.version
        self.obrs_lambda = pending.obrs_lambda

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """As :meth:`PolicyModel.probe`."""
        return self._policy.probe(token_ids)

    def _refuse(self, pending: PendingWeights) -> None:
        self.num_refused += 1
        self._damaged.add(pending.version)
        self._held.pop(pending.version, None)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self.version, self.newest = None, max(list(self._held), default=None)
        if self.newest is not None:
            self.newest_lambda = self._held[self.newest].obrs_lambda
            self.apply(self._held[self.newest])


class ActorVersions:
    """ω at the versions that sampled, for normalizers that need the actor's own forward pass.

    One model on the device; the weights of the last few versions stay in host memory.

    Args:
        config: the model that samples.
        role: whose versions the rollout service stamps on its tokens.
        store: the job's weight store.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        num_held: versions kept in memory; the least recently used gives way.
        ranks: the processes that the model is sharded over; all of them are to call :meth:`at` alike.
        vocabulary: V, where the model's rows beyond it are padding.
    """

    def __init__(
        self,
        config: ModelConfig,
        role: Role,
        store: WeightStore,
        device: str,
        num_held: int = 3,
        ranks: Ranks = SOLO,
        vocabulary: int | None = None,
    ) -> None:
        self._model = _load(config, device, ranks, vocabulary, field=f"{role}.model")
        self._held_tensors = HeldTensors(self._model)
        self._ranks = ranks
        self._role: Role = role
        self._store = store
        self._num_held = num_held
        self._states: OrderedDict[int, State] = OrderedDict()
        self._probes: dict[int, WeightProbe | None] = {}
        self._probe_check = ProbeCheck(str(self._model.dtype).removeprefix("torch."))
        self._version: int | None = None

    def at(self, version: int) -> PreTrainedModel:
        """The actor with the weights of ``version``, until the next call.

        Raises:
            WeightMissingError: the store does not hold that version any more.
            WeightCorruptError: its bytes are damaged, or the model does not give its probe with them.
        """
        if version not in self._states:
            self._states[version] = self._read(version)
            if len(self._states) > self._num_held:
                oldest, _ = self._states.popitem(last=False)
                del self._probes[oldest]
        self._states.move_to_end(version)
        if self._version != version:
            release(self._model)
            self._held_tensors.apply(self._states[version])
            self._version = None
            self._require_probe(version)
            self._version = version
        return self._model

    def _require_probe(self, version: int) -> None:
        """Hold the model to the version's probe, on all ranks alike.

        Raises:
            WeightCorruptError: it does not give it.
        """
        probe = self._probes[version]
        if probe is None:
            return
        logprobs = probe_logprobs(self._model, probe.token_ids)
        try:
            self._probe_check.check(probe, logprobs, version)
        except WeightCorruptError:
            del self._states[version], self._probes[version]
            raise

    def _read(self, version: int) -> State:
        """Read a version on all ranks; if one fails, all raise the same error."""
        directory, probe = self._directory(version)
        state: State = {}
        problem: Exception | None = None
        try:
            state = self._held_tensors.read(directory)
        except (WeightCorruptError, FileNotFoundError) as error:
            problem = error
        all_read = self._ranks.agree(problem is None)
        if isinstance(problem, WeightCorruptError):
            raise problem
        if not all_read:
            raise WeightMissingError(
                f"version {version} of the {self._role}'s weights was pruned meanwhile. Raise weights.keep_versions."
            )
        self._probes[version] = probe
        return state

    def _directory(self, version: int) -> tuple[Path, WeightProbe | None]:
        """A version's directory and probe, verified once by rank 0 for all ranks."""
        answer: dict[str, Any] = {}
        if self._ranks.rank == 0:
            try:
                metadata = self._store.manifest(self._role, version).metadata
                answer = {"path": str(self._store.open(self._role, version)), "metadata": metadata}
                WeightProbe.from_metadata(metadata)
            except WeightError as error:
                answer = {"problem": str(error), "kind": type(error).__name__}
        answer = json.loads(self._ranks.broadcast(json.dumps(answer).encode()))
        if "path" in answer:
            return Path(answer["path"]), WeightProbe.from_metadata(answer["metadata"])
        kind = WeightCorruptError if answer["kind"] == WeightCorruptError.__name__ else WeightMissingError
        raise kind(answer["problem"])


def _load(config: ModelConfig, device: str, ranks: Ranks, vocabulary: int | None, *, field: str) -> PreTrainedModel:
    if ranks.mesh is None:
        resolved = resolve_device(device, field="scorer.device")
        return load_causal_lm(
            config.model,
            config.dtype,
            resolved,
            field=field,
            context_length=config.context_length,
            vocabulary=vocabulary,
        )
    assert ranks.device is not None
    model = load_on_ranks(
        config.model,
        config.dtype,
        ranks,
        ranks.device,
        field=field,
        context_length=config.context_length,
        vocabulary=vocabulary,
    )
    model.requires_grad_(False)
    shard(model, ranks, None, field=field)
    return model
