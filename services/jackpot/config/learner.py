"""The learner: its optimization, its processes, and the checkpoints that it keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from jackpot.section import (
    Device,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse_shared_device,
)


class ScheduleConfig(Section):
    """A learning-rate schedule."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at ``final_fraction`` of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from zero."""
    final_fraction: Fraction = 0.0
    """Final learning rate of linear and cosine, as a fraction of the peak."""


class LearnerConfig(Section):
    """The learner service."""

    steps: PositiveInt = 100
    """Optimizer steps in all."""
    groups_per_batch: PositiveInt = 16
    """Groups that are trained on together."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps per batch; the batch's groups are split evenly among them. 1 is fully on-batch."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate of the policy. 1e-6 suits billions of parameters; tiny models want 1e-3."""
    actor_lr: PositiveFloat | None = None
    """Peak learning rate of the actor; null means the policy's. An actor that learns too slowly falls behind."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm clip, for policy and actor separately."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule of the policy."""
    actor_schedule: ScheduleConfig | None = None
    """Learning-rate schedule of the actor; null means the policy's. An actor that has to catch up needs no warm-up."""
    device: Device = "auto"
    """``auto`` is CUDA if available; with several processes each takes its own GPU."""
    processes: PositiveInt = 1
    """Processes that train together, under torchrun: policy and actor are sharded over them (FSDP2), and each passes
    its part of the batch through them. The result is the same as with one process, up to rounding. Use one until a
    model needs more memory than a device has, or a step takes too long."""
    cpu_offload: bool = False
    """Keep parameters and optimizer state in the CPU's memory and bring one block at a time to the GPU: it allows a
    larger model, but steps are far slower. Needs a GPU."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass: a third more work, and memory
    that hardly grows with depth. The numbers are the same."""
    compile: bool = False
    """torch.compile each block: faster steps on GPUs, after a first step that takes minutes. Needs a compiler: g++ on
    CPUs, gcc on GPUs."""
    packing: Literal["auto", "always", "never"] = "auto"
    """How sequences are laid out. ``auto``: one after the other, without padding, where torch attends to them by their
    lengths (bfloat16 on a GPU); elsewhere rows of similar length. Either way completions of one prompt share it where
    that is less work. ``always``: one after the other, with a mask if necessary, whose memory and time grow with the
    square of ``max_batch_tokens``. ``never``: a row for every sequence. The result is the same, up to rounding."""
    max_batch_tokens: PositiveInt = 16384
    """Tokens in one forward and backward pass of one process; larger batches accumulate gradients. The split does not
    change the result: losses are divided by the whole batch's size."""
    max_sequence_tokens: PositiveInt | None = None
    """Longest sequence (prompt and completion) that is trained on; tokens beyond it are left out of the loss and
    counted as ``response/cut_tokens``. null is no bound: ``sampling.max_tokens`` already bounds completions."""
    profile_steps: NonNegativeInt = 0
    """Optimizer steps to record with torch's profiler, once per process and after its first batch: ``profile/`` of the
    run directory gets a trace per process for Perfetto. 0 records nothing; recording slows a step down."""
    collective_timeout_seconds: PositiveFloat = 600.0
    """How long a process waits for the others in one exchange before all of them restart from the last checkpoint. A
    process that died is noticed at once; this is for one that hangs."""
    checkpoint_every: PositiveInt = 10
    """Optimizer steps between checkpoints. Groups count as trained once a checkpoint includes them."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_best_checkpoint: bool = True
    """Also keep the checkpoint with the greatest held-out accuracy: training may run past its best. Make
    ``checkpoint_every`` and ``evaluation.every`` multiples of one another, so that checkpoints are evaluated."""
    overlap: bool = True
    """Whether the next batch is fetched and the new weights are written while the learner trains. If off, these run one
    after the other; the trained weights are the same. Costs a copy of the weights in memory."""
    batch_timeout_seconds: PositiveFloat = 600.0
    """How long the learner waits for a full batch before it stops with an error."""

    @model_validator(mode="after")
    def _batch_divides(self) -> LearnerConfig:
        if self.groups_per_batch % self.updates_per_batch:
            raise ValueError(
                f"groups_per_batch = {self.groups_per_batch} cannot be split evenly into "
                f"updates_per_batch = {self.updates_per_batch}. Make one a multiple of the other"
            )
        if self.steps % self.updates_per_batch:
            raise ValueError(
                f"steps = {self.steps} is not a whole number of batches of {self.updates_per_batch} updates. "
                f"Use a multiple of {self.updates_per_batch}"
            )
        if self.cpu_offload and self.device == "cpu":
            raise ValueError(
                "cpu_offload brings parameters to a GPU. Set device to auto or cuda, or cpu_offload to false"
            )
        refuse_shared_device(self.processes, self.device)
        return self
