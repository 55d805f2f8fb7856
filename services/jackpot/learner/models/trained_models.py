"""A trainer's models and their optimizers: prepared for training, copied for publishing, saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from jackpot.compute.pass_layout import layout_of
from jackpot.compute.probe_pass import probe_logprobs, tokens_for
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.held_tensors import begin_copy
from jackpot.compute.ranks.sharding import DTYPES, release, shard, whole_tensors
from jackpot.config import JobSpec
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, PendingCheckpoint, Progress
from jackpot.learner.checkpoints.checkpoint_tensors import Learnable
from jackpot.learner.models.compile_and_checkpoint import compile_and_checkpoint
from jackpot.learner.models.mixed_precision import MixedPrecisionCopy, in_dtype
from jackpot.learner.models.optimizer import build_optimizer
from jackpot.storage.weight_probe import WeightProbe
from jackpot.trajectory import Role


class TrainedModels(Mapping[Role, PreTrainedModel]):
    """Policy, actor and their optimizers; maps each role to the model of its passes.

    Args:
        job: the job as resolved.
        policy: θ.
        actor: ω, or None when the policy samples for itself.
        ranks: the processes that train together. With a mesh, trained models come from :func:`load_on_ranks` and are
            sharded over it here. Without one, models that compute in 16 bits get a 16-bit copy.
    """

    def __init__(
        self,
        job: JobSpec,
        policy: PreTrainedModel,
        actor: PreTrainedModel | None,
        ranks: Ranks = SOLO,
    ) -> None:
        self._job = job
        self._ranks = ranks
        self.device = ranks.device or policy.device
        self._by_role: dict[Role, PreTrainedModel] = {"policy": policy}
        if actor is not None:
            self._by_role["actor"] = actor
        self.actor_learns = actor is not None and not isinstance(job.actor, str) and job.actor.train
        self.peak_lr: dict[Role, float] = {"policy": job.learner.lr}
        if self.actor_learns:
            self.peak_lr["actor"] = job.learner.actor_lr or job.learner.lr
        for role, model in self._by_role.items():
            # Dropout would make the policy differ from its own reference.
            model.eval()  # type: ignore[no-untyped-call]
            model.requires_grad_(role in self.peak_lr)
        # A checkpoint is restored only into the policy: this stays the job's initial model.
        self.initial = copy.deepcopy(policy) if job.algorithm.kl_penalty.weight > 0 else None
        if self.initial is not None:
            self.initial.requires_grad_(False)
        self._dtypes: dict[Role, str] = {"policy": job.policy.dtype, "actor": job.rollout_model.dtype}
        masters = {role: self._by_role[role] for role in self.peak_lr}
        self._copies: dict[Role, MixedPrecisionCopy] = {}
        if ranks.mesh is not None:
            self._shard()
        else:
            self._copy()
        learning = [(self._by_role[role], DTYPES[self._dtypes[role]]) for role in self.peak_lr]
        self.layout = layout_of(job.learner.packing, learning, self.device, ranks)
        if self.initial is not None:
            _attend_alike(self.initial, policy)
        self._probe_tokens = {role: tokens_for(model, job.seed) for role, model in self._by_role.items()}
        self._initial_logprobs = {role: self._probe_logprobs(role) for role in self._by_role}
        # After the trials of the layout, which would otherwise be compiled, too.
        for _, model in self._passing():
            release(model)
            assert ranks.mesh is None or all(isinstance(parameter, DTensor) for parameter in model.parameters())
            compile_and_checkpoint(model, job.learner)
        self.learnables: dict[Role, Learnable] = {
            role: Learnable(model, build_optimizer(model, self.peak_lr[role], job.learner))
            for role, model in masters.items()
        }

    def __getitem__(self, role: Role) -> PreTrainedModel:
        return self._by_role[role]

    def __iter__(self) -> Iterator[Role]:
        return iter(self._by_role)

    def __len__(self) -> int:
        return len(self._by_role)

    @property
    def sampling(self) -> PreTrainedModel | None:
        """The model whose weights the rollout service samples with, as it computes here: ω, or θ where that samples.
        None where it does not learn, so that all versions are the same."""
        actor = self._job.actor
        if isinstance(actor, str) or actor.weights == "policy":
            return self._by_role["policy"]
        return self._by_role["actor"] if self.actor_learns else None

    def _passing(self) -> list[tuple[Role, PreTrainedModel]]:
        """The models of the passes, by role: the trained models, and the initial policy."""
        learning = [(role, self._by_role[role]) for role in self.peak_lr]
        return learning if self.initial is None else [*learning, ("policy", self.initial)]

    def _shard(self) -> None:
        """Shard the models of the passes; before the optimizers are created."""
        offload = self._job.learner.cpu_offload
        for role, model in self._passing():
            shard(model, self._ranks, self._dtypes[role], field=f"{role}.model", cpu_offload=offload)

    def _copy(self) -> None:
        """Have models that do not compute in float32 compute with 16-bit copies."""
        for role in self.peak_lr:
            dtype = DTYPES[self._dtypes[role]]
            if dtype != torch.float32:
                self._copies[role] = MixedPrecisionCopy(self._by_role[role], dtype)
                self._by_role[role] = self._copies[role].computing
        if self.initial is not None:
            in_dtype(self.initial, DTYPES[self._dtypes["policy"]])

    def refresh(self, role: Role) -> None:
        """A model's weights have changed: update its 16-bit copy, if there is one."""
        if role in self._copies:
            self._copies[role].refresh()

    def weights(self, role: Role) -> dict[str, Tensor]:
        """A copy of a role's weights on the CPU, in the dtype of publishing; a collective.

        Rank 0 gets all of them, the others nothing.
        """
        copied = {}
        for name, tensor in whole_tensors(self._by_role[role]):
            if self._ranks.rank == 0:
                dtype = DTYPES.get(self._dtypes[role]) if tensor.is_floating_point() and role in self.peak_lr else None
                copied[name] = begin_copy(tensor, dtype or tensor.dtype)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return copied

    def probe(self, role: Role) -> WeightProbe:
        """What a role's weights, in the dtype of publishing, give for the probe's tokens; a collective."""
        logprobs, initial = self._probe_logprobs(role), self._initial_logprobs[role]
        return WeightProbe(self._probe_tokens[role], logprobs, initial, self._dtypes[role])

    def _probe_logprobs(self, role: Role) -> list[float]:
        return probe_logprobs(self._by_role[role], self._probe_tokens[role])

    def begin_checkpoint(self, store: CheckpointStore, progress: Progress) -> PendingCheckpoint:
        """Start writing a checkpoint of the current state; a collective. Errors as ``store.begin``."""
        return store.begin(progress, self.learnables)

    def restore(self, store: CheckpointStore, path: Path) -> Progress:
        """Restore a checkpoint; a collective. Errors as ``store.load``."""
        progress = store.load(path, self.learnables)
        for role in self._copies:
            self.refresh(role)
        return progress


def _attend_alike(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give a model the attention of another of the same architecture, which was chosen for its passes."""
    attention = other.config._attn_implementation
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
