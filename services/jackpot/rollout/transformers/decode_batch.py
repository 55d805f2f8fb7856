"""Trajectories decoded together, one token each per step. Rows join, leave and change weights between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.output_head import exact_logits
from jackpot.compute.batching import length_buckets
from jackpot.compute.models import output_head
from jackpot.rollout.engine import GroupRequest
from jackpot.rollout.transformers.kv_cache import RowCache, cached_pass, prefill, upload
from jackpot.rollout.transformers.rows import Row, RowTensors
from jackpot.rollout.transformers.sampling import draw_tokens
from jackpot.trajectory import Trajectory, VersionSpan

# Tokens of one prefill pass. Splitting longer prefills bounds the memory of activations.
PREFILL_TOKENS = 8192


class DecodeBatch:
    """The rows being decoded by one model. Not thread-safe; call inside ``torch.inference_mode()``.

    The invariant between steps: the cache holds all tokens of a row but the last, which is the next input. Joining,
    and starting over after a weight swap, are therefore the same thing: a prefill of all tokens but the last.

    Args:
        model: from ``load_causal_lm``.
        eos_ids: tokens that end every trajectory.
    """

    def __init__(self, model: PreTrainedModel, eos_ids: Sequence[int]) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._head = output_head(model)
        self._eos_ids = tuple(eos_ids)
        self._state: RowTensors | None = None
        self._cache: RowCache | None = None
        self._any_greedy = False
        # A row's token count follows from when it joined, so that the device need not be synchronized.
        self._steps = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows that have sampled no token yet. Adjacent siblings share one prefill."""
        cache, places = self._prefill(rows)
        _arrange(cache, places)
        for row in rows:
            row.joined = self._steps
        state = RowTensors.start(rows, self._eos_ids, self._model.device)
        if self._state is None or self._cache is None:
            self._state, self._cache = state, cache
        else:
            self._state.join(state)
            self._cache.join(cache)
        self.rows.extend(rows)
        self._any_greedy = any(row.request.sampling.temperature == 0 for row in self.rows)

    def step(self) -> list[tuple[Row, Trajectory]]:
        """Sample one token for every row; removes and returns the trajectories that it finishes."""
        if self._state is None or self._cache is None:
            return []
        state = self._state
        if self._steps - min(row.joined for row in self.rows) == state.columns:
            state.grow()
        logits = self._forward(state, self._cache)
        uniforms = state.uniforms.gather(1, state.counts[:, None])[:, 0]
        drawn = draw_tokens(logits, state.temperatures, uniforms, state.top_k, self._any_greedy)
        ended = state.record(drawn)
        self._steps += 1
        # The only synchronization with the device in a step.
        done = [place for place, has_ended in enumerate(ended.tolist()) if has_ended]
        if not done:
            return []
        pairs = list(zip((self.rows[place] for place in done), self._harvest(state, done), strict=True))
        left = set(done)
        self._keep([place for place in range(len(self.rows)) if place not in left])
        return pairs

    def drop(self, requests: Collection[GroupRequest]) -> None:
        """Remove the rows of these requests."""
        self._keep([place for place, row in enumerate(self.rows) if row.request not in requests])

    def clear(self) -> None:
        """Remove all rows."""
        self._keep([])

    def change_version(self, version: int) -> None:
        """The model has new weights: recompute the keys and values of all rows."""
        if self._state is None:
            return
        sampled = self._state.token_ids.cpu().numpy()
        continuations = []
        for row, tokens in zip(self.rows, sampled, strict=True):
            count = self._steps - row.joined
            if row.versions[-1][1] == count:
                row.versions.pop()  # it has sampled no token
            row.versions.append((version, count))
            continuations.append(np.concatenate([row.request.prompt_token_ids[-1:], tokens[:count]])[:-1])
        self._cache = None  # freed before the new one is allocated: both may not fit
        self._cache = self._extended(*self._prefill(self.rows), continuations)

    def _prefill(self, rows: Sequence[Row]) -> tuple[RowCache, list[int]]:
        """Keys and values of all prompts without their last token, and each row's index among these prompts.

        Adjacent siblings share one prompt.
        """
        prompts: list[NDArray[np.uint32]] = []
        prompt_of_row: list[int] = []
        for place, row in enumerate(rows):
            if place == 0 or row.request is not rows[place - 1].request:
                prompts.append(row.request.prompt_token_ids[:-1])
            prompt_of_row.append(len(prompts) - 1)
        buckets = length_buckets([len(prompt) for prompt in prompts], PREFILL_TOKENS)
        cache = _joined(prefill(self._model, [prompts[index] for index in bucket]) for bucket in buckets)
        place_of = _places(buckets)
        return cache, [place_of[index] for index in prompt_of_row]

    def _extended(self, prompts: RowCache, places: list[int], continuations: Sequence[NDArray[Any]]) -> RowCache:
        """Each row's prompt, found by its index in ``prompts``, followed by the row's sampled tokens."""

        def extended(rows: list[int]) -> RowCache:
            part = prompts.taken([places[row] for row in rows])
            part.extend(self._model, [continuations[row] for row in rows], PREFILL_TOKENS)
            return part

        buckets = length_buckets([len(tokens) for tokens in continuations], PREFILL_TOKENS)
        cache = _joined(map(extended, buckets))
        place_of = _places(buckets)
        _arrange(cache, [place_of[row] for row in range(len(continuations))])
        return cache

    def _forward(self, state: RowTensors, cache: RowCache) -> Tensor:
        states = cached_pass(
            self._model,
            cache.past,
            input_ids=state.next_inputs[:, None],
            position_ids=state.positions[:, None],
            attention_mask=cache.mask(1),
        )
        cache.length += 1
        return exact_logits(self._head, states[:, -1])

    def _harvest(self, state: RowTensors, finished: list[int]) -> list[Trajectory]:
        """The trajectories of these rows, copied to numpy in one transfer."""
        index = upload(np.array(finished, dtype=np.int64), self._model.device)
        tokens = state.token_ids[index].cpu().numpy().astype(np.uint32)
        logprobs = state.logprobs[index].cpu().numpy()
        topk_ids = state.topk_ids[index].cpu().numpy().astype(np.uint32)
        topk_logprobs = state.topk_logprobs[index].cpu().numpy()
        trajectories = []
        for place, row in enumerate(self.rows[place] for place in finished):
            count, sampling = self._steps - row.joined, row.request.sampling
            top_k = sampling.top_logprobs
            last = int(tokens[place, count - 1])
            trajectories.append(
                Trajectory(
                    trajectory_id=f"{row.request.group_id}#{row.index}",
                    token_ids=tokens[place, :count].copy(),
                    actor_logprobs=logprobs[place, :count].copy(),
                    topk_ids=topk_ids[place, :count, :top_k].copy() if top_k else None,
                    topk_logprobs=topk_logprobs[place, :count, :top_k].copy() if top_k else None,
                    version_spans=_spans(row.versions, count),
                    finish_reason="stop" if last in self._eos_ids or last in sampling.stop_token_ids else "length",
                )
            )
        return trajectories

    def _keep(self, places: list[int]) -> None:
        if not places:
            self.rows, self._state, self._cache = [], None, None
        elif len(places) < len(self.rows) and self._state is not None and self._cache is not None:
            self._state.select(upload(np.array(places, dtype=np.int64), self._model.device))
            self._cache.select(places)
            self.rows = [self.rows[place] for place in places]
        self._any_greedy = any(row.request.sampling.temperature == 0 for row in self.rows)


