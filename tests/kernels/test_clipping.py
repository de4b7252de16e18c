"""Clipping by the global norm beside its definition."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import dispatch, reference
from kernels.clipping import clip_factors, square_sums

pytestmark = pytest.mark.usefixtures("every_implementation")

SHAPES = [(1,), (3, 5), (127, 129), (), (20_000,), (8192,)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(device, dtypes=DTYPES, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (size * torch.randn(shape, generator=generator)).to(device, dtypes[index % len(dtypes)])
        for index, shape in enumerate(SHAPES * len(dtypes))
    ]


def exact_norm(several):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in several))


@pytest.mark.parametrize("dtypes", [*[(dtype,) for dtype in DTYPES], DTYPES], ids=str)
def test_sums_add_up_to_the_square_of_the_norm(dtypes, device):
    several = tensors(device, dtypes)
    sums = square_sums(several)
    assert (sums.dtype, sums.dim()) == (torch.float64, 1)
    # a reference's norm of a tensor is rounded to the tensor's dtype
    rounding = 1e-6 if dispatch.chosen() == "triton" or dtypes == (torch.float32,) else 2**-8
    assert float(sums.sum().sqrt()) == pytest.approx(exact_norm(several), rel=rounding)


@pytest.mark.parametrize("largest", [0.3, 1e6])
def test_factors(largest, device):
    several = tensors(device, (torch.float32,))
    factors = clip_factors(square_sums(several), largest)
    assert (factors.dtype, factors.shape) == (torch.float32, (2,))
    expected = min(1.0, largest / (exact_norm(several) + 1e-6))
    assert factors.tolist() == pytest.approx([expected, 1 / expected], rel=1e-6)


@pytest.mark.parametrize("count", [1, 1024, 5000])
def test_factors_of_any_number_of_sums(count, device):
    sums = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    factor, inverse = clip_factors(sums, 0.5).tolist()
    assert factor == pytest.approx(min(1.0, 0.5 / math.sqrt(sums.sum().item())), rel=1e-5)
    assert factor * inverse == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_beyond_float32(size, device):
    if dispatch.chosen() == "reference":
        pytest.skip("the reference's norms are float32")
    several = tensors(device, (torch.float32,), size)
    assert float(square_sums(several).sum().sqrt()) == pytest.approx(exact_norm(several), rel=1e-6)


@pytest.mark.parametrize(("bad", "factor"), [(math.nan, math.nan), (math.inf, 0.0)])
def test_what_is_not_finite_shows(bad, factor, device):
    several = tensors(device, (torch.float32,))
    several[2][5, 7] = bad
    found = clip_factors(square_sums(several), 0.3)[0].item()
    assert found == factor or (math.isnan(found) and math.isnan(factor))


def test_zeros_are_left_as_they_are(device):
    assert clip_factors(square_sums([torch.zeros(5, device=device)]), 0.3).tolist() == [1.0, 1.0]


def test_the_same_bits_again(device):
    several = tensors(device)
    first = square_sums(several)
    assert all(torch.equal(square_sums(several), first) for _ in range(3))
    assert torch.equal(clip_factors(first, 0.3), clip_factors(first, 0.3))


@pytest.mark.usefixtures("poisoned_outputs")
def test_every_sum_is_written(device):
    assert square_sums(tensors(device)).isfinite().all()
    assert clip_factors(square_sums(tensors(device)), 0.3).isfinite().all()


def test_moved_tensors_are_found(device):
    first, second = tensors(device, seed=1), tensors(device, seed=2)
    assert not torch.equal(square_sums(first), square_sums(second))
    first[0].zero_()
    changed = square_sums(first).sum()
    first[0].fill_(100)
    assert float(square_sums(first).sum() - changed) == pytest.approx(10_000, rel=2**-8)


def test_tensors_that_the_kernel_does_not_take(device):
    strided = torch.randn(6, 8, device=device)[:, ::2]
    askew = torch.randn(9, device=device)[1:]
    double = torch.randn(5, device=device, dtype=torch.float64)
    for several in ([strided], [askew], [double], [strided, askew]):
        assert float(square_sums(several).sum().sqrt()) == pytest.approx(exact_norm(several), rel=1e-6)


def test_traced(device, compiled):
    several = tensors(device, (torch.float32,))
    found = compiled(lambda each: clip_factors(square_sums(each), 0.3))(several)
    torch.testing.assert_close(found, reference.clip_factors(reference.square_sums(several), 0.3))
