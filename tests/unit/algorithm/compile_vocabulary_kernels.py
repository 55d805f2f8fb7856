"""Compiles every Triton program of the vocabulary pass for an H100, without one. Run by test_vocabulary_kernels.py,
in a process of its own, since the interpreter that the other tests use takes the compiler's place.

Prints one JSON object per program: its name, and whether it multiplies on tensor cores.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jackpot.algorithm import vocabulary_kernels as kernels
from jackpot.algorithm.vocabulary_triton import BLOCK_H, BLOCK_T, BLOCK_V, GROUP, KL_BLOCK_T, LAUNCH

NUMBERS = ("num_", "vocabulary", "tiles_per", "first_column")
FLOAT32 = ("_out", "gradient", "gradient_sum", "log_sum")
CONSTANTS = {
    "GROUP": GROUP,
    "NUM_IDS": 1,
    "BLOCK_N": 32,
    "BLOCK_T": BLOCK_T,
    "BLOCK_V": BLOCK_V,
    "BLOCK_H": BLOCK_H,
}


def argument_type(program: str, name: str) -> str:
    """Triton's name for the type of an argument."""
    if name.isupper():
        return "constexpr"
    if name.startswith(NUMBERS) or name.endswith("width"):
        return "i32"
    if name.endswith(("scale", "softcap", "temperature")):
        return "fp32"
    if name == "ids":
        return "*i64"
    wide = name.endswith(FLOAT32) or (name == "out" and program == "chosen_logits_kernel")
    return "*fp32" if wide else "*bf16"


def main() -> None:
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        program = getattr(kernels, name)
        signature = {argument: argument_type(name, argument) for argument in program.arg_names}
        constants = CONSTANTS | ({"BLOCK_T": KL_BLOCK_T} if "kl" in name else {})
        constexprs = {
            (place,): constants.get(argument, True)
            for place, argument in enumerate(program.arg_names)
            if argument.isupper()
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(program.arg_names)
            if signature[argument].startswith("*") or argument.endswith("width")
        }
        source = ASTSource(program, signature, constexprs, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH)
        print(json.dumps({"program": name, "tensor_cores": "wgmma" in compiled.asm["ptx"]}))


if __name__ == "__main__":
    main()
