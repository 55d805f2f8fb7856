"""The whole method in one process: sample, score, learn, in turn. No services, no bus, no overlap.

    python benchmarks/single_process_loop.py examples/demo.yaml algorithm.correction=tis seed=3

It reads the same job file and trains the same models with the same mathematics as the services, and serves two
ends: to try settings quickly, and as the baseline that the pipeline is measured against. With staleness 1 (the job's
``orchestrator.max_staleness`` unless given) every batch is sampled with weights that are one batch old. It is scored
with weights of the same age, or with the newest when ``--scorer-staleness`` is 0; in the pipeline either may happen.
The two differ more than it seems: only an old reference lets the PPO clip act in the first update of a batch.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from jackpot.algorithm.advantage import group_advantages
from jackpot.algorithm.correction import icepop_weights, is_weights, mis_weights, no_weights, tis_weights
from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.normalizer import Candidates, mean_acceptance, normalizer_from, tail_normalizer
from jackpot.algorithm.objective import actor_loss_sum, policy_loss_sum, token_denominator
from jackpot.algorithm.obrs import acceptance_mask, acceptance_probs, acceptance_uniforms, jackpot_weights
from jackpot.algorithm.vocabulary import VocabularyScores, differentiable_token_logprobs, token_logprobs
from jackpot.config import (
    CorrectionConfig,
    IcepopCorrection,
    IsCorrection,
    JackpotCorrection,
    JobSpec,
    MisCorrection,
    TisCorrection,
    load_job,
)
from jackpot.demo.recipe import RECIPES, builtin_models_missing, cache_root, is_builtin, resolve_builtin
from jackpot.errors import ConfigError
from jackpot.learner.schedule import learning_rate_factor
from jackpot.orchestrator.slots import PromptOrder
from jackpot.orchestrator.tasks import Item, build_task
from jackpot.runtime.models import hidden_states, load_causal_lm, output_head


@dataclass(frozen=True)
class Sampled:
    """Completions. B rows of P prompt tokens (padded on the left) and up to T completion tokens; N tokens in all."""

    tokens: Tensor  # [B, P + T] int64
    attention: Tensor  # [B, P + T] int64, 1 where there is a token
    is_completion: Tensor  # [B, T] bool
    actor_logprobs: Tensor  # [B, T], log p_inf of the sampled token
    topk_ids: Tensor  # [B, T, k]
    topk_logprobs: Tensor  # [B, T, k], log p_inf

    @property
    def width(self) -> int:
        """T."""
        return self.is_completion.shape[1]


@dataclass(frozen=True)
class Scored:
    """What training needs of each completion token, [N] each."""

    ids: Tensor
    row: Tensor  # which of the B rows the token belongs to
    actor_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    mask: Tensor

    def of_rows(self, start: int, stop: int) -> Scored:
        """The tokens of rows [start, stop)."""
        index = (self.row >= start) & (self.row < stop)
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})


class SingleProcess:
    """All parts of a job, taking turns.

    Args:
        job: the job; its correction's target must be the reference and its normalizer ``tail``.
        staleness: how many batches old the weights are that sample.
        scorer_staleness: how many batches old those are that score, at most as old as the former.
    """

    def __init__(self, job: JobSpec, staleness: int, scorer_staleness: int) -> None:
        torch.manual_seed(job.seed)
        self.job = job
        self.task = build_task(job.task, job.seed)
        if self.task.num_prompts is None:
            raise ConfigError("task.name", job.task.name, "never ends", "This loop needs a task with a number.")
        self.order = PromptOrder(self.task.num_prompts, job.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(_directory(job.policy.model))
        self.policy = _load(job.policy.model, job.policy.dtype)
        self.actor = self.policy if isinstance(job.actor, str) else _load(job.actor.model, job.actor.dtype)
        self.actor_learns = not isinstance(job.actor, str) and job.actor.train
        self.optimizers = {self.policy: _optimizer(self.policy, job.learner.lr, job)}
        if self.actor_learns:
            assert not isinstance(job.actor, str)
            self.optimizers[self.actor] = _optimizer(self.actor, job.learner.actor_lr or job.learner.lr, job)
        self.step = 0
        self.batch_index = 0
        self.scorer_staleness = scorer_staleness
        # Past weights, the newest last.
        self.snapshots = deque([self._snapshot()] * (staleness + 1), maxlen=staleness + 1)

    def _snapshot(self) -> tuple[Any, Any]:
        policy = copy.deepcopy(self.policy)
        return policy, policy if self.actor is self.policy else copy.deepcopy(self.actor)

    def train_batch(self) -> dict[str, float]:
        """Sample, score and train on one batch of groups."""
        groups, size = self.job.learner.groups_per_batch, self.job.sampling.group_size
        first = self.batch_index * groups
        items: list[Item] = []
        for position in range(first, first + groups):
            items += [self.task.train_prompt(self.order.prompt(position)[1])] * size
        actor, policy = self.snapshots[0][1], self.snapshots[-1 - self.scorer_staleness][0]
        sampled = self.generate(actor, items, self.job.sampling.temperature)
        rewards = self.rewards(sampled, items)
        scored, report = self.score(policy, sampled, rewards)
        rows = len(items) // self.job.learner.updates_per_batch
        references = self._actor_references(sampled, rows)
        for start, reference in zip(range(0, len(items), rows), references, strict=True):
            self._update(_rows(sampled, start, start + rows), scored.of_rows(start, start + rows), reference)
        self.batch_index += 1
        self.snapshots.append(self._snapshot())
        return {"reward": rewards.mean().item(), **report}

    @torch.no_grad()
    def generate(self, model: Any, items: Sequence[Item], temperature: float) -> Sampled:
        """One completion per item, sampled with a KV cache."""
        tokens, attention = self._encode(items)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        width, cache, new_tokens = tokens.shape[1], DynamicCache(), tokens
        alive = torch.ones(len(items), dtype=torch.bool)
        rows, is_completion = [], []
        for _ in range(self.job.sampling.max_tokens):
            positions = _positions(attention)[:, -new_tokens.shape[1] :]
            logits = model(
                input_ids=new_tokens, attention_mask=attention, position_ids=positions, past_key_values=cache
            ).logits[:, -1]
            rows.append(torch.log_softmax(logits.float() / temperature, dim=-1))
            new_tokens = torch.where(alive[:, None], torch.multinomial(rows[-1].exp(), 1), pad)
            is_completion.append(alive)
            tokens = torch.cat([tokens, new_tokens], 1)
            attention = torch.cat([attention, alive[:, None].long()], 1)
            alive = alive & (new_tokens[:, 0] != eos)
            if not alive.any():
                break
        logprobs = torch.stack(rows, 1)
        topk = logprobs.topk(min(self.job.rollout.top_logprobs, logprobs.shape[-1]))
        return Sampled(
            tokens=tokens,
            attention=attention,
            is_completion=torch.stack(is_completion, 1),
            actor_logprobs=logprobs.gather(2, tokens[:, width:, None])[..., 0],
            topk_ids=topk.indices,
            topk_logprobs=topk.values,
        )

    def rewards(self, sampled: Sampled, items: Sequence[Item]) -> Tensor:
        """The reward of each completion: [B]."""
        texts = self.tokenizer.batch_decode(sampled.tokens[:, -sampled.width :], skip_special_tokens=True)
        return torch.tensor([self.task.reward(item, text) for item, text in zip(items, texts, strict=True)])

    @torch.no_grad()
    def score(self, policy: Any, sampled: Sampled, rewards: Tensor) -> tuple[Scored, dict[str, float]]:
        """What the target policy says, and the weights that the job's correction makes of it."""
        normalize = self.job.algorithm.advantage.normalize_std
        advantages = group_advantages(rewards.view(-1, self.job.sampling.group_size), normalize_std=normalize)
        row = sampled.is_completion.nonzero()[:, 0]
        ids = sampled.tokens[:, -sampled.width :][sampled.is_completion]
        actor_logprobs = sampled.actor_logprobs[sampled.is_completion]
        wanted = torch.cat([ids[:, None], sampled.topk_ids[sampled.is_completion]], 1)
        correction = self.job.algorithm.correction
        top_k = correction.top_k if isinstance(correction, JackpotCorrection) else 0
        found = token_logprobs(
            self._hidden(policy, sampled), output_head(policy), wanted, temperature=self._temperature, top_k=top_k
        )
        reference = found.logprobs[:, 0]
        report = {"kl": (actor_logprobs - reference).mean().item(), "acceptance": 1.0}
        if isinstance(correction, JackpotCorrection):
            weights, mask, report["acceptance"] = self._obrs(correction, sampled, actor_logprobs, found, row)
        else:
            weights, mask = _plain_weights(correction, reference, actor_logprobs, row), torch.ones_like(reference)
        return Scored(ids, row, actor_logprobs, reference, advantages.flatten()[row], weights, mask), report

    def _obrs(
        self,
        correction: JackpotCorrection,
        sampled: Sampled,
        actor_logprobs: Tensor,
        found: VocabularyScores,
        row: Tensor,
    ) -> tuple[Tensor, Tensor, float]:
        obrs_lambda, reference = correction.initial_lambda, found.logprobs[:, 0]
        accept = acceptance_probs(reference, actor_logprobs, obrs_lambda)
        assert found.topk_ids is not None and found.topk_logprobs is not None
        candidates = Candidates(
            actor_ids=sampled.topk_ids[sampled.is_completion],
            actor_logprobs=sampled.topk_logprobs[sampled.is_completion],
            target_logprobs_on_actor=found.logprobs[:, 1:],
            target_ids=found.topk_ids,
            target_logprobs=found.topk_logprobs,
        )
        parts = tail_normalizer(candidates, obrs_lambda)
        normalizer = normalizer_from(parts.head, parts.tail, "tail", mean_acceptance(accept))
        weights = jackpot_weights(
            reference, actor_logprobs, normalizer.value, obrs_lambda=obrs_lambda, c1=correction.c1
        ).value
        if correction.mask == "expected":
            return weights, accept, mean_acceptance(accept)
        lengths = torch.bincount(row, minlength=len(sampled.tokens)).tolist()
        names = (f"{self.batch_index}#{index}" for index in range(len(lengths)))
        uniforms = [acceptance_uniforms(self.job.seed, name, n) for name, n in zip(names, lengths, strict=True)]
        return weights, acceptance_mask(accept, torch.cat(uniforms)).float(), mean_acceptance(accept)

    @torch.no_grad()
    def _actor_references(self, sampled: Sampled, rows: int) -> list[Tensor | None]:
        """log p_ω,ref for each update; None where it is the actor's own, detached."""
        starts = range(0, len(sampled.tokens), rows)
        if len(starts) == 1 or not self.actor_learns:
            return [None] * len(starts)
        parts = [_rows(sampled, start, start + rows) for start in starts]
        return [self._logprobs(self._hidden(self.actor, part), self.actor, _ids(part)) for part in parts]

    def _update(self, sampled: Sampled, scored: Scored, actor_reference: Tensor | None) -> None:
        """One optimizer step of L = L_ppo_obrs(θ) + L_ppo(ω) + λ_distill · L_distill(ω)."""
        algorithm, learner = self.job.algorithm, self.job.learner
        low, high = algorithm.clip_low, algorithm.clip_high
        policy_hidden = self._hidden(self.policy, sampled)
        logprobs = self._logprobs(policy_hidden, self.policy, scored.ids)
        sums = policy_loss_sum(
            logprobs,
            scored.reference_logprobs,
            scored.advantages,
            scored.weights,
            scored.mask,
            clip_low=low,
            clip_high=high,
        )
        loss = sums.loss_sum / token_denominator(scored.mask, algorithm.denominator)
        if self.actor_learns:
            hidden, head = self._hidden(self.actor, sampled), output_head(self.actor)
            divergence = forward_kl(
                policy_hidden.detach(), output_head(self.policy), hidden, head, temperature=self._temperature
            )
            loss = loss + algorithm.distillation.weight * divergence.mean()
            if algorithm.actor_ppo:
                own = self._logprobs(hidden, self.actor, scored.ids)
                old = own.detach() if actor_reference is None else actor_reference
                sums = actor_loss_sum(
                    own,
                    old,
                    scored.actor_logprobs,
                    scored.advantages,
                    cap=algorithm.actor_cap,
                    clip_low=low,
                    clip_high=high,
                )
                loss = loss + sums.loss_sum / len(own)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        factor = learning_rate_factor(learner.schedule, self.step, learner.steps)
        for model, optimizer in self.optimizers.items():
            torch.nn.utils.clip_grad_norm_(model.parameters(), learner.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
            optimizer.step()
        self.step += 1

    def evaluate(self) -> float:
        """Accuracy of the policy's own samples on the held-out prompts."""
        items = self.task.eval_items(self.job.evaluation.prompts)
        return self.rewards(self.generate(self.policy, items, self.job.evaluation.temperature), items).mean().item()

    @property
    def _temperature(self) -> float:
        return self.job.sampling.temperature

    def _hidden(self, model: Any, sampled: Sampled) -> Tensor:
        """The states that predict the completion tokens: [N, H]."""
        attention = sampled.attention
        hidden = hidden_states(model, sampled.tokens, attention, _positions(attention))
        return hidden[:, -sampled.width - 1 : -1][sampled.is_completion]

    def _logprobs(self, hidden: Tensor, model: Any, ids: Tensor) -> Tensor:
        return differentiable_token_logprobs(hidden, output_head(model), ids, temperature=self._temperature).logprobs

    def _encode(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        encoded = [self.tokenizer(item.prompt)["input_ids"] for item in items]
        width, pad = max(map(len, encoded)), self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded])
        return tokens, torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])


