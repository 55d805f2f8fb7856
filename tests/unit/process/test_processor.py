"""What vLLM's CPU build could only refuse by ending, again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from jackpot.config import JobSpec, parse_job
from jackpot.errors import ConfigError
from jackpot.process.processor import refuse_8_bit_cache

EPYC = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 bmi2\n\nprocessor\t: 1\nflags\t\t: fpu sse4_2 avx2 bmi2\n"


def job(**actor: object) -> JobSpec:
    described = {"model": "m", "weights": "policy", "train": False, "dtype": "bfloat16", **actor}
    return parse_job({"policy": {"model": "m"}, "actor": described, "task": {"name": "complement"}})


@pytest.mark.parametrize("flags", ["avx512f", "amx_tile"])
def test_an_8_bit_cache_needs_a_processor_that_has_the_instructions(tmp_path: Path, flags: str) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(EPYC)
    cheap = job(quantization="fp8_per_channel", kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match=r"actor\.kv_cache_dtype = 'fp8': .*AVX-512 or AMX.* Set it to auto"):
        refuse_8_bit_cache(cheap, info)
    with pytest.raises(ConfigError):
        refuse_8_bit_cache(cheap, tmp_path / "none")
    refuse_8_bit_cache(job(quantization="fp8_per_channel"), info)
    refuse_8_bit_cache(parse_job({"policy": {"model": "m"}, "actor": "policy", "task": {"name": "complement"}}), info)
    info.write_text(EPYC.replace("avx2", f"avx2 {flags}"))
    refuse_8_bit_cache(cheap, info)
