"""Every op inside a CUDA graph: replayed on other numbers in the same memory, it gives what a call gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels import testing
from kernels.cases import CASES
from kernels.clipping import clip_factors, square_sums
from kernels.muon_update import momentum_newton_schulz_, muon_update_
from kernels.testing import same_bits, tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]

MATRICES = ((5, 127), (16, 64), (64, 16), (3, 1536), (512, 512))


def recorded(function: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of the call, after one that compiled what it runs; and where its results come to lie."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        outputs = function()
    return graph, outputs


def check(function: Callable[[], dict[str, Tensor]], inputs: list[Tensor], others: list[Tensor]) -> None:
    """That a graph gives a call's results on `inputs`, and on `others` put in their place; inputs may be written to."""
    firsts = [tensor.clone() for tensor in inputs]

    def put(values: list[Tensor]) -> None:
        for tensor, value in zip(inputs, values, strict=True):
            tensor.copy_(value)

    expected = []
    for values in (firsts, others):
        put(values)
        expected.append({name: tensor.clone() for name, tensor in function().items()})
    graph, outputs = recorded(function)
    # Whatever the calls above kept for the next ones is gone or overwritten by the time of the replays.
    noise = [torch.full((2**20,), -1, device=inputs[0].device) for _ in range(8)]
    for values, wanted in zip((firsts, others, firsts), (*expected, expected[0]), strict=True):
        put(values)
        graph.replay()
        assert same_bits(outputs, wanted)
    assert not same_bits(*expected) or not any(tensor.numel() for tensor in outputs.values())
    del noise


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_case(case, device):
    dtype, shape = case.dtypes[0], max(case.shapes, key=lambda shape: torch.Size(shape).numel())
    arguments, others = (case.draw(shape, dtype, device, seed=seed) for seed in (5, 6))
    upstream = testing.upstream_of(case, arguments, dtype, device, seed=5)
    check(
        lambda: testing.results(case, case.function, arguments, upstream),
        list(tensors_of(arguments)),
        list(tensors_of(others)),
    )


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda") for shape in MATRICES]


def by_name(results) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors_of(results))}


LISTS = {
    "newton_schulz": kernels.newton_schulz,
    "quantize": lambda matrices: [list(pair) for pair in kernels.quantize_int6(matrices)],
    "fake_quantize": kernels.fake_quantize_int6,
    "packing": lambda matrices: kernels.pack_int6([codes for codes, _ in kernels.quantize_int6(matrices)]),
    "casts": lambda matrices: kernels.cast_weights(matrices, torch.bfloat16),
    "clipping": lambda matrices: clip_factors(square_sums(matrices), 0.3),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list(name):
    matrices = drawn(1)
    check(lambda: by_name(LISTS[name](matrices)), matrices, drawn(2))


def test_newton_schulz_with_large_tiles(large_tiles):
    """On a Hopper GPU another kernel works those off, which descriptors go to."""
    large_tiles()
    matrices = drawn(1)
    check(lambda: by_name(kernels.newton_schulz([*matrices, *matrices[-1:] * 8])), matrices, drawn(2))


def test_more_tables_than_there_are_streams():
    """Tables are uploaded beside the captured stream, which is one of the 32 that PyTorch hands out in turn."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(8 * (size + 1), generator=generator, device="cuda") for size in range(40)]
    others = [torch.randn_like(tensor) for tensor in tensors]
    check(
        lambda: {str(count): square_sums(tensors[: count + 1]) for count in range(len(tensors))},
        tensors,
        others,
    )


def test_the_steps_of_muon():
    """In place: every call begins with what is put there."""
    weights, buffers, gradients = drawn(1), drawn(2), drawn(3)
    lr, momentum = torch.tensor(0.1, device="cuda"), torch.tensor(0.9, device="cuda")

    def step() -> dict[str, Tensor]:
        clip = clip_factors(square_sums(gradients), 0.3)
        updates = momentum_newton_schulz_(buffers, gradients, momentum=momentum, nesterov=True, clip=clip[0])
        muon_update_(weights, [update.float() for update in updates], [1.0] * 5, lr=lr, weight_decay=0.1)
        return by_name([*weights, *buffers])

    inputs = [*weights, *buffers, *gradients, lr, momentum]
    others = [*drawn(4), *drawn(5), *drawn(6), torch.tensor(0.02, device="cuda"), torch.tensor(0.5, device="cuda")]
    check(step, inputs, others)