def run(job: JobSpec, staleness: int, scorer_staleness: int, *, quiet: bool = False) -> dict[str, Any]:
    """Train the job and return the accuracy curve of the policy and the throughput."""
    loop = SingleProcess(job, staleness, scorer_staleness)
    curve = [(0, loop.evaluate())]
    seconds, completions = 0.0, job.learner.groups_per_batch * job.sampling.group_size
    if not quiet:
        print(f"step    0  policy accuracy {curve[0][1]:.3f}", flush=True)
    for batch in range(1, job.num_batches + 1):
        start = time.perf_counter()
        report = loop.train_batch()
        seconds += time.perf_counter() - start
        if loop.step % job.evaluation.every == 0 or batch == job.num_batches:
            curve.append((loop.step, loop.evaluate()))
            if not quiet:
                numbers = "  ".join(f"{name} {value:.3f}" for name, value in report.items())
                rate = f"{batch * completions / seconds:.0f} samples/s"
                print(f"step {loop.step:4d}  policy accuracy {curve[-1][1]:.3f}  {numbers}  {rate}", flush=True)
    areas = [(b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(curve)]
    return {
        "curve": curve,
        "final_accuracy": curve[-1][1],
        "area_under_curve": sum(areas) / curve[-1][0],
        "samples_per_second": job.num_batches * completions / seconds,
        "train_seconds": seconds,
    }


def _rows(sampled: Sampled, start: int, stop: int) -> Sampled:
    return Sampled(**{name: getattr(sampled, name)[start:stop] for name in sampled.__dataclass_fields__})


def _ids(sampled: Sampled) -> Tensor:
    return sampled.tokens[:, -sampled.width :][sampled.is_completion]


def _positions(attention: Tensor) -> Tensor:
    return (attention.cumsum(1) - 1).clamp(min=0)


def _directory(model: str) -> Path:
    return resolve_builtin(model) if is_builtin(model) else Path(model)


def _load(model: str, dtype: str) -> Any:
    return load_causal_lm(_directory(model), dtype, "cpu")


def _optimizer(model: Any, lr: float, job: JobSpec) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": job.learner.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=job.learner.betas)


def _plain_weights(correction: CorrectionConfig, reference: Tensor, actor: Tensor, row: Tensor) -> Tensor:
    """F of a correction without rejection: [N]."""
    match correction:
        case IsCorrection(level=level):
            return is_weights(reference, actor, sequence_index=row if level == "sequence" else None).value
        case TisCorrection(cap=cap, level=level):
            return tis_weights(reference, actor, cap=cap, sequence_index=row if level == "sequence" else None).value
        case IcepopCorrection(low=low, high=high):
            return icepop_weights(reference, actor, low=low, high=high).value
        case MisCorrection(cap=cap, low=low):
            return mis_weights(reference, actor, sequence_index=row, cap=cap, low=low).value
        case _:
            return no_weights(reference, actor).value


def _check(job: JobSpec) -> None:
    """Refuse what the services can do and this loop cannot, instead of quietly doing something else."""
    algorithm, correction = job.algorithm, job.algorithm.correction
    settings: dict[str, tuple[object, object]] = {
        "algorithm.advantage.name": (algorithm.advantage.name, "grpo"),
        "algorithm.loss_normalization": (algorithm.loss_normalization, "token"),
        "algorithm.kl_penalty.weight": (algorithm.kl_penalty.weight, 0.0),
        "algorithm.distillation.kl_target": (algorithm.distillation.kl_target, None),
    }
    if isinstance(correction, JackpotCorrection):
        settings["algorithm.correction.target"] = (correction.target, "reference")
        settings["algorithm.correction.normalizer"] = (correction.normalizer, "tail")
        settings["algorithm.correction.acceptance_rate"] = (correction.acceptance_rate, None)
    for field, (value, known) in settings.items():
        if value != known:
            raise ConfigError(field, value, "is not in this loop", f"Leave it at {known!r}, or use `jackpot run`.")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings, e.g. algorithm.correction=tis seed=3")
    parser.add_argument("--staleness", type=int, help="batches that sampling is ahead; default: the job's maximum")
    parser.add_argument("--scorer-staleness", type=int, help="the same of scoring; default: that of sampling")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--json", type=Path, help="append the result to this file, one JSON object a line")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    job = load_job(options.job, options.overrides)
    _check(job)
    for recipe in builtin_models_missing(job):
        from jackpot.demo.warmup import make_models

        make_models(RECIPES[recipe], cache_root())
    staleness = job.orchestrator.max_staleness if options.staleness is None else options.staleness
    scorer_staleness = staleness if options.scorer_staleness is None else options.scorer_staleness
    if not 0 <= scorer_staleness <= staleness:
        parser.error("scoring is at most as stale as sampling")
    result = run(job, staleness, scorer_staleness)
    print(
        f"final accuracy {result['final_accuracy']:.3f}  area under the curve {result['area_under_curve']:.3f}  "
        f"{result['samples_per_second']:.0f} samples/s  {result['train_seconds']:.1f} s"
    )
    if options.json is not None:
        row = {"overrides": options.overrides, "staleness": staleness, "scorer_staleness": scorer_staleness, **result}
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
