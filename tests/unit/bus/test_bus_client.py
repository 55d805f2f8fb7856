"""Keys and scripts of the bus, as far as they can be judged without a server."""

from __future__ import annotations

import re
from importlib import resources

from jackpot.bus.client import BusClient, JobKeys

SCRIPTS = resources.files("jackpot.bus") / "scripts"


def test_all_keys_of_a_job_share_its_hash_tag() -> None:
    keys = JobKeys("job-1")
    everything = [*keys.for_scripts, keys.payload("job-1.s0.e0.p0.a0")]
    assert {key.partition("}")[0] for key in everything} == {"jackpot:{job-1"}
    assert len(set(everything)) == len(everything)


def test_scripts_name_the_keys_in_the_order_in_which_they_are_passed() -> None:
    names = re.search(r"local (INCARNATION.*) =\n", (SCRIPTS / "keys.lua").read_text())
    assert names is not None
    expected = [key.rpartition(":")[2].upper() for key in JobKeys("job-1").for_scripts]
    assert names[1].split(", ") == expected


async def test_passwords_are_not_part_of_the_address() -> None:
    for url, address in {
        "unix://:secret@/tmp/x/bus.sock": "unix:///tmp/x/bus.sock",
        "rediss://user:secret@redis.example:6380/2": "rediss://redis.example:6380/2",
    }.items():
        client = BusClient(url, "job-1")
        assert client.address == address
        await client.close()
