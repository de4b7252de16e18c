from __future__ import annotations

import pytest
import torch

import kernels
from kernels import newton_schulz_hopper
from kernels.reference import NAMED_COEFFICIENTS

SHARED_MEMORY = 227 * 1024  # that a program may have on a Hopper GPU


def test_it_compiles_for_a_hopper_gpu_and_fits_one(compiled_newton_schulz):
    """Without one."""
    compiled = compiled_newton_schulz["newton_schulz_hopper_kernel", 90]
    assert compiled.shared_memory <= SHARED_MEMORY
    assert compiled.products > 0
    assert compiled.spills == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_it_gives_the_bits_of_the_kernel_it_stands_for(coefficients, large_tiles, monkeypatch):
    """Also with beta and without, tall and wide, of fewer items than programs and of many more."""
    if not newton_schulz_hopper.runs_on(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no Hopper GPU, or a Triton whose Gluon the kernel is not written for")
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
