"""Sample trajectories: tokens with acceptance probabilities, read from the bus's payload files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jackpot.bus.payload_format import decode_scored
from jackpot.config import JobSpec
from jackpot.errors import PayloadError
from jackpot.storage.json_files import JsonLinesWriter
from jackpot.storage.run_directory import RunFiles
from jackpot.trajectory import ScoredGroup

SAMPLES_PER_JOB = 60
MAX_TOKENS_SHOWN = 512


class SampleTaker:
    """Writes about :data:`SAMPLES_PER_JOB` sample trajectories over a job, evenly over its steps.

    Jobs whose payloads lie in Redis have no payload files, and so no samples.

    Args:
        run_dir: the run directory.
        job: the job as resolved: its tokenizer turns ids into text.
    """

    def __init__(self, run_dir: Path, job: JobSpec) -> None:
        files = RunFiles(run_dir)
        self._payloads = files.payloads
        self._writer = JsonLinesWriter(files.samples)
        self._job = job
        self._every = max(1, job.learner.steps // SAMPLES_PER_JOB)
        self._next_step = 0
        self._tokenizer: Any = None

    def take(self, step: int) -> None:
        """Write a sample if one is due and a scored group lies on the bus.

        Raises:
            OSError: the sample cannot be written.
        """
        if step < self._next_step:
            return
        scored = self._newest()
        if scored is None:
            return
        self._next_step = step + self._every
        self._writer.append([self._sample(scored, step)])

    def _newest(self) -> ScoredGroup | None:
        payloads = [path for path in self._payloads.glob("*.scored.*") if not path.name.endswith(".tmp")]
        for path in sorted(payloads, reverse=True):
            try:
                return decode_scored(path.read_bytes(), max_bytes=self._job.bus.max_payload_bytes)
            except (FileNotFoundError, PayloadError):
                continue  # just trained and gone, or damaged, which the learner handles
        return None

    def _sample(self, scored: ScoredGroup, step: int) -> dict[str, Any]:
        """The group's trajectory with the most rejected tokens, the most informative one."""
        rejected = [int(np.count_nonzero(~scores.mask)) for scores in scored.scores]
        chosen = int(np.argmax(rejected))
        trajectory, scores = scored.group.trajectories[chosen], scored.scores[chosen]
        shown = slice(0, MAX_TOKENS_SHOWN)
        return {
            "step": step,
            "group_id": scored.group_id,
            "policy_version": scored.policy_version,
            "actor_version": trajectory.oldest_version,
            "reward": trajectory.reward,
            "finish_reason": trajectory.finish_reason,
            "obrs_lambda": scored.obrs_lambda,
            "prompt": "".join(self._text(int(token)) for token in scored.group.prompt_token_ids[-MAX_TOKENS_SHOWN:]),
            "tokens": [
                {
                    "text": self._text(int(token)),
                    "acceptance": round(float(probability), 4),
                    "accepted": bool(accepted),
                    "target_logprob": round(float(target), 4),
                    "actor_logprob": round(float(actor), 4),
                }
                for token, probability, accepted, target, actor in zip(
                    trajectory.token_ids[shown],
                    scores.acceptance_probs[shown],
                    scores.mask[shown],
                    scores.target_logprobs[shown],
                    trajectory.actor_logprobs[shown],
                    strict=True,
                )
            ],
        }

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(Path(self._job.policy.model) / "tokenizer.json"))
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return text or str(self._tokenizer.id_to_token(token) or f"<{token}>")
