from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    gate = torch.randn(shape[2], generator=generator).to(device, dtype)
    starts = torch.rand(shape[:2], generator=generator).lt(0.3).to(device)
    return x, gate, starts


def slow_smear_gate(x, gate, starts=None):
    """The equation, element by element in float64; also the size that its rounding errors scale with."""
    x, gate = (tensor.detach().cpu().to(torch.float64).numpy() for tensor in (x, gate))
    y, size = np.zeros_like(x), np.zeros_like(x)
    for b, i, d in np.ndindex(*x.shape):
        g = 1 / (1 + np.exp(-gate[d]))
        before = 0.0 if i == 0 or (starts is not None and starts[b, i]) else x[b, i - 1, d]
        y[b, i, d] = (1 - g) * x[b, i, d] + g * before
        size[b, i, d] = abs(x[b, i, d]) + abs(g * before)
    return torch.from_numpy(y), torch.from_numpy(size)


def assert_follows_the_equation(x, gate, starts):
    y = reference.smear_gate(x, gate, starts)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    truth, size = slow_smear_gate(x, gate, starts)
    # In the computing dtype, g is good to 2 units and so is 1 - g (absolutely, hence |x| in `size`), the
    # products and the sum to half a unit each; then half a unit of the output's dtype.
    computing = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    output = torch.finfo(x.dtype)
    bound = 4 * computing * size + output.eps / 2 * truth.abs() + output.smallest_normal * output.eps
    error = (y.cpu().to(torch.float64) - truth).abs()
    assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 127), (3, 127, 3), (1, 2, 513)])
@pytest.mark.parametrize("with_starts", [False, True])
def test_follows_the_equation(shape, dtype, with_starts, device):
    x, gate, starts = make(shape, dtype, device)
    assert_follows_the_equation(x, gate, starts if with_starts else None)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_follows_the_equation_for_any_shape(shape, dtype, seed, device):
    assert_follows_the_equation(*make(shape, dtype, device, seed))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape, device):
    x, gate, starts = make(shape, device=device)
    x.requires_grad_()
    y = kernels.smear_gate(x, gate, starts)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape


def test_gate_may_have_another_dtype(device):
    x, gate, _ = make((2, 5, 8), torch.bfloat16, device)
    y = kernels.smear_gate(x, gate.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, kernels.smear_gate(x, gate))


@pytest.mark.parametrize("with_starts", [False, True])
def test_gradients(with_starts, device):
    x, gate, starts = make((2, 5, 3), torch.float64, device)
    starts[0, 2] = True
    x.requires_grad_()
    gate.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, gate: reference.smear_gate(x, gate, starts if with_starts else None), (x, gate)
    )


def test_a_document_start_hears_nothing_from_before(device):
    x, gate, _ = make((1, 4, 3), device=device)
    starts = torch.tensor([[False, False, True, False]], device=device)
    x[0, 1] = float("nan")
    x.requires_grad_()
    y = kernels.smear_gate(x, gate, starts)
    y[0, 2:].sum().backward()
    assert torch.equal(y[:, 2:], kernels.smear_gate(x[:, 2:], gate))
    assert torch.equal(x.grad[0, :2], torch.zeros_like(x.grad[0, :2]))


def test_non_contiguous_inputs(device):
    x, gate, starts = make((4, 6, 5), device=device)
    expected = kernels.smear_gate(x, gate, starts)
    spread_gate = torch.stack((gate, gate), dim=1)[:, 0]
    spread_starts = starts.mT.contiguous().mT
    for strided in (x.transpose(0, 2).contiguous().transpose(0, 2), torch.stack((x, x), dim=-1)[..., 0]):
        assert not strided.is_contiguous()
        assert torch.equal(kernels.smear_gate(strided, spread_gate, spread_starts), expected)


def test_inputs_are_left_alone(device):
    inputs = make((2, 5, 8), device=device)
    copies = [tensor.clone() for tensor in inputs]
    kernels.smear_gate(*inputs)
    assert all(map(torch.equal, inputs, copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_starts", [False, True])
def test_compiled_equals_eager(with_starts, dtype, device, compiled):
    x, gate, starts = make((2, 7, 16), dtype, device)
    upstream = torch.randn_like(x)
    results = []
    for function in (kernels.smear_gate, compiled(kernels.smear_gate)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate)]
        y = function(*leaves, starts if with_starts else None)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    assert all(map(torch.equal, *results))


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        y = kernels.smear_gate(torch.empty(2, 3, 4, dtype=torch.bfloat16), torch.empty(4))
    assert (y.shape, y.dtype) == ((2, 3, 4), torch.bfloat16)


X, GATE, STARTS = make((2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], GATE), TypeError, "x_BTD must be a tensor, not list"),
        ((X, 0.5), TypeError, "gate_D must be a tensor, not float"),
        ((X.int(), GATE), TypeError, "x_BTD is torch.int32; it may be torch.float32 or"),
        ((X, GATE.to(torch.complex64)), TypeError, "gate_D is torch.complex64; it may be torch.float32 or"),
        ((X[0], GATE), ValueError, r"x_BTD has shape \[3, 4\]; it must be \[B, T, D\]"),
        ((X, GATE[None]), ValueError, r"gate_D has shape \[1, 4\]; it must be \[D\]"),
        ((X, GATE[:1]), ValueError, r"gate_D has shape \[1\]; beside x_BTD of shape \[2, 3, 4\] it must be \[4\]"),
        ((X, GATE.to("meta")), ValueError, "gate_D is on meta; it must be on cpu, as x_BTD is"),
        ((X, GATE, 1), TypeError, "document_start_BT must be a tensor, not int"),
        ((X, GATE, STARTS.int()), TypeError, "document_start_BT is torch.int32; it may be torch.bool"),
        ((X, GATE, STARTS[0]), ValueError, r"document_start_BT has shape \[3\]; it must be \[B, T\]"),
        ((X, GATE, STARTS[:1]), ValueError, r"document_start_BT has shape \[1, 3\]; .* it must be \[2, 3\]"),
        ((X, GATE, STARTS.to("meta")), ValueError, "document_start_BT is on meta; it must be on cpu"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.smear_gate(*arguments)
