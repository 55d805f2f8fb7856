"""Pacing and the order of prompts: staleness is bounded, every batch fills, nothing is skipped or asked twice."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from jackpot.orchestrator.slots import Pacing, PromptOrder, SlotBook
from jackpot.trajectory import GroupKey


def book(num_batches=3, groups=4, updates=1, staleness=1, num_prompts=10) -> SlotBook:
    return SlotBook(num_batches * groups, Pacing(groups, updates, staleness), PromptOrder(num_prompts, seed=7))


def take_all(slots: SlotBook, version: int) -> list[GroupKey]:
    keys = []
    while (key := slots.take_next(version)) is not None:
        keys.append(key)
    return keys


def test_a_slot_is_due_once_the_oldest_allowed_version_is_there():
    pacing = Pacing(groups_per_batch=16, updates_per_batch=4, max_staleness=6)
    assert [pacing.start_step(slot) for slot in (0, 15, 16, 47)] == [0, 0, 4, 8]
    assert [pacing.min_version(slot) for slot in (0, 16, 32, 48)] == [0, 0, 2, 6]
    assert [pacing.first_slot(step) for step in (0, 1, 4, 5, 8)] == [0, 16, 16, 32, 32]


def test_synchronous_dispatch_waits_for_each_batch():
    slots = book(staleness=0)
    assert take_all(slots, -1) == []
    assert [key.slot for key in take_all(slots, 0)] == [0, 1, 2, 3]
    assert take_all(slots, 0) == []
    assert [key.slot for key in take_all(slots, 1)] == [4, 5, 6, 7]


def test_a_staleness_of_one_runs_one_batch_ahead():
    slots = book(staleness=1)
    assert [key.slot for key in take_all(slots, 0)] == list(range(8))
    assert [key.slot for key in take_all(slots, 1)] == list(range(8, 12))
    assert take_all(slots, 100) == []


def test_slots_can_be_kept_back():
    slots = book(staleness=1)
    assert [slots.take_next(0, 3).slot for _ in range(3)] == [0, 1, 2]
    assert slots.take_next(0, 3) is None
    assert slots.take_next(0).slot == 3


def test_a_dropped_group_gives_its_slot_to_another_prompt():
    slots = book(staleness=0)
    first = take_all(slots, 0)
    slots.close(first[1], "dropped", "rollout_failed")
    slots.close(first[1], "dropped", "rollout_failed")  # told twice
    order = PromptOrder(10, seed=7)
    (again,) = take_all(slots, 0)
    assert again == GroupKey(1, *order.prompt(1, attempt=1), attempt=1)
    assert (again.epoch, again.prompt_index) != (first[1].epoch, first[1].prompt_index)
    assert slots.open_groups == (first[0], first[2], first[3], again)


def test_which_prompt_a_slot_takes_does_not_depend_on_the_order_in_which_groups_end():
    orders = []
    for ending in ([1, 3], [3, 1]):
        slots = book(staleness=0)
        first = take_all(slots, 0)
        for place in ending:
            slots.close(first[place], "dropped", "rollout_failed")
        orders.append(take_all(slots, 0))
    assert orders[0] == orders[1]


def test_each_attempt_has_its_own_permutation_of_the_epoch():
    order = PromptOrder(10, seed=7)
    attempts = [[order.prompt(10 + place, attempt) for place in range(10)] for attempt in range(3)]
    assert all(sorted(index for _, index in prompts) == list(range(10)) for prompts in attempts)
    assert {epoch for prompts in attempts for epoch, _ in prompts} == {1}
    assert attempts[0] != attempts[1] != attempts[2] != attempts[0]


def test_a_group_that_is_put_back_comes_again_in_its_turn():
    slots = book(staleness=1)
    first = take_all(slots, 0)
    slots.put_back(first[6])
    slots.close(first[2], "dropped", "rollout_failed")
    assert [key.slot for key in take_all(slots, 0)] == [2, 6]
    assert first[6] in slots.open_groups


def test_a_lost_group_is_the_same_prompt_again_and_an_unused_one_is_not():
    slots = book(staleness=0)
    first = take_all(slots, 0)
    slots.close(first[2], "dropped", "lost")
    slots.close(first[3], "dropped", "unused")
    assert take_all(slots, 0) == [GroupKey(2, first[2].epoch, first[2].prompt_index, attempt=1)]


def test_every_epoch_has_its_own_permutation():
    order = PromptOrder(10, seed=7)
    prompts = [order.prompt(slot) for slot in range(30)]
    assert [epoch for epoch, _ in prompts] == [0] * 10 + [1] * 10 + [2] * 10
    epochs = [[index for epoch, index in prompts if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [PromptOrder(10, seed=8).prompt(n) for n in range(10)] != prompts[:10]


def test_recovery_dispatches_the_slots_that_nobody_holds():
    slots = book(num_prompts=3)
    keys = take_all(slots, 0)  # slots 0 … 7, into the third epoch
    ended = {keys[0]: ("trained", ""), keys[1]: ("dropped", "zero_variance"), keys[2]: ("dropped", "lost")}
    restored = book(num_prompts=3)
    restored.restore(ended, [keys[3], keys[5], keys[7]])  # of slots 4 and 6 nothing is known

    again = take_all(restored, 0)

    order = PromptOrder(3, seed=7)
    assert again == [
        GroupKey(1, *order.prompt(1, attempt=1), attempt=1),
        GroupKey(2, keys[2].epoch, keys[2].prompt_index, attempt=1),
        GroupKey(4, *order.prompt(4)),
        GroupKey(6, *order.prompt(6)),
    ]
    assert restored.num_trained == 1
    assert [key.slot for key in take_all(restored, 1)] == [8, 9, 10, 11]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(1, 12),
    st.integers(0, 2**32),
    st.floats(0, 0.6),
    st.booleans(),
)
def test_staleness_is_bounded_and_every_batch_fills(
    groups_per_update, updates, staleness, num_prompts, seed, drop_rate, restarts
):
    """A learner, replicas in any order, drops and restarts of the orchestrator."""
    chance = random.Random(seed)
    size, num_batches = groups_per_update * updates, 6
    slots = book(num_batches, size, updates, staleness, num_prompts)
    version, batch, in_flight, done, ended = 0, 0, {}, {}, {}
    seen: list[GroupKey] = []
    for _ in range(10_000):
        if batch == num_batches:
            break
        while (key := slots.take_next(version)) is not None:
            seen.append(key)
            in_flight[key] = version
        if not in_flight:
            raise AssertionError("nothing in flight, and the batch is not full")
        key = chance.choice(list(in_flight))
        sampled = in_flight.pop(key)
        if chance.random() < drop_rate:
            ended[key] = ("dropped", "rollout_failed")
            slots.close(key, *ended[key])
        else:
            assert key.slot not in done
            done[key.slot] = (key, sampled)
        while all(slot in done for slot in range(batch * size, (batch + 1) * size)):
            for slot in range(batch * size, (batch + 1) * size):
                key, sampled = done[slot]
                assert 0 <= batch * updates - sampled <= staleness
                ended[key] = ("trained", "")
                slots.close(key, *ended[key])
            batch, version = batch + 1, version + updates
            if batch == num_batches:
                break
        if restarts and chance.random() < 0.1:
            opened = [key for key in seen if key not in ended]
            slots = book(num_batches, size, updates, staleness, num_prompts)
            slots.restore(ended, opened)
    assert batch == num_batches
    assert slots.num_trained == num_batches * size
    assert slots.take_next(version) is None
    assert len(seen) == len(set(seen))
    order = PromptOrder(num_prompts, seed=7)
    assert all((key.epoch, key.prompt_index) == order.prompt(key.slot, key.attempt) for key in seen)
    for slot in range(num_batches * size):  # every attempt of a slot in turn, none left out
        assert [key.attempt for key in seen if key.slot == slot] == list(range(sum(key.slot == slot for key in seen)))
