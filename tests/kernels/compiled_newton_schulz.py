"""Compiles what works off the items of Newton-Schulz: without a GPU, in a process whose Triton does not interpret.

Prints a line for each: name, architecture, bytes of shared memory, products and spilled registers in the machine code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels import newton_schulz_hopper as hopper
from kernels import newton_schulz_tiles as tiles

TYPES = {
    **{"p_work": "*bf16", "p_out": "*bf16", "p_items": "*i32", "p_matrices": "*i64", "p_factors": "*fp32"},
    **{"p_scales": "*fp32", "p_done": "*i32", "ITEMS": "i32"},
}
DESCRIPTORS = {
    name: f"tensordesc<bf16{block},{hopper.layout()!r}>"
    for name, block in zip(("d_columns", "d_rows"), hopper.BLOCKS, strict=True)
}


def report(source: type, kernel: Any, types: dict[str, str], constants: dict[str, int], architecture: int) -> None:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.startswith("p_")}
    target = GPUTarget("cuda", architecture, 32)
    code = triton.compile(source(kernel, signature, constants, aligned), target=target, options={"num_warps": 4})
    machine_code = code.asm["sass"]
    print(kernel.__name__, architecture, code.metadata.shared, machine_code.count("HGMMA"), machine_code.count("STL"))


if __name__ == "__main__":
    small = {"VECTOR": 8, "b_T": tiles.SMALL, "b_K": tiles.DEPTH, "PIPELINED": tiles.PIPELINED[tiles.SMALL]}
    for architecture in (80, 86, 90):
        report(ASTSource, tiles.newton_schulz_kernel, TYPES, small, architecture)
    ring = {"b_T": tiles.LARGE, "b_K": hopper.DEPTH, "SLOTS": hopper.SLOTS}
    registers = dict(zip(("MULTIPLYING", "FETCHING"), hopper.REGISTERS, strict=True))
    constants = {"VECTOR": 8, **ring, **registers}
    report(GluonASTSource, hopper.newton_schulz_hopper_kernel, {**TYPES, **DESCRIPTORS}, constants, 90)
