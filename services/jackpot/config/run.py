"""Settings of the run: alarms, trackers, processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jackpot.section import Fraction, NonNegativeInt, PositiveFloat, Section


class AlarmsConfig(Section):
    """Signs of collapse that the learner watches for after every step. Collapse is absorbing: equal rewards give zero
    advantages, which give a zero gradient, for ever."""

    action: Literal["warn", "stop"] = "warn"
    """``warn`` writes to the log, to ``alarms.jsonl`` and to a metric; ``stop`` also ends the job as failed, after a
    checkpoint. ``warn``, because a solved task looks like a collapsed one: all its rewards are equal, too."""
    equal_rewards_steps: NonNegativeInt = 10
    """Steps in a row without any difference between rewards; 0 is off. Ten such batches in a row are not chance."""
    zero_gradient_steps: NonNegativeInt = 3
    """Steps in a row with a policy gradient of exactly 0; 0 is off."""
    kl_bound: PositiveFloat | None = 5.0
    """Greatest KL(policy ‖ actor), in nats per token (if the actor does not learn: k3's estimate of KL from scoring
    to sampling); null is off. At 5 the actor's tokens have almost no probability under the policy."""
    acceptance_bound: Fraction = 0.05
    """Smallest acceptance rate of a step; 0 is off. Below it nearly all sampled tokens are discarded, so that a step
    costs twenty times what it should."""
    canary_sequences: NonNegativeInt = 8
    """Of each weight version that sampled a batch, how many groups the canary looks at: a few tokens of each are passed
    again through that version, and must have the log-probabilities that the engine recorded. 0 is off; a batch then
    keeps no old versions in host memory."""
    canary_bound: PositiveFloat | None = None
    """Greatest difference, in nats, between a token's two log-probabilities in the canary; beyond it an engine samples
    with other weights than it says. null: 0.001 where engine and learner compute in float32, which is ten times their
    rounding. Other number formats differ by far more at single tokens: there the root mean square counts, and may grow
    to three times that of the job's first three batches."""
    accuracy_drop: Fraction = 0.1
    """How far the policy's held-out accuracy may fall below its best while the actor's mean reward rises, in two
    evaluations in a row; 0 is off. Rewards are the actor's: they can rise while the policy falls apart."""


class TrackingConfig(Section):
    """Experiment trackers. The run directory has every figure without them."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers of steps and evaluations: ``tensorboard`` (files in ``tensorboard/`` of the run directory) and
    ``wandb``. Each needs the extra of its name."""
    wandb_project: str = Field(default="jackpot", min_length=1)
    """The project in Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "online"
    """``offline`` writes files for a later `wandb sync`; ``online`` needs `wandb login`."""


class RunConfig(Section):
    """The local run."""

    directory: str | None = None
    """Where the run directory goes; null is ``runs/<job id>``."""
    max_restarts: NonNegativeInt = 5
    """How often one process is restarted before the job stops with its last error."""
    keep_trajectories: NonNegativeInt = 2
    """How many of the last batches the learner keeps in ``trajectories/`` for `jackpot replay`; 0 keeps none. Two are
    enough to choose λ, take few MB, and their weights are still kept."""
    deterministic: bool | None = None
    """Whether a seed gives the same trajectories, masks, steps and evaluations to the bit, on one machine with one
    number of threads. Other rows of a forward pass change the last bits of a row, so each group is then sampled and
    scored in separate passes, which takes several times as long; and training waits for each evaluation. Needs
    ``orchestrator.max_staleness: 0``, since with staleness timing decides which version samples, and the transformers
    engine. null turns it on wherever possible."""
    threads_per_process: NonNegativeInt = 0
    """CPU threads per process for torch; 0 divides the cores among processes."""
    startup_timeout_seconds: PositiveFloat = 180.0
    """How long a process may take to start serving."""
