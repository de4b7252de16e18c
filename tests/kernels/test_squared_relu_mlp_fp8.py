"""The op's own bounds, and what it does at the edges; `test_equivalence` holds the kernels to the definition."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch, reference, testing, tuning
from kernels.cases import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

pytestmark = pytest.mark.usefixtures("every_implementation")

CASE = next(case for case in CASES if case.name == "squared_relu_mlp_fp8")
NAMES = ("x_BTD", "up_HD", "down_DH", "residual_BTD")

# What rounding does to a number, in root mean square, as if its error were uniform within half a unit of the last place
# either way: a unit is at most 2^-3 of a number in e4m3, 2^-2 in e5m2.
E4M3_ERROR, E5M2_ERROR = 2**-3 / 12**0.5, 2**-2 / 12**0.5
# What rounding each factor adds to the error of a sum of products of independent numbers around 0, squared and in
# units of e4m3's: 1 a factor in e4m3, 4 a factor in e5m2. h has the error of x and of up, 2. relu(h)^2 has 2 h times
# that: for a normal h of variance 1, E[4 h^2] / E[h^4] = 4/3 of 2, and its own rounding, 1. The slope 2 relu(h) has
# h's 2, and a quarter of that rounding, since it is taken from the square's root.
BOUNDS = {
    "output": 8 / 3 + 1 + 1,  # relu(h)^2 and down
    "grad x_BTD": (2 + 1 / 4) + (4 + 1) + (4 + 1),  # the slope; upstream and down; h's gradient and up
    "grad up_HD": (2 + 1 / 4) + (4 + 1),  # the slope; upstream and down
    "grad down_DH": 8 / 3 + 1,  # relu(h)^2
    "grad residual_BTD": 0,
}


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    """x, up, down and residual for [B, T, D, H]."""
    return list(CASE.draw(shape, dtype, torch.device(device), seed).values())


def outcome(function, tensors, upstream=None):
    """Results and gradients by name."""
    arguments = dict(zip(NAMES, tensors, strict=True))
    if upstream is None:
        upstream = testing.upstream_of(CASE, arguments, tensors[0].dtype, tensors[0].device, seed=3)
    else:
        upstream = [upstream]
    return testing.results(CASE, function, arguments, upstream)


@pytest.mark.parametrize("shape", [(2, 64, 128, 256), (1, 40, 256, 512), (3, 70, 40, 136)])
def test_error_against_the_exact_op(shape, device):
    tensors = make(shape, torch.bfloat16, device)
    ours = outcome(kernels.squared_relu_mlp_fp8, tensors)
    exact = outcome(reference.squared_relu_mlp, [tensor.double() for tensor in tensors])
    tensors[3] = torch.zeros_like(tensors[3])  # which would hide errors of the rest in a larger sum
    ours["output"] = outcome(kernels.squared_relu_mlp_fp8, tensors)["output"]
    exact["output"] = outcome(reference.squared_relu_mlp, [tensor.double() for tensor in tensors])["output"]
    for name, squared in BOUNDS.items():
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        # bfloat16 rounds the result, and the factors of the weights' gradients
        assert error <= squared**0.5 * E4M3_ERROR + 2 * torch.finfo(torch.bfloat16).eps, name
        # and the bound would notice a product that is not rounded: a factor in 4 bits errs at least half as much
        assert squared == 0 or error >= 0.4 * squared**0.5 * E4M3_ERROR, name


def nearest(values, mantissa, smallest):
    """In NumPy, to `mantissa` bits after the point, down to steps of `smallest`'s; halves to even."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), smallest)))
    step = 2.0 ** (exponent - mantissa)
    return np.round(values / step) * step


def slow_mlp(x, up, down, residual):
    """The definition once more in NumPy, whose float8 is arithmetic."""

    def rows(values):
        norm = np.sqrt((values**2).sum(1, keepdims=True))
        return nearest(256 * values / norm, 3, 2.0**-6), norm[:, 0]

    x, up, down, residual = (tensor.cpu().double().numpy() for tensor in (x, up, down, residual))
    codes, norms = rows(x.reshape(-1, x.shape[2]))
    up, up_norms = rows(up)
    down, down_norms = rows(down * up_norms**2)
    squares = nearest(256 * np.maximum(codes @ up.T / 256**2, 0) ** 2, 3, 2.0**-6)
    y = squares @ down.T * np.outer(norms**2, down_norms) / 256**2
    return torch.from_numpy(y.reshape(x.shape) + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 127, 5), (2, 3, 16, 48), (3, 70, 48, 144)])
