"""Which weights score: the newest policy that is whole, and the actor at the versions that sampled."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from probe_world import probe_by_hand
from scoring_world import World, make_actor, make_policy, make_world

from jackpot.compute.model_weights import save_weights
from jackpot.errors import WeightCorruptError, WeightMissingError
from jackpot.scorer.target import RETRY_SECONDS, ActorVersions, HeldPolicy, TargetPolicy


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def target_of(world: World) -> TargetPolicy:
    return TargetPolicy(HeldPolicy(world.job().policy, "cpu"), world.store, obrs_lambda=1.5)


def refresh(target: TargetPolicy) -> bool:
    pending = target.read_newer()
    if pending is None:
        return False
    target.apply(pending)
    return True


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_the_newest_version_is_swapped_in_whole(world: World) -> None:
    target = target_of(world)
    assert target.version is None
    assert refresh(target) and target.version == 0 and same_weights(target.model, world.policies[0])
    assert not refresh(target)
    world.publish_policy(3)
    world.publish_policy(5)
    pending = target.read_newer()
    assert pending is not None and pending.version == 5
    assert target.version == 0 and same_weights(target.model, world.policies[0]), "reading must not touch the model"
    target.apply(pending)
    assert target.version == 5 and same_weights(target.model, world.policies[5])


def test_lambda_comes_with_the_weights_or_else_from_the_job(world: World) -> None:
    target = target_of(world)
    refresh(target)
    assert target.obrs_lambda == 1.5
    world.publish_policy(1, obrs_lambda=0.8)
    refresh(target)
    assert target.obrs_lambda == 0.8
    world.publish_policy(2)
    refresh(target)
    assert target.obrs_lambda == 1.5


def test_a_damaged_version_is_refused_until_it_is_repaired(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(world)
    refresh(target)
    world.publish_policy(1)
    world.damage_policy(1)
    assert not refresh(target)
    assert target.version == 0 and target.num_refused == 1 and same_weights(target.model, world.policies[0])
    assert not refresh(target)
    assert target.num_refused == 1, f"hashing the file again within {RETRY_SECONDS} s would be a waste"
    monkeypatch.setattr("jackpot.scorer.target.RETRY_SECONDS", 0.0)
    target._retry_at = 0.0
    assert not refresh(target) and target.num_refused == 2
    world.publish_policy(1)  # a damaged version is replaced
    assert refresh(target) and target.version == 1 and same_weights(target.model, world.policies[1])


def test_a_version_that_does_not_give_its_probe_is_refused_for_the_newest_in_memory(world: World) -> None:
    probes = {version: probe_by_hand(make_policy(100 + version), world.policies[0]) for version in (1, 2)}
    target = target_of(world)
    refresh(target)
    world.publish_policy(1, probe=probes[1].as_json())
    assert refresh(target) and target.version == 1 and same_weights(target.model, world.policies[1])
    world.publish_policy(2, probe=probes[1].as_json(), obrs_lambda=0.5)  # another version's
    pending = target.read_newer()
    assert pending is not None and target.newest == 2
    with pytest.raises(WeightCorruptError, match="version 2 does not give the log-probabilities"):
        target.apply(pending)
    assert (target.version, target.newest, target.newest_lambda, target.num_refused) == (1, 1, 1.5, 1)
    assert same_weights(target.model, world.policies[1])
    assert target.serves(2), "another version stands in for it"


def test_an_actor_version_that_does_not_give_its_probe_is_an_error(world: World) -> None:
    probe = probe_by_hand(world.actors[0], world.actors[0]).as_json()
    for version in (0, 1):
        world.store.discard("actor", version)
        actor = make_actor(200 + version)
        world.store.publish("actor", version, partial(save_weights, actor), {"probe": probe})
    actors = ActorVersions(world.job().rollout_model, "actor", world.store, "cpu")
    assert same_weights(actors.at(0), world.actors[0])
    with pytest.raises(WeightCorruptError, match="version 1 does not give the log-probabilities"):
        actors.at(1)
    assert same_weights(actors.at(0), world.actors[0])


def test_the_last_few_actor_versions_stay_in_memory(world: World) -> None:
    for version in (1, 2, 3):
        world.publish_actor(version)
    job = world.job()
    actors = ActorVersions(job.rollout_model, "actor", world.store, "cpu", num_held=2)
    for version in (0, 1, 0, 2):
        assert same_weights(actors.at(version), world.actors[version])
    world.store.prune("actor", keep=1)
    assert same_weights(actors.at(0), world.actors[0]), "held, although pruned from the store"
    with pytest.raises(WeightMissingError, match="version 1 of the actor's weights"):
        actors.at(1)  # the least recently used gave way to 2
    assert same_weights(actors.at(3), world.actors[3])


def test_a_damaged_actor_version_is_an_error_that_leaves_the_others_usable(world: World) -> None:
    world.publish_actor(1)
    path = world.store.manifest("actor", 1).path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    actors = ActorVersions(world.job().rollout_model, "actor", world.store, "cpu")
    actors.at(0)
    with pytest.raises(WeightCorruptError, match="does not match its manifest"):
        actors.at(1)
    assert same_weights(actors.at(0), world.actors[0])
