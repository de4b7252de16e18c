from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch, matmul, reference, tuning

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    """x, up, down and residual for [B, T, D, H]."""
    b, t, d, h = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (((b, t, d), 1.0), ((h, d), d**-0.5), ((d, h), h**-0.5), ((b, t, d), 1.0))
    return [(torch.randn(each, generator=generator) * size).to(device, dtype) for each, size in sizes]


def slow_mlp(x, up, down, residual):
    """The equation in float64."""
    x, up, down, residual = (tensor.detach().cpu().double().numpy() for tensor in (x, up, down, residual))
    hidden = np.einsum("btd,hd->bth", x, up)
    return torch.from_numpy(residual + np.einsum("bth,dh->btd", np.where(hidden > 0, hidden, 0) ** 2, down))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 127, 5), (2, 3, 8, 24), (3, 70, 40, 136)])
def test_follows_the_equation(shape, dtype, device):
    arguments = make(shape, dtype, device)
    y = kernels.squared_relu_mlp(*arguments)
    truth = slow_mlp(*arguments)
    assert (y.shape, y.dtype) == (truth.shape, dtype)
    # What lies between the products is rounded to the dtype, squares included; Triton's interpreter cuts bfloat16 off.
    assert (y.cpu().double() - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


def test_no_residual_is_one_of_zeros(device):
    x, up, down, residual = make((2, 9, 16, 24), torch.bfloat16, device)
    assert torch.equal(
        kernels.squared_relu_mlp(x, up, down), kernels.squared_relu_mlp(x, up, down, torch.zeros_like(residual))
    )


def test_gradients(device):
    arguments = [tensor.requires_grad_() for tensor in make((2, 3, 4, 5), torch.float64, device)]
    assert torch.autograd.gradcheck(reference.squared_relu_mlp, arguments)
    assert torch.autograd.gradcheck(kernels.squared_relu_mlp, arguments)


def test_the_residual_gets_the_gradient_as_it_is(device):
    arguments = [tensor.requires_grad_() for tensor in make((2, 9, 16, 24), torch.bfloat16, device)]
    upstream = torch.randn_like(arguments[0])
    kernels.squared_relu_mlp(*arguments).backward(upstream)
    assert torch.equal(arguments[3].grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_in_its_row(dtype, device):
    arguments = make((1, 5, 16, 24), dtype, device)
    arguments[0][0, 2, 3] = float("nan")
    x = arguments[0].requires_grad_()
    y = kernels.squared_relu_mlp(*arguments)
    assert y.isnan().all(-1).tolist() == [[False, False, True, False, False]]
    y.sum().backward()
    assert x.grad.isnan().all(-1).tolist() == [[False, False, True, False, False]]


def test_negative_hidden_values_give_no_gradient(device):
    x, up, down, _ = make((1, 6, 16, 24), torch.bfloat16, device)
    up[3:7] = -x[0].float().mean(0).sign() * 8  # some of both signs
    up.requires_grad_()
    kernels.squared_relu_mlp(x, up, down).sum().backward()
    never = (x[0].float() @ up.detach().float().T).amax(0) < 0
    assert never.any()
    assert not up.grad[never].any()


def test_what_is_kept_for_backward(device):
    """Besides the inputs one [B, T, H], not the hidden values both before and after the square."""
    if dispatch.chosen() == "reference":
        pytest.skip("autograd keeps what it likes of the reference")
    arguments = [tensor.requires_grad_() for tensor in make((2, 9, 16, 24), torch.bfloat16, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernels.squared_relu_mlp(*arguments)
    given = {tensor.data_ptr() for tensor in arguments}
    assert [tensor.numel() for tensor in kept if tensor.data_ptr() not in given] == [2 * 9 * 24]


def test_which_products_are_the_kernels(device, monkeypatch):
    """bfloat16 with widths of whole vectors; everything else is multiplied by PyTorch."""
    shapes, product = [], matmul.matmul

    def counted(a_MK, *arguments, **options):
        shapes.append(tuple(a_MK.shape))
        return product(a_MK, *arguments, **options)

    monkeypatch.setattr(sys.modules["kernels.squared_relu_mlp"], "matmul", counted)
    for shape, dtype in (((1, 2, 12, 8), torch.bfloat16), ((1, 2, 8, 8), torch.float16), ((1, 2, 8, 8), torch.float32)):
        kernels.squared_relu_mlp(*make(shape, dtype, device))
    assert not shapes
    kernels.squared_relu_mlp(*make((1, 2, 8, 16), torch.bfloat16, device))
    measured = tuning.products(torch.empty(0, device=device).get_device()) is not None
    assert shapes == ([(2, 8), (2, 16)] if measured and dispatch.chosen() != "reference" else [])


def test_an_architecture_that_nobody_measured_multiplies_by_pytorch(device, monkeypatch):
    arguments = [tensor.requires_grad_() for tensor in make((2, 9, 16, 24), torch.bfloat16, device)]
    results = []
    for products in (tuning.products, lambda _: None):
        monkeypatch.setattr(matmul, "products", products)
        y = kernels.squared_relu_mlp(*arguments)
        results.append((y, *torch.autograd.grad(y, arguments, torch.ones_like(y))))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, device, compiled):
    arguments = make((2, 7, 16, 24), dtype, device)
    upstream = torch.randn_like(arguments[0])
    results = []
    for function in (kernels.squared_relu_mlp, compiled(kernels.squared_relu_mlp)):
        leaves = [tensor.clone().requires_grad_() for tensor in arguments]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    assert all(map(torch.equal, *results))


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        x, weight = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(16, 8, dtype=torch.bfloat16)
        y = kernels.squared_relu_mlp(x, weight, weight.mT)
    assert (y.shape, y.dtype) == ((2, 3, 8), torch.bfloat16)


X, UP, DOWN, RESIDUAL = make((2, 3, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], UP, DOWN), TypeError, "x_BTD must be a tensor, not list"),
        ((X.int(), UP, DOWN), TypeError, "x_BTD is torch.int32; it may be torch.float32 or"),
        ((X.to(torch.float8_e4m3fn), UP, DOWN), TypeError, "x_BTD is torch.float8_e4m3fn; it may be torch.float32 or"),
        ((X[0], UP, DOWN), ValueError, r"x_BTD has shape \[3, 4\]; it must be \[B, T, D\]"),
        ((X, UP.double(), DOWN), TypeError, "up_HD is torch.float64; it may be torch.float32"),
        ((X, UP[:, :3], DOWN), ValueError, r"up_HD has shape \[5, 3\]; beside x_BTD of .* it must be \[5, 4\]"),
        ((X, UP, DOWN.half()), TypeError, "down_DH is torch.float16; it may be torch.float32"),
        ((X, UP, DOWN.mT), ValueError, r"down_DH has shape \[5, 4\]; beside up_HD of .* it must be \[4, 5\]"),
        ((X, UP.to("meta"), DOWN), ValueError, "up_HD is on meta; it must be on cpu, as x_BTD is"),
        ((X, UP, DOWN.to("meta")), ValueError, "down_DH is on meta; it must be on cpu, as x_BTD is"),
        ((X, UP, DOWN, 1), TypeError, "residual_BTD must be a tensor, not int"),
        ((X, UP, DOWN, RESIDUAL.bfloat16()), TypeError, "residual_BTD is torch.bfloat16; it may be torch.float32"),
        ((X, UP, DOWN, RESIDUAL[:1]), ValueError, r"residual_BTD has shape \[1, 3, 4\]; .* it must be \[2, 3, 4\]"),
        ((X, UP, DOWN, RESIDUAL.to("meta")), ValueError, "residual_BTD is on meta; it must be on cpu"),
    ],
)
@pytest.mark.parametrize("op", [kernels.squared_relu_mlp, kernels.squared_relu_mlp_fp8])
def test_bad_arguments(op, arguments, error, message):
    with pytest.raises(error, match=message):
        op(*arguments)