def test_follows_the_definition(shape, dtype, device):
    tensors = make(shape, dtype, device)
    y, truth = kernels.squared_relu_mlp_fp8(*tensors), slow_mlp(*tensors)
    assert (y.shape, y.dtype) == (truth.shape, dtype)
    # Squares are rounded from float32 sums, and the few that fall to the other side of a half change by 2^-3: one in a
    # thousand at float32's 2^-24 times some tens of terms.
    assert (y.cpu().double() - truth).norm() <= (4 * torch.finfo(dtype).eps + 2**-3 * 1e-3**0.5) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rounding_passes_gradients_as_they_are(dtype, device):
    """Where every factor is a float8 times its row's scale already, the gradients are the exact op's."""
    # rows of one number have norm 256 after scaling, and everything after that is a power of two
    x = torch.zeros(1, 16, 16, dtype=dtype, device=device)
    x[0].fill_diagonal_(2)
    up = torch.zeros(32, 16, dtype=dtype, device=device)
    up[torch.arange(32), torch.arange(32) % 16] = torch.tensor([1, -0.5] * 16, dtype=dtype, device=device)
    down = up.mT.contiguous()
    down[:, 16:] = 0
    upstream = 4 * torch.eye(16, dtype=dtype, device=device)[None]
    tensors = [x, up, down, torch.zeros_like(x)]
    ours = outcome(kernels.squared_relu_mlp_fp8, tensors, upstream)
    exact = outcome(reference.squared_relu_mlp, tensors, upstream)
    assert ours["grad x_BTD"].any()
    assert ours["grad up_HD"].any()
    assert ours["grad down_DH"].any()
    for name, wanted in exact.items():
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_changes_nothing_but_the_scale(dtype, device):
    """Rows of very different sizes are rounded as well as each alone: by powers of two, exactly."""
    tensors = make((1, 8, 48, 64), dtype, device)
    tensors[3] = None
    y = kernels.squared_relu_mlp_fp8(*tensors)
    sizes = 2.0 ** torch.arange(-20, 20, 5, device=device)
    tensors[0] = (tensors[0] * sizes[:, None]).to(dtype)
    assert torch.equal(kernels.squared_relu_mlp_fp8(*tensors), (y * sizes[:, None] ** 2).to(dtype))


@pytest.mark.parametrize("shape", [(1, 5, 16, 32), (1, 5, 7, 9)])
def test_zeros_give_zeros(shape, device):
    """Their scale is neither 0 nor infinite: an untrained output matrix is all zeros."""
    for zero in range(3):
        tensors = make(shape, torch.bfloat16, device)
        residual, tensors[3] = tensors[3], torch.zeros_like(tensors[3])
        tensors[zero] = torch.zeros_like(tensors[zero])
        found = outcome(kernels.squared_relu_mlp_fp8, tensors, residual)
        wanted = outcome(reference.squared_relu_mlp, tensors, residual)
        assert not found["output"].any()
        for name, value in found.items():
            assert value.isfinite().all(), name
            assert bool(value.any()) == bool(wanted[name].any()), name
    assert not any(value.any() for value in outcome(kernels.squared_relu_mlp_fp8, tensors, residual * 0).values())