@torch.inference_mode()
def generate(
    model: PreTrainedModel, requests: Sequence[GroupRequest], version: int, max_rows: int
) -> list[list[Trajectory]]:
    """Sample groups to their ends; the trajectories of each request, in order.

    Args:
        model: what samples, from ``load_causal_lm``.
        requests: the groups.
        version: the weight version stamped on every token.
        max_rows: how many trajectories are decoded concurrently, whole groups at a time.
    """
    trajectories: dict[str, Trajectory] = {}
    batch = DecodeBatch(model, eos_token_ids(model))
    waiting = deque(requests)
    while waiting or batch.rows:
        joining: list[Row] = []
        while waiting and (
            not batch.rows + joining or len(batch.rows) + len(joining) + waiting[0].num_trajectories <= max_rows
        ):
            request = waiting.popleft()
            joining += [Row(request, index, [(version, 0)]) for index in range(request.num_trajectories)]
        if joining:
            batch.add(joining)
        trajectories.update((trajectory.trajectory_id, trajectory) for _, trajectory in batch.step())
    return [[trajectories[f"{r.group_id}#{index}"] for index in range(r.num_trajectories)] for r in requests]


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a completion, from generation_config.json or else config.json."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    return ()


def _joined(parts: Iterable[RowCache]) -> RowCache:
    first, *others = parts
    for other in others:
        first.join(other)
    return first


def _places(buckets: Sequence[Sequence[int]]) -> dict[int, int]:
    """Each index's position once the buckets are concatenated."""
    return {index: place for place, index in enumerate(chain.from_iterable(buckets))}


def _arrange(cache: RowCache, places: list[int]) -> None:
    """Keep the rows at these positions, in this order."""
    if places != list(range(len(cache.pads))):
        cache.select(places)


def _spans(versions: Sequence[tuple[int, int]], num_tokens: int) -> tuple[VersionSpan, ...]:
    ends = [start for _, start in versions[1:]] + [num_tokens]
    return tuple(VersionSpan(version, start, end) for (version, start), end in zip(versions, ends, strict=True))
