"""The trajectory bus on a real server, with both payload stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from bus_world import STORES, Job, bus_settings, eventually, ids, make_group, make_scored, plain
from patience import PATIENCE_SECONDS, TEST_SECONDS
from redis.asyncio import Redis

from jackpot.bus import BusDepths, BusReadings, Ledger, TrajectoryBus, reader
from jackpot.bus.payload_format import encode_scored
from jackpot.errors import BusError, BusLostError, ConfigError, LeaseLostError, PayloadError
from jackpot.trajectory import GroupKey, deferred

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(params=STORES)
def job(request: pytest.FixtureRequest, valkey_url: str, tmp_path: Path) -> Job:
    return Job(valkey_url, request.param, tmp_path)


@pytest.fixture
async def bus(job: Job) -> AsyncIterator[TrajectoryBus]:
    async with job.connect() as bus:
        yield bus


# --- one group's way ---


async def test_a_group_travels_from_dispatch_to_trained(job: Job, bus: TrajectoryBus) -> None:
    group = job.group(7)
    assert await bus.reserve(group.group_id, 5000)
    assert await bus.readings.dispatched() == {group.group_id: "dispatched"}
    assert await bus.publish(group) == "published"
    assert await bus.readings.dispatched() == {group.group_id: "published"}
    (taken,) = await bus.take_groups(4, 1.0)
    assert plain(taken.value) == plain(group)
    assert taken.attempt == 1
    scored = make_scored(taken.value)
    await bus.publish_scored(taken, scored)
    assert await bus.readings.dispatched() == {group.group_id: "scored"}
    (ready,) = await bus.take_scored(4, 1.0)
    assert plain(ready.value) == plain(scored)
    assert await bus.commit_trained({group.group_id: 3}) == []
    job.dispatched.add(group.group_id)
    assert await job.assert_closed(bus) == Ledger(dispatched=1, trained=1)
    ((_, record),) = await bus.readings.read_terminal("", 10)
    assert (record.group_id, record.state, record.reason, record.step) == (group.group_id, "trained", "", 3)


async def test_a_deferred_group_goes_straight_to_the_learner(job: Job, bus: TrajectoryBus) -> None:
    scored = deferred(job.group(7), policy_version=5)
    assert await bus.reserve(scored.group_id, 5000)
    assert await bus.publish_deferred(scored) == "published"
    assert await bus.readings.dispatched() == {scored.group_id: "scored"}
    depths = await bus.readings.depths()
    size = len(encode_scored(scored, compress=job.store == "redis"))
    assert depths == BusDepths(0, 0, 1, 0, size, 1 << 20)  # what it takes has replaced the estimate
    assert await bus.take_groups(4, 0.0) == []
    assert plain((await bus.fetch_scored([scored.group_id]))[scored.group_id]) == plain(scored)
    (ready,) = await bus.take_scored(4, 1.0)
    assert plain(ready.value) == plain(scored)
    assert await bus.readings.depths() == BusDepths(0, 0, 0, 1, size, 1 << 20)
    assert await bus.readings.ledger() == Ledger(dispatched=1, trained=0, open=1)
    assert await bus.commit_trained({scored.group_id: 3}) == []
    job.dispatched.add(scored.group_id)
    assert await job.assert_closed(bus) == Ledger(dispatched=1, trained=1)


async def test_depths_follow_the_groups(job: Job, bus: TrajectoryBus) -> None:
    first, _, _ = await job.publish(bus, 0, 1, 2)
    one, _ = await bus.take_groups(2, 1.0)
    await bus.publish_scored(one, make_scored(one.value))
    depths = await bus.readings.depths()
    assert depths == BusDepths(1, 1, 1, 0, depths.bytes_used, 1 << 20)
    await bus.take_scored(2, 1.0)
    assert (await bus.readings.depths()).scored_pending == 1
    await bus.commit_trained({first: 1})
    assert await bus.close_job() == 2
    ledger = await job.assert_closed(bus)
    assert ledger == Ledger(dispatched=3, trained=1, dropped={"unused": 2})


# --- dispatch and budget ---


async def test_dispatch_holds_when_the_budget_is_spent(job: Job) -> None:
    async with job.connect(max_bytes=10_000) as bus:
        first, second, third = (job.group(slot).group_id for slot in range(3))
        assert await bus.reserve(first, 6000)
        assert await bus.reserve(first, 6000)  # again: no second reservation
        assert not await bus.reserve(second, 6000)
        assert second not in await bus.readings.dispatched()
        assert await bus.reserve(third, 6000, urgent=True)
        assert (await bus.readings.depths()).bytes_used == 12_000
        await bus.publish(job.group(0))  # its real size replaces the estimate
        assert 0 < (await bus.readings.depths()).bytes_used - 6000 < 2000
        await bus.drop(third, "rollout_failed")
        assert await bus.reserve(second, 6000)
        await bus.close_job()
        job.dispatched = {first, second, third}
        assert (await job.assert_closed(bus)).dropped == {"rollout_failed": 1, "unused": 2}


async def test_the_budget_may_be_spent_to_the_last_byte(job: Job) -> None:
    async with job.connect(max_bytes=10_000) as bus:
        first, second, third = (job.group(slot).group_id for slot in range(3))
        assert await bus.reserve(first, 6000)
        assert not await bus.reserve(second, 4001)
        assert await bus.reserve(third, 4000)
        assert (await bus.readings.depths()).bytes_used == 10_000


async def test_a_group_larger_than_the_whole_budget_is_a_configuration_error(job: Job) -> None:
    async with job.connect(max_bytes=10_000) as bus:
        with pytest.raises(ConfigError, match=r"bus.max_bytes = 10000: one group may take 10001 bytes"):
            await bus.reserve(job.group(0).group_id, 10_001)


async def test_ended_groups_cannot_be_dispatched_again(job: Job, bus: TrajectoryBus) -> None:
    (group_id,) = await job.publish(bus, 0)
    await bus.drop(group_id, "stale")
    with pytest.raises(BusError, match=r"it has ended already \(dropped:stale\)"):
        await bus.reserve(group_id, 100)


@pytest.mark.parametrize("group_id", ["nonsense", "other-job.s0.e0.p0.a0", "../x.s0.e0.p0.a0"])
async def test_ids_of_other_jobs_are_refused(bus: TrajectoryBus, group_id: str) -> None:
    stray = deferred(replace(make_group("other-job"), group_id=group_id), 5)
    for call in (bus.reserve(group_id, 100), bus.drop(group_id, "stale"), bus.publish_deferred(stray)):
        with pytest.raises(BusError, match=r"not a group id|does not belong to job"):
            await call


async def test_publishing_twice_is_recognised(job: Job, bus: TrajectoryBus) -> None:
    (group_id,) = await job.publish(bus, 0)
    assert await bus.publish(job.group(0)) == "duplicate"
    (delivery,) = await bus.take_groups(1, 1.0)
    assert await bus.publish(job.group(0)) == "duplicate"
    await bus.publish_scored(delivery, make_scored(delivery.value))
    assert await bus.publish(job.group(0)) == "duplicate"
    await bus.commit_trained({group_id: 1})
    assert await bus.publish(job.group(0)) == "terminal"
    await job.assert_closed(bus)


async def test_publishing_a_deferred_group_twice_is_recognised(job: Job, bus: TrajectoryBus) -> None:
    (group_id,) = await job.publish_deferred(bus, 0)
    held = (await bus.readings.depths()).bytes_used
    again = deferred(job.group(0), policy_version=6)
    assert await bus.publish_deferred(again) == "duplicate"
    assert await bus.publish(job.group(0)) == "duplicate"
    assert await bus.reserve(group_id, 5000)  # again: no second reservation
    (delivery,) = await bus.take_scored(4, 1.0)
    assert delivery.value.policy_version == 5  # the first counts
    assert await bus.publish_deferred(again) == "duplicate"
    depths = await bus.readings.depths()
    assert (depths.scored_waiting, depths.scored_pending, depths.bytes_used) == (0, 1, held)
    assert await bus.readings.ledger() == Ledger(dispatched=1, trained=0, open=1)
    await bus.commit_trained({group_id: 1})
    assert await bus.publish_deferred(again) == "terminal"
    assert await job.assert_closed(bus) == Ledger(dispatched=1, trained=1)


async def test_a_deferred_group_that_was_dropped_stays_so(job: Job, bus: TrajectoryBus) -> None:
    waiting, dispatched = (job.group(slot) for slot in range(2))
    await job.publish_deferred(bus, 0)
    await bus.drop(waiting.group_id, "unused")
    assert await bus.reserve(dispatched.group_id, 5000)
    await bus.drop(dispatched.group_id, "unused")
    for group in (waiting, dispatched):
        assert await bus.publish_deferred(deferred(group, 5)) == "terminal"
    assert await bus.take_scored(4, 0.0) == []
    job.dispatched.add(dispatched.group_id)
    assert await job.assert_closed(bus) == Ledger(dispatched=2, trained=0, dropped={"unused": 2})


async def test_deferred_groups_count_against_the_budget(job: Job) -> None:
    async with job.connect(max_bytes=10_000) as bus:
        first, second = (job.group(slot).group_id for slot in range(2))
        assert await bus.reserve(first, 6000)
        assert not await bus.reserve(second, 6000)
        await bus.publish_deferred(deferred(job.group(0), 5))
        assert 0 < (await bus.readings.depths()).bytes_used < 2000
        assert await bus.reserve(second, 6000)
        assert await bus.close_job() == 2
        job.dispatched = {first, second}
        await job.assert_closed(bus)


@pytest.mark.parametrize("straight", [False, True], ids=["to the scorers", "to the learner"])
async def test_a_group_that_the_server_forgot_is_registered_when_published(
    job: Job, bus: TrajectoryBus, straight: bool
) -> None:
    group = job.group(0)
    outcome = await bus.publish_deferred(deferred(group, 5)) if straight else await bus.publish(group)
    assert outcome == "published"
    job.dispatched.add(group.group_id)
    assert (await bus.readings.ledger()) == Ledger(dispatched=1, trained=0, open=1)
    await bus.close_job()
    await job.assert_closed(bus)


async def test_groups_too_large_are_refused_at_the_producer(job: Job) -> None:
    async with job.connect(max_payload_bytes=100) as bus:
        for call in (bus.publish(job.group(0)), bus.publish_deferred(deferred(job.group(0), 5))):
            with pytest.raises(PayloadError, match=r"Raise bus.max_payload_bytes"):
                await call


# --- endings ---


async def test_every_group_ends_once(job: Job, bus: TrajectoryBus) -> None:
    trained, stale = await job.publish_scored(bus, 0, 1)
    await bus.take_scored(2, 1.0)
    await bus.drop(stale, "stale", "too old")
    assert await bus.commit_trained({trained: 4, stale: 4}) == [stale]
    await bus.drop(trained, "unused")
    assert await bus.commit_trained({trained: 5}) == []
    assert await bus.readings.terminal_states([trained, stale, "none"]) == {trained: "trained", stale: "dropped:stale"}
    ledger = await job.assert_closed(bus)
    assert ledger == Ledger(dispatched=2, trained=1, dropped={"stale": 1})


async def test_unknown_groups_that_end_are_entered_in_the_ledger(job: Job, bus: TrajectoryBus) -> None:
    """So that the ledger can be rebuilt from its mirror after the server lost everything."""
    lost, trained = (job.group(slot).group_id for slot in range(2))
    await bus.drop(lost, "lost")
    await bus.commit_trained({trained: 2})
    job.dispatched = {lost, trained}
    assert await job.assert_closed(bus) == Ledger(dispatched=2, trained=1, dropped={"lost": 1})


async def test_a_dropped_group_is_never_delivered(job: Job, bus: TrajectoryBus) -> None:
    waiting, taken, kept = await job.publish(bus, 0, 1, 2)
    await bus.drop(waiting, "stale")
    (delivery,) = await bus.take_groups(1, 1.0)
    assert delivery.group_id == taken
    await bus.drop(taken, "stale")
    with pytest.raises(LeaseLostError, match="taken over or has ended"):
        await bus.publish_scored(delivery, make_scored(delivery.value))
    assert ids(await bus.take_groups(4, 1.0)) == [kept]


async def test_the_ledger_is_read_on_from_any_position(job: Job, bus: TrajectoryBus) -> None:
    group_ids = await job.publish(bus, *range(5))
    for group_id in group_ids:
        await bus.drop(group_id, "stale", f"detail of {group_id}")
    read: list[str] = []
    position = ""
    while page := await bus.readings.read_terminal(position, 2):
        position = page[-1][0]
        read += [record.group_id for _, record in page]
        assert all(r.detail == f"detail of {r.group_id}" and (r.reason, r.step) == ("stale", -1) for _, r in page)
    assert read == group_ids


async def test_small_values_are_kept(bus: TrajectoryBus) -> None:
    assert await bus.readings.get_value("cursor") is None
    await bus.set_value("cursor", "12")
    assert await bus.readings.get_value("cursor") == "12"


# --- scorers ---


async def test_taking_waits_for_what_is_published_meanwhile(job: Job, bus: TrajectoryBus) -> None:
    taking = asyncio.create_task(bus.take_groups(1, PATIENCE_SECONDS))
    await eventually(lambda: _blocked(job), "the take to wait on the server")
    (group_id,) = await job.publish(bus, 0)
    assert ids(await taking) == [group_id]


async def _blocked(job: Job) -> bool:
    async with Redis.from_url(job.url, decode_responses=True) as redis:
        return int((await redis.info("clients"))["blocked_clients"]) > 0


async def test_groups_that_come_close_together_are_taken_together(
    job: Job, bus: TrajectoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "GATHER_SECONDS", 3.0)
    taking = asyncio.create_task(bus.take_groups(4, PATIENCE_SECONDS))
    first = await job.publish(bus, 0)
    await eventually(lambda: _is_assigned(bus), "the reader to have the first")
    second = await job.publish(bus, 1)
    assert ids(await taking) == [*first, *second]


async def _is_assigned(bus: TrajectoryBus) -> bool:
    return (await bus.readings.depths()).rollouts_pending == 1


async def test_nobody_waits_for_more_than_is_enough(
    job: Job, bus: TrajectoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await job.publish(bus, 0, 1)
    for delivery in await bus.take_groups(2, 1.0):
        await bus.publish_scored(delivery, make_scored(delivery.value))
    monkeypatch.setattr(reader, "GATHER_SECONDS", 3600.0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert len(await bus.take_scored(4, 1.0, enough=2)) == 2


async def test_taking_returns_nothing_after_its_time(bus: TrajectoryBus) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await bus.take_groups(1, 0.05) == []
        assert await bus.take_scored(1, 0.0) == []


async def test_a_failed_group_is_tried_again_and_dropped_after_the_last_attempt(job: Job) -> None:
    async with job.connect(max_attempts=3) as bus:
        (group_id,) = await job.publish(bus, 0)
        for attempt in (1, 2, 3):
            (delivery,) = await bus.take_groups(4, 1.0)
            assert delivery.attempt == attempt
            await bus.fail(delivery, "scoring_failed", f"attempt {attempt}")
        assert await bus.take_groups(4, 0.05) == []
        assert (await bus.readings.terminal_states([group_id])) == {group_id: "dropped:scoring_failed"}
        ((_, record),) = await bus.readings.read_terminal("", 10)
        assert record.detail == "attempt 3"
        await job.assert_closed(bus)


async def test_released_groups_lose_no_attempt(job: Job) -> None:
    async with job.connect(max_attempts=1) as bus:
        await job.publish(bus, 0, 1)
        for _ in range(3):
            deliveries = await bus.take_groups(2, 1.0)
            assert [delivery.attempt for delivery in deliveries] == [1, 1]
            await bus.release(deliveries)
        assert await bus.close_job() == 2
        await job.assert_closed(bus)


async def test_a_group_tried_before_travels_alone(job: Job, bus: TrajectoryBus) -> None:
    suspect, second, third, fourth = await job.publish(bus, 0, 1, 2, 3)
    first_batch = await bus.take_groups(2, 1.0)
    assert ids(first_batch) == [suspect, second]
    await bus.fail(first_batch[0], "scoring_failed")
    # The others go on, but the suspect waits until nothing else is in the same hands, and then keeps them for itself.
    assert ids(await bus.take_groups(4, 0.05)) == []
    await bus.publish_scored(first_batch[1], make_scored(first_batch[1].value))
    alone = await bus.take_groups(4, 1.0)
    assert [(delivery.group_id, delivery.attempt) for delivery in alone] == [(suspect, 2)]
    assert await bus.take_groups(4, 0.05) == []
    await bus.publish_scored(alone[0], make_scored(alone[0].value))
    assert ids(await bus.take_groups(4, 1.0)) == [third, fourth]


async def test_a_waiting_suspect_is_handed_out_as_soon_as_the_hands_are_free(job: Job, bus: TrajectoryBus) -> None:
    suspect, _ = await job.publish(bus, 0, 1)
    failing, other = await bus.take_groups(2, 1.0)
    await bus.fail(failing, "scoring_failed")
    taking = asyncio.create_task(bus.take_groups(2, PATIENCE_SECONDS))
    await bus.publish_scored(other, make_scored(other.value))
    assert ids(await taking) == [suspect]


async def test_a_restarted_scorer_gets_back_what_it_held(job: Job) -> None:
    async with job.connect(lease_seconds=60) as before:
        first, second = await job.publish(before, 0, 1)
        assert ids(await before.take_groups(2, 1.0)) == [first, second]
        async with job.connect(lease_seconds=60) as after:
            for group_id in (first, second):
                (delivery,) = await after.take_groups(2, 1.0)
                assert (delivery.group_id, delivery.attempt) == (group_id, 2)
                await after.publish_scored(delivery, make_scored(delivery.value))


async def test_what_waited_in_one_process_while_another_took_it_over_is_not_handed_out_there(job: Job) -> None:
    async with job.connect("a", lease_seconds=60) as before:
        first, second = await job.publish(before, 0, 1)
        assert ids(await before.take_groups(2, 1.0)) == [first, second]
    async with job.connect("a", lease_seconds=60) as restarted, job.connect("b") as quick:
        (alone,) = await restarted.take_groups(2, 1.0)  # the second, tried before as well, waits behind it
        (stolen,) = await quick.take_groups(2, PATIENCE_SECONDS)
        assert alone.group_id == stolen.group_id == first
        await restarted.publish_scored(alone, make_scored(alone.value))
        assert await restarted.take_groups(2, 0.05) == []
        with pytest.raises(LeaseLostError):
            await quick.publish_scored(stolen, make_scored(stolen.value))
        (taken,) = await quick.take_groups(2, 1.0)
        assert taken.group_id == second
        await quick.publish_scored(taken, make_scored(taken.value))


async def test_an_expired_lease_goes_to_another_scorer_and_the_first_is_fenced(job: Job) -> None:
    async with job.connect("a") as slow, job.connect("b") as quick:
        (group_id,) = await job.publish(slow, 0)
        (zombie,) = await slow.take_groups(1, 1.0)
        (delivery,) = await quick.take_groups(1, PATIENCE_SECONDS)
        assert (delivery.group_id, delivery.attempt) == (group_id, 2)
        assert await slow.renew() == [group_id]
        await slow.fail(zombie, "scoring_failed")  # not its business any more
        assert await slow.renew() == []
        await quick.publish_scored(delivery, make_scored(delivery.value))
        with pytest.raises(LeaseLostError):
            await slow.publish_scored(zombie, make_scored(zombie.value))
        (ready,) = await quick.take_scored(1, 1.0)
        assert await quick.commit_trained({ready.group_id: 1}) == []
        assert await job.assert_closed(quick) == Ledger(dispatched=1, trained=1)


async def test_a_unit_of_work_longer_than_a_lease_keeps_it(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    async with job.connect("a", lease_seconds=2) as slow, job.connect("b", lease_seconds=2) as greedy:
        await job.publish(slow, 0)
        async with slow.leases_renewed():
            (held,) = await slow.take_groups(1, 1.0)
            assert await greedy.take_groups(1, 5.0) == []  # two and a half leases
            await slow.publish_scored(held, make_scored(held.value))
            assert await slow.renew() == []  # done with, not lost
            assert await greedy.take_scored(1, 0.2)
        assert not [message for message in caplog.messages if "was lost" in message]


async def test_the_learner_keeps_its_leases_until_the_commit(job: Job) -> None:
    async with job.connect("a", lease_seconds=2) as learner, job.connect("b", lease_seconds=2) as other:
        first, second = await job.publish_deferred(learner, 0, 1)
        async with learner.leases_renewed():
            assert ids(await learner.take_scored(2, 1.0)) == [first, second]
            await learner.commit_trained({first: 1})
            assert await other.take_scored(2, 5.0) == []  # two and a half leases
        assert ids(await other.take_scored(2, PATIENCE_SECONDS)) == [second]  # nobody renews it any more


async def test_a_renewal_that_finds_a_lease_lost_says_so_once(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    async with job.connect("a") as slow, job.connect("b") as quick:
        (group_id,) = await job.publish(slow, 0)
        (zombie,) = await slow.take_groups(1, 1.0)
        (delivery,) = await quick.take_groups(1, 5.0)  # once the lease has run out
        async with slow.leases_renewed():
            assert await quick.take_groups(1, 1.0) == []  # several renewals later
        assert [message for message in caplog.messages if "was lost" in message] == [
            f"the lease of group {group_id} was lost: another consumer took it over, or it has ended"
        ]
        await quick.publish_scored(delivery, make_scored(delivery.value))
        with pytest.raises(LeaseLostError):
            await slow.publish_scored(zombie, make_scored(zombie.value))


async def test_a_lease_that_the_same_process_let_lapse_is_handed_out_again(job: Job, bus: TrajectoryBus) -> None:
    (group_id,) = await job.publish(bus, 0)
    (forgotten,) = await bus.take_groups(1, 1.0)
    (again,) = await bus.take_groups(1, PATIENCE_SECONDS)
    assert (again.group_id, again.attempt) == (group_id, 2)
    await bus.publish_scored(again, make_scored(again.value))
    with pytest.raises(LeaseLostError):
        await bus.publish_scored(forgotten, make_scored(forgotten.value))


async def test_a_cancelled_take_loses_nothing(job: Job, bus: TrajectoryBus) -> None:
    group_ids = await job.publish(bus, *range(20))
    taken: list[str] = []
    for round_ in range(1000):
        taking = asyncio.create_task(bus.take_groups(1, 1.0))
        for _ in range(round_ % 40):  # cut off at ever other places
            await asyncio.sleep(0)
        taking.cancel()
        try:
            (delivery,) = await taking
        except asyncio.CancelledError:
            continue
        assert delivery.attempt == 1
        await bus.publish_scored(delivery, make_scored(delivery.value))
        taken.append(delivery.group_id)
        if len(taken) == len(group_ids):
            break
    while len(taken) < len(group_ids):
        (delivery,) = await bus.take_groups(1, 1.0)
        assert delivery.attempt == 1
        await bus.publish_scored(delivery, make_scored(delivery.value))
        taken.append(delivery.group_id)
    assert taken == group_ids


async def test_a_cancelled_call_is_always_cancelled(bus: TrajectoryBus) -> None:
    async def work() -> None:
        while True:
            await bus.set_value("name", "value")

    for round_ in range(200):
        task = asyncio.create_task(work())
        for _ in range(round_ % 20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE_SECONDS)
        assert task.cancelled()


# --- the learner ---


async def test_the_learner_gets_each_group_once_while_it_holds_them(job: Job, bus: TrajectoryBus) -> None:
    group_ids = await job.publish_scored(bus, 0, 1, 2)
    deliveries = await bus.take_scored(2, 1.0)
    deliveries += await bus.take_scored(2, 1.0)
    assert ids(deliveries) == group_ids
    assert await bus.take_scored(4, 1.0) == []  # more than three leases without renewal: it is the only learner
    assert await bus.renew() == []
    await bus.commit_trained(dict.fromkeys(group_ids, 1))
    await job.assert_closed(bus)


async def test_a_restarted_learner_gets_everything_uncommitted_in_order(job: Job) -> None:
    async with job.connect() as before:
        group_ids = await job.publish_scored(before, *range(5))
        assert ids(await before.take_scored(3, 1.0)) == group_ids[:3]
        await before.commit_trained({group_ids[0]: 1})
    async with job.connect() as after:
        found = await after.fetch_scored(group_ids)
        assert list(found) == group_ids[1:]
        assert plain(found[group_ids[1]]) == plain(make_scored(job.group(1)))
        deliveries = [*await after.take_scored(2, 1.0), *await after.take_scored(2, 1.0)]
        assert ids(deliveries) == group_ids[1:]


async def test_who_joins_reads_groups_that_another_holds_and_takes_nothing(job: Job, bus: TrajectoryBus) -> None:
    group_ids = await job.publish_scored(bus, 0, 1)
    assert len(await bus.take_scored(2, 1.0)) == 2
    async with job.connect(opened=False) as reader:
        with pytest.raises(BusError, match="has not been opened"):
            await reader.fetch_scored(group_ids)
        await reader.join()
        assert list(await reader.fetch_scored(group_ids)) == group_ids
    assert await bus.renew() == []
    await bus.commit_trained(dict.fromkeys(group_ids, 1))
    await job.assert_closed(bus)


async def test_an_observer_reads_and_creates_nothing(job: Job) -> None:
    settings = bus_settings(job.store)
    with pytest.raises(BusError, match="holds no state"):
        await BusReadings.connect(job.url, job.job_id, settings)
    async with Redis.from_url(job.url) as redis:
        assert [key async for key in redis.scan_iter(f"jackpot:{{{job.job_id}}}:*")] == []
    async with job.connect() as bus:
        (group_id,) = await job.publish(bus, 0)
        observer = await BusReadings.connect(job.url, job.job_id, settings)
        assert await observer.dispatched() == {group_id: "published"}
        assert await observer.depths() == await bus.readings.depths()
        await observer.close()


async def test_only_scored_groups_are_fetched(job: Job, bus: TrajectoryBus) -> None:
    await job.publish(bus, 0)
    assert await bus.fetch_scored([job.group(0).group_id, job.group(1).group_id]) == {}
    assert await bus.fetch_scored([]) == {}


# --- opening ---


async def test_opening_twice_changes_nothing(job: Job, bus: TrajectoryBus) -> None:
    await job.publish(bus, 0)
    assert await bus.open() is False
    async with job.connect("1") as other:
        assert list(await other.readings.dispatched()) == [job.group(0).group_id]


async def test_calls_before_open_are_refused(job: Job) -> None:
    bus = await TrajectoryBus.connect(job.url, job.job_id, bus_settings(job.store), "0", job.payload_dir)
    for call in (bus.readings.dispatched(), bus.take_groups(1, 0.0), bus.set_value("x", "y")):
        with pytest.raises(BusError, match=r"call open\(\) first"):
            await call
    await bus.close()


async def test_nobody_there(tmp_path: Path) -> None:
    url = f"unix://:secret@{tmp_path}/bus.sock"
    with pytest.raises(BusError, match="does not answer") as raised:
        await TrajectoryBus.connect(url, "job", bus_settings("file"), "0", tmp_path)
    assert "secret" not in str(raised.value)


async def test_jobs_do_not_see_each_other(job: Job, bus: TrajectoryBus) -> None:
    other = Job(job.url, job.store, job.payload_dir)
    await job.publish(bus, 0)
    async with other.connect() as other_bus:
        assert await other_bus.readings.dispatched() == {}
        assert await other_bus.take_groups(1, 0.05) == []


async def test_a_stream_that_the_server_lost_alone_is_lost_state_too(job: Job, bus: TrajectoryBus) -> None:
    async with Redis.from_url(job.url) as redis:
        await redis.delete(f"jackpot:{{{job.job_id}}}:rollouts")
    with pytest.raises(BusLostError, match="Open the bus again"):
        await bus.take_groups(1, 0.0)
    assert await bus.open() is False
    (group_id,) = await job.publish(bus, 0)
    assert ids(await bus.take_groups(1, 1.0)) == [group_id]


async def test_a_job_begun_anew_fences_off_who_has_not_noticed(job: Job, bus: TrajectoryBus) -> None:
    (group_id,) = await job.publish_scored(bus, 0)
    assert ids(await bus.take_scored(1, 1.0)) == [group_id]
    async with Redis.from_url(job.url) as redis:
        await redis.delete(*[key async for key in redis.scan_iter(f"jackpot:{{{job.job_id}}}:*")])
    calls = (
        bus.readings.dispatched(),
        bus.reserve(group_id, 1),
        bus.publish(job.group(0)),
        bus.take_groups(1, 0.0),
        bus.take_scored(1, 0.0),
        bus.fetch_scored([group_id]),
        bus.renew(),
        bus.drop(group_id, "lost"),
        bus.commit_trained({group_id: 1}),
        bus.readings.ledger(),
        bus.readings.depths(),
        bus.readings.get_value("x"),
        bus.set_value("x", "y"),
    )
    async with job.connect("1"):
        for call in calls:
            with pytest.raises(BusLostError, match="Open the bus again"):
                await call
        assert await bus.open() is False
        assert await bus.readings.dispatched() == {}
        assert await bus.take_scored(1, 0.05) == []
        assert await bus.reserve(GroupKey(9, 0, 9).group_id(job.job_id), 10)
        assert await bus.close_job() == 1
        job.dispatched = {GroupKey(9, 0, 9).group_id(job.job_id)}
        await job.assert_closed(bus)
