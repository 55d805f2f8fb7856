"""Groups cut to what a sequence may have, and batches split into the parts of their optimizer steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bus_world import make_group, make_scored

from jackpot.algorithm.advantages import ADVANTAGES
from jackpot.bus.payload_format import encode_scored
from jackpot.scoring.batch import build_batch, cut_group
from jackpot.trajectory import EXACT_KL, ScoredGroup, VersionSpan

PROMPT = 4  # tokens


@pytest.fixture
def scored() -> ScoredGroup:
    """Completions of 6 and 7 tokens; the first two are by version 3, the others by version 4."""
    group = make_group("job-1")
    return make_scored(replace(group, metadata={"task": "complement", EXACT_KL: [1.0, 0.5]}))


@pytest.mark.parametrize(
    ("max_tokens", "keep", "spans"),
    [
        (PROMPT + 3, 3, (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3))),
        (PROMPT + 2, 2, (VersionSpan(3, 0, 2),)),
        (PROMPT, 1, (VersionSpan(3, 0, 1),)),  # the first token in any case
    ],
)
def test_everything_of_a_token_goes_with_it(
    scored: ScoredGroup, max_tokens: int, keep: int, spans: tuple[VersionSpan, ...]
) -> None:
    cut = cut_group(scored, max_tokens)
    encode_scored(cut)  # refuses arrays and spans that do not fit each other
    for before, after in zip(scored.group.trajectories, cut.group.trajectories, strict=True):
        assert after.version_spans == spans
        assert (after.reward, after.finish_reason) == (before.reward, before.finish_reason)
        for name in ("token_ids", "actor_logprobs", "topk_ids", "topk_logprobs"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[:keep])
    for before, after in zip(scored.scores, cut.scores, strict=True):
        np.testing.assert_array_equal(after.mask, before.mask[:keep])
        np.testing.assert_array_equal(after.normalizer_tail, before.normalizer_tail[:keep])
    assert cut.group.metadata == {"task": "complement"}  # the divergences were sums over all tokens


def test_a_group_that_fits_stays_as_it_is(scored: ScoredGroup) -> None:
    assert cut_group(scored, PROMPT + 7) is scored


def test_each_part_of_a_split_batch_counts_its_own_tokens_and_sequences() -> None:
    groups = []
    for slot in range(4):
        group = make_group("job-1", slot, tokens=3 + slot)
        rewarded = tuple(replace(t, reward=float(index)) for index, t in enumerate(group.trajectories))
        groups.append(make_scored(replace(group, trajectories=rewarded)))
    batch = build_batch(groups, ADVANTAGES["grpo"]())
    parts = batch.split(2)
    assert [part.group_ids for part in parts] == [batch.group_ids[:2], batch.group_ids[2:]]
    np.testing.assert_array_equal(np.concatenate([part.tokens.token_ids for part in parts]), batch.tokens.token_ids)
    for part in parts:
        assert part.group_starts == (0, 2)
        assert part.sequences[0].start == 0 and part.sequences[-1].end == part.num_tokens
        for number, sequence in enumerate(part.sequences):
            own = slice(sequence.start, sequence.end)
            assert set(part.tokens.sequence_index[own].tolist()) == {number}
            np.testing.assert_array_equal(part.tokens.token_ids[own], sequence.input_ids[sequence.prompt_length :])