def test_zero_rows_among_others(device):
    tensors = make((1, 5, 16, 32), torch.bfloat16, device)
    full = kernels.squared_relu_mlp_fp8(*tensors)
    tensors[0][0, 2] = 0
    y = kernels.squared_relu_mlp_fp8(*tensors)
    assert torch.equal(y[0, 2], tensors[3][0, 2])
    others = [0, 1, 3, 4]
    assert torch.equal(y[0, others], full[0, others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("shape", [(1, 5, 16, 32), (1, 5, 15, 31)])
def test_what_is_not_finite_stays_in_its_row(shape, bad, device):
    """3e38 is a number, but its square is none in float32."""
    tensors = make(shape, torch.bfloat16, device)
    tensors[0][0, 2, 3] = bad
    found = outcome(kernels.squared_relu_mlp_fp8, tensors)
    for name in ("output", "grad x_BTD"):
        assert found[name].isnan().all(-1).tolist() == [[False, False, True, False, False]], name
        assert found[name].isnan().any(-1).tolist() == [[False, False, True, False, False]], name


def test_upstream_that_is_not_finite_stays_in_its_row(device):
    tensors = make((1, 5, 16, 32), torch.bfloat16, device)
    upstream = torch.ones_like(tensors[0])
    upstream[0, 2, 3] = float("inf")
    found = outcome(kernels.squared_relu_mlp_fp8, tensors, upstream)
    assert found["grad x_BTD"].isnan().all(-1).tolist() == [[False, False, True, False, False]]


def test_no_residual_is_one_of_zeros(device):
    x, up, down, residual = make((2, 9, 16, 32), torch.bfloat16, device)
    without = kernels.squared_relu_mlp_fp8(x, up, down)
    assert torch.equal(without, kernels.squared_relu_mlp_fp8(x, up, down, torch.zeros_like(residual)))


def test_the_residual_gets_the_gradient_as_it_is(device):
    tensors = make((2, 9, 16, 32), torch.bfloat16, device)
    upstream = torch.randn_like(tensors[0])
    assert torch.equal(outcome(kernels.squared_relu_mlp_fp8, tensors, upstream)["grad residual_BTD"], upstream)


def test_what_is_kept_for_backward(device):
    """Besides the inputs one [B, T, H] of bytes, and the norms of x's and up's rows."""
    if dispatch.chosen() == "reference":
        pytest.skip("the definition keeps the same, as float8")
    tensors = [tensor.requires_grad_() for tensor in make((2, 9, 16, 32), torch.bfloat16, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernels.squared_relu_mlp_fp8(*tensors)
    given = {tensor.data_ptr() for tensor in tensors}
    sizes = [(tensor.dtype, tensor.numel()) for tensor in kept if tensor.data_ptr() not in given]
    assert sizes == [(torch.uint8, 2 * 9 * 32), (torch.float32, 2 * 9), (torch.float32, 32)]


def test_which_products_are_the_kernels(device, monkeypatch):
    """bfloat16 with widths of whole vectors; everything else is the definition's."""
    module = sys.modules["kernels.squared_relu_mlp_fp8"]
    products, product = [], module._product_of_rows

    def counted(a_MK, b_NK, dtype, epilogue, *arguments):
        products.append((epilogue, a_MK.dtype, b_NK.dtype))
        return product(a_MK, b_NK, dtype, epilogue, *arguments)

    monkeypatch.setattr(module, "_product_of_rows", counted)
    for shape, dtype in (
        ((1, 2, 24, 16), torch.bfloat16),
        ((1, 2, 16, 24), torch.bfloat16),
        ((1, 2, 16, 16), torch.float16),
        ((1, 2, 16, 16), torch.float32),
    ):
        outcome(kernels.squared_relu_mlp_fp8, make(shape, dtype, device))
    assert not products
    outcome(kernels.squared_relu_mlp_fp8, make((1, 2, 16, 32), torch.bfloat16, device))
    measured = tuning.products(torch.empty(0, device=device).get_device()) is not None
    wanted = [("squares", E4M3, E4M3), ("added", E4M3, E4M3), ("slopes", E5M2, E4M3), ("input", E5M2, E4M3)]
    assert products == (wanted if measured and dispatch.chosen() != "reference" else [])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_rounded_as_pytorch_rounds(dtype, transposed, device):
    """To the bit, but for what falls to the other side of a half by a last digit of the norm."""
    module = sys.modules["kernels.squared_relu_mlp_fp8"]
    if dispatch.chosen() == "reference":
        pytest.skip("the definition rounds by PyTorch")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(70, 400, generator=generator) * 2.0 ** torch.randint(-30, 1, (70, 400), generator=generator)
    rows[7] = 0
    rows = rows.to(device, torch.bfloat16)
    codes, norms = module._rows_in_fp8(rows.mT.contiguous() if transposed else rows, dtype, transposed=transposed)
    wanted, wanted_norms = reference.rows_in_fp8(rows, dtype)
    torch.testing.assert_close(norms, wanted_norms, rtol=1e-6, atol=0)
    assert (codes.float() != wanted.float()).sum() <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, device, compiled):
    tensors = make((2, 7, 16, 32), dtype, device)
    eager = outcome(kernels.squared_relu_mlp_fp8, tensors)
    assert testing.same_bits(outcome(compiled(kernels.squared_relu_mlp_fp8), tensors), eager)


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        x, weight = torch.empty(2, 3, 16, dtype=torch.bfloat16), torch.empty(32, 16, dtype=torch.bfloat16)
        y = kernels.squared_relu_mlp_fp8(x, weight, weight.mT)
    assert (y.shape, y.dtype) == ((2, 3, 16), torch.bfloat16)
