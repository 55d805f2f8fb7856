"""Evaluates the policy on its own samples for held-out prompts while training continues.

The actor's rewards say little: they may rise while the policy's accuracy falls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jackpot.config import JobSpec
from jackpot.errors import DeadlineError, JackpotError, RequestRefusedError, RewardError
from jackpot.orchestrator.dispatch import sampling_seed
from jackpot.orchestrator.failures import first_error
from jackpot.orchestrator.prompts import HeldOut, log_left_out
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.orchestrator.rewards import Judgement, RewardPool
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.orchestrator.versions import VersionWatch
from jackpot.rpc.proto import ids_to_bytes
from jackpot.storage.json_files import JsonLinesWriter
from jackpot.storage.run_records import EvaluationRow, read_accuracies
from jackpot.telemetry import Metrics
from jackpot.trajectory import Trajectory
from jackpot.v1 import rollout_pb2

LOG = logging.getLogger(__name__)

CORRECT = 1 - 1e-6  # rewards from this value on count as right
PROMPTS_AT_ONCE = 64
RETRY_SECONDS = 1.0
OPTIONAL_ATTEMPTS = 2  # for evaluations between the first and the last


_Sample = tuple[Trajectory, Judgement]


class EvaluationLog:
    """The evaluations of a job, appended by one writer.

    Args:
        path: the file; created with its first row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = JsonLinesWriter(path)

    def last_step(self) -> int | None:
        """The newest step that has a row, or None.

        Raises:
            DamagedRecordError: a row cannot be read.
        """
        return max((row.step for row in read_accuracies(self._path)), default=None)

    def append(self, row: EvaluationRow) -> None:
        """Add a row."""
        self._writer.append([asdict(row)])


