"""Compiles every Triton program of the vocabulary pass for a GPU, without one. Run by
test_vocabulary_kernels.py, in a process of its own, since the interpreter that the other tests use takes the compiler's
place.

Prints one JSON object per program and GPU named: the program's name, the GPU, which matrix instruction it multiplies
with, if any, and whether its shared memory is within what the GPU has.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jackpot.algorithm import vocabulary_kernels as kernels
from jackpot.algorithm.vocabulary_triton import GROUP, Tiles, tiles_for

# Name: compute capability, shared memory of a program, processors.
GPUS = {"H100": (90, 232_448, 132), "B200": (100, 232_448, 148)}
STEP = 64
BY_ROWS = ("chosen_logits_kernel", "candidates_kernel")  # products with one vector: bound by memory
HALF = ("hidden", "weight", "bias", "policy_bias", "actor_bias")


def argument_type(program: str, name: str, tiles: Tiles) -> str:
    """Triton's name for the type of an argument."""
    if name.isupper():
        return "constexpr"
    if name.endswith("states"):
        return f"tensordesc<bf16[{tiles.rows}, {STEP}]>"
    if name.endswith("weight") and program not in BY_ROWS:
        return f"tensordesc<bf16[{tiles.columns}, {STEP}]>"
    if name.startswith(("num_", "vocabulary", "first_column")) or name.endswith("width"):
        return "i32"
    if name.endswith(("scale", "softcap", "temperature")):
        return "fp32"
    if name in ("ids", "groups"):
        return "*i64"
    half = name in HALF or (name == "out" and "gradient" in program)
    return "*bf16" if half else "*fp32"


def compile_for(name: str, gpu: str) -> dict[str, object]:
    """A program with all of its parts switched on."""
    capability, shared_memory, processors = GPUS[gpu]
    program = getattr(kernels, name)
    tiles = tiles_for(shared_memory, processors, accumulators=2 if "kl" in name else 1, writes="gradient" in name)
    constants = {"GROUP": GROUP, "NUM_IDS": 1, "BLOCK_N": 32, "PROGRAMS": processors}
    constants |= {"BLOCK_T": tiles.rows, "BLOCK_V": tiles.columns, "POLICY_H": STEP, "ACTOR_H": STEP}
    constants["BLOCK_H"] = 256 if name in BY_ROWS else STEP
    signature = {argument: argument_type(name, argument, tiles) for argument in program.arg_names}
    constexprs = {
        (place,): constants.get(argument, True)
        for place, argument in enumerate(program.arg_names)
        if argument.isupper()
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(program.arg_names)
        if signature[argument].startswith("*") or argument.endswith(("width", "num_columns", "vocabulary"))
    }
    source = ASTSource(program, signature, constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tiles.launch)
    instruction = next((word for word in ("wgmma", "tcgen05.mma") if word in compiled.asm["ptx"]), None)
    return {
        "program": name,
        "gpu": gpu,
        "instruction": instruction,
        "fits": compiled.metadata.shared <= shared_memory,
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        for gpu in sys.argv[1:]:
            print(json.dumps(compile_for(name, gpu)), flush=True)


if __name__ == "__main__":
    main()
