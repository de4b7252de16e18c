from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import kernels
from golfmodel.runtime.versions import PROJECT_ROOT
from kernels import newton_schulz_hopper
from kernels.reference import NAMED_COEFFICIENTS

SHARED_MEMORY = 227 * 1024  # that a program may have on a Hopper GPU
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import newton_schulz_hopper as hopper

layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
kernel = hopper.newton_schulz_hopper_kernel
names = ("VECTOR", "b_T", "b_K", "SLOTS", "MULTIPLYING", "FETCHING")
constants = dict(zip(names, (8, 128, hopper.DEPTH, hopper.SLOTS, *hopper.REGISTERS)))
types = {
    "d_columns": f"tensordesc<bf16[128, {hopper.DEPTH}],{layout!r}>",
    "d_rows": f"tensordesc<bf16[{hopper.DEPTH}, 128],{layout!r}>",
    **{"p_work": "*bf16", "p_out": "*bf16", "p_items": "*i32", "p_matrices": "*i64", "p_factors": "*fp32"},
    **{"p_scales": "*fp32", "p_done": "*i32", "ITEMS": "i32"},
}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name[:2] == "p_"}
compiled = triton.compile(
    GluonASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
)
print(compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"), compiled.asm["sass"].count("STL"))
"""


def test_it_compiles_for_a_hopper_gpu_and_fits_one():
    """Without one: in a process whose Triton compiles, where others here interpret."""
    pytest.importorskip("triton", "3.6", reason="what the kernel is written in comes with Triton 3.6")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared, products, spills = map(int, done.stdout.split())
    assert shared <= SHARED_MEMORY
    assert products > 0
    assert spills == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_it_gives_the_bits_of_the_kernel_it_stands_for(coefficients, large_tiles, monkeypatch):
    """Also with beta and without, tall and wide, of fewer items than programs and of many more."""
    if not newton_schulz_hopper.runs_on(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no Hopper GPU, or a Triton before 3.6")
    large_tiles()
    generator = torch.Generator("cuda").manual_seed(5)
    shapes = [(3, 33, 20), (20, 100), (128, 128), (65, 300), (300, 192), (130, 700), (700, 130), (16, 512, 512)]
    lists = [[torch.randn(shape, generator=generator, device="cuda") for shape in shapes]]
    narrow, odd = ([matrix[..., first : first + 64] for matrix in lists[0]] for first in (0, 1))
    odd = [matrix[..., : matrix.shape[-1] - 1 | 1] for matrix in odd]
    lists += [lists[0][1:2], narrow, odd, [lists[0][-1]] * 20]
    triples = NAMED_COEFFICIENTS[coefficients][:5] if coefficients == "polar_express" else coefficients

    def results() -> list[torch.Tensor]:
        return [x for matrices in lists for x in kernels.newton_schulz(matrices, coefficients=triples)]

    with monkeypatch.context() as patch:
        patch.setattr(newton_schulz_hopper, "runs_on", lambda device: False)
        expected = results()
    for _ in range(5):  # what its programs do is not ordered from one time to the next
        assert all(map(torch.equal, results(), expected))