class PolicyEvaluation:
    """Evaluates at step 0, at every multiple of ``evaluation.every`` and at the last step.

    Args:
        job: the job.
        job_id: its id.
        questions: the held-out prompts.
        tokenizer: the policy's tokenizer.
        evaluator: a rollout server with the policy's weights.
        versions: the newest weight versions.
        rewards: computes the rewards.
        log: receives the rows.
        metrics: shows the accuracy.
    """

    def __init__(
        self,
        *,
        job: JobSpec,
        job_id: str,
        questions: HeldOut,
        tokenizer: PromptTokenizer,
        evaluator: ReplicaPool,
        versions: VersionWatch,
        rewards: RewardPool,
        log: EvaluationLog,
        metrics: Metrics,
    ) -> None:
        self._job = job
        self._job_id = job_id
        self._items = questions.items
        self._prompts = questions.token_ids
        self._tokenizer = tokenizer
        self._stop_ids = tokenizer.stop_token_ids(job.sampling.stop)
        self._evaluator = evaluator
        self._versions = versions
        self._rewards = rewards
        self._log = log
        self._metrics = metrics
        self._slots = asyncio.Semaphore(PROMPTS_AT_ONCE)
        log_left_out(questions.left_out)

    async def run(self, evaluated: Callable[[int], None]) -> None:
        """Run evaluations up to the last step.

        Args:
            evaluated: called with the step that is evaluated next, each time what was due is done: first once step 0
                is evaluated, or at once if it was before a restart.

        Raises:
            DeadlineError: the first or the last evaluation did not succeed within ``evaluation.timeout_seconds``.
            RequestRefusedError: the evaluator can never answer.
        """
        last = self._log.last_step()
        if last is None:
            if await self._versions.wait("policy", 0) == 0:
                await self._evaluate_at(0)
            else:
                LOG.warning("the untrained policy is gone; step 0 cannot be evaluated any more")
            last = 0
        every, steps = self._job.evaluation.every, self._job.learner.steps
        due = next_evaluation(last, every, steps)
        evaluated(due)
        while last < steps:
            last = last_due(await self._versions.wait("policy", due), every, steps)
            await self._evaluate_at(last)
            due = next_evaluation(last, every, steps)
            evaluated(due)

    async def _evaluate_at(self, step: int) -> None:
        required = step in (0, self._job.learner.steps)
        timeout = self._job.evaluation.timeout_seconds
        failures: list[JackpotError] = []
        try:
            async with asyncio.timeout(timeout):
                while required or len(failures) < OPTIONAL_ATTEMPTS:
                    try:
                        # In a separate task: up to Python 3.12 a failed TaskGroup may leave its task marked as
                        # cancelled, and the timeout around it would then look like a cancellation from outside.
                        return self._record(await asyncio.create_task(self.evaluate(step)))
                    except RequestRefusedError:
                        raise
                    except JackpotError as error:
                        LOG.warning("an evaluation of step %d failed: %s", step, error)
                        failures.append(error)
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            if required:
                why = f"Last failure: {failures[-1]}" if failures else "Look at the evaluator's log."
                raise DeadlineError(f"the evaluation of step {step}", timeout, why) from None
        LOG.error("the evaluation of step %d is skipped", step)

    async def evaluate(self, min_version: int) -> EvaluationRow:
        """Sample every held-out prompt with a policy of at least ``min_version`` and compute the rewards.

        Raises:
            JackpotError: sampling failed, or every reward did.
        """
        await self._evaluator.load_weights(min_version)
        prompts = range(len(self._items))
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._sample(index, min_version)) for index in prompts]
        except* JackpotError as errors:
            raise first_error(errors) from None
        return self._row([task.result() for task in running])

    def _row(self, by_prompt: Sequence[Sequence[_Sample]]) -> EvaluationRow:
        samples = [sample for prompt in by_prompt for sample in prompt]
        failures = [judgement.failure for _, judgement in samples if judgement.failure]
        if len(failures) == len(samples):
            raise RewardError(f"the reward of every sample of an evaluation failed, the first one {failures[0]}")
        rewards = [
            [judgement.reward for _, judgement in prompt if judgement.reward is not None] for prompt in by_prompt
        ]
        judged = [reward for prompt in rewards for reward in prompt]
        trajectories = [trajectory for trajectory, _ in samples]
        versions = [span.version for trajectory in trajectories for span in trajectory.version_spans]
        return EvaluationRow(
            step=min(versions),
            newest_step=max(versions),
            time=time.time(),
            policy_accuracy=float(np.mean([reward >= CORRECT for reward in judged])),
            accuracy_stderr=accuracy_stderr(rewards),
            pass_at_n=pass_at_n(rewards),
            mean_reward=float(np.mean(judged)),
            num_prompts=len(by_prompt),
            num_samples=len(judged),
            num_reward_failures=len(failures),
            num_unreadable=sum(bool(judgement.unreadable) for _, judgement in samples),
            comparable=len(failures) <= self._job.evaluation.max_failure_share * len(samples),
            mean_tokens=float(np.mean([trajectory.num_tokens for trajectory in trajectories])),
            truncated_fraction=float(np.mean([t.finish_reason == "length" for t in trajectories])),
        )

    async def _sample(self, index: int, min_version: int) -> list[_Sample]:
        async with self._slots:
            trajectories = await self._evaluator.generate(self._request(index, self._prompts[index], min_version))
        texts = [self._tokenizer.decode(trajectory.token_ids) for trajectory in trajectories]
        judgements = await self._rewards.judge(self._items[index], texts)
        return list(zip(trajectories, judgements, strict=True))

    def _request(self, index: int, prompt: NDArray[np.uint32], min_version: int) -> rollout_pb2.GenerateRequest:
        return rollout_pb2.GenerateRequest(
            group_id=f"{self._job_id}.evaluation.v{min_version}.p{index}",
            prompt_token_ids=ids_to_bytes(prompt),
            num_trajectories=self._job.evaluation.samples_per_prompt,
            sampling=rollout_pb2.SamplingParams(
                temperature=self._job.evaluation_temperature,
                max_tokens=self._job.sampling.max_tokens,
                stop_token_ids=self._stop_ids,
                top_logprobs=1,
                # The same at every step, so that only the policy changes between evaluations.
                seed=sampling_seed(self._job.seed, f"evaluation {index}"),
            ),
            min_version=min_version,
        )

    def _record(self, row: EvaluationRow) -> None:
        self._log.append(row)
        if not row.comparable:
            LOG.warning(
                "%d of %d rewards of an evaluation failed: its accuracy cannot be compared with others",
                *(row.num_reward_failures, row.num_samples),
                extra={"step": row.step},
            )
        self._metrics.observe_evaluation(row.step, row.policy_accuracy)
        LOG.info("evaluated", extra={"step": row.step, "policy_accuracy": row.policy_accuracy})


def pass_at_n(rewards: Sequence[Sequence[float]]) -> float:
    """The fraction of prompts with at least one right sample; prompts without any reward are left out.

    Args:
        rewards: the rewards of each prompt's samples; at least one in total.
    """
    return float(np.mean([max(prompt) >= CORRECT for prompt in rewards if prompt]))


def accuracy_stderr(rewards: Sequence[Sequence[float]]) -> float | None:
    """The standard error of the fraction of right samples, as an estimate for all possible prompts.

    Samples of one prompt are correlated, so it is computed over n prompts: √(n/(n−1) · Σ (r_i − A·m_i)²) / Σ m_i, where
    r_i of prompt i's m_i samples are right and A is the accuracy. With m samples each, it is the standard deviation of
    the prompts' accuracies / √n.

    Args:
        rewards: the rewards of each prompt's samples; prompts without rewards are left out.

    Returns:
        None for fewer than two prompts.
    """
    right = np.array([sum(reward >= CORRECT for reward in prompt) for prompt in rewards if prompt])
    counts = np.array([len(prompt) for prompt in rewards if prompt])
    n = len(counts)
    if n < 2:
        return None
    deviations = right - right.sum() / counts.sum() * counts
    return float(np.sqrt(n / (n - 1) * np.square(deviations).sum()) / counts.sum())


def next_evaluation(last: int, every: int, steps: int) -> int:
    """The first step after ``last`` at which an evaluation is due."""
    return min((last // every + 1) * every, steps)


def last_due(newest: int, every: int, steps: int) -> int:
    """The last step up to ``newest`` at which an evaluation is due; earlier ones are skipped."""
    return steps if newest >= steps else newest // every * every
