from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    """x, weight and targets for [B, T, D, V]."""
    b, t, d, v = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((b, t, d), generator=generator).to(device, dtype)
    weight = (torch.randn((v, d), generator=generator) * 4 * d**-0.5).to(device, dtype)
    return x, weight, torch.randint(0, v, (b, t), generator=generator).to(device)


def slow_losses(x, weight, targets, soft_cap):
    """The equation, row by row, in Python's floats."""
    losses = []
    for row, target in zip(x.double().flatten(0, 1), targets.flatten().tolist(), strict=True):
        logits = (weight.double() @ row).tolist()
        if soft_cap is not None:
            logits = [soft_cap * math.tanh(z / soft_cap) for z in logits]
        largest = max(logits)
        losses.append(largest + math.log(sum(math.exp(z - largest) for z in logits)) - logits[target])
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 5.0, 30])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 8, 127), (1, 5, 24, 513)])
def test_follows_the_equation(shape, soft_cap, dtype, device):
    x, weight, targets = make(shape, dtype, device)
    loss = kernels.linear_cross_entropy(x, weight, targets, soft_cap=soft_cap)
    assert (loss.shape, loss.dtype) == ((), torch.promote_types(dtype, torch.float32))
    # logits of size 16 are rounded once to the dtype; the interpreter's products of 16-bit numbers are exact
    bound = 16 * torch.finfo(dtype).eps + (4e-6 if dtype != torch.float64 else 0)
    expected = slow_losses(x.cpu(), weight.cpu(), targets.cpu(), soft_cap)
    assert float(loss) == pytest.approx(sum(expected) / len(expected), abs=bound)
    losses = kernels.linear_cross_entropy(x, weight, targets, soft_cap=soft_cap, reduction="none")
    assert (losses.shape, losses.dtype) == (targets.shape, loss.dtype)
    assert losses.flatten().tolist() == pytest.approx(expected, abs=bound)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_gradients(soft_cap, reduction, device):
    x, weight, targets = make((2, 3, 4, 7), torch.float64, device)
    arguments = (x.requires_grad_(), weight.requires_grad_())
    options = {"soft_cap": soft_cap, "reduction": reduction}
    for function in (reference.linear_cross_entropy, kernels.linear_cross_entropy):
        assert torch.autograd.gradcheck(lambda *both, f=function: f(*both, targets, **options), arguments)


def test_every_loss_has_an_upstream_gradient_of_its_own(device):
    """That of one loss reaches its row of x alone."""
    x, weight, targets = make((2, 3, 8, 16), torch.float32, device)
    losses = kernels.linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="none")
    (grad,) = torch.autograd.grad(losses[1, 2], x)
    assert grad.any(-1).tolist() == [[False] * 3, [False, False, True]]
    assert kernels.linear_cross_entropy(x[1:, 2:], weight, targets[1:, 2:]).item() == pytest.approx(losses[1, 2].item())


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.24, 0.26, 3.0, 40.0])
def test_the_cap_is_precise_for_small_and_large_logits(size, device):
    """In float32 the gradient of a logit of that many caps, beside float64's."""
    x = torch.full((1, 1, 1), size, device=device)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], device=device)
    target = torch.zeros((1, 1), dtype=torch.int64, device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        loss = kernels.linear_cross_entropy(leaf, weight.to(dtype), target, soft_cap=1.0)
        results.append((float(loss), float(torch.autograd.grad(loss, leaf)[0])))
    (loss, grad), (true_loss, true_grad) = results
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert grad == pytest.approx(true_grad, rel=4e-6, abs=1e-7)


def test_upstream_gradients_scale(device):
    x, weight, targets = make((2, 3, 8, 16), torch.float32, device)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    once = torch.autograd.grad(kernels.linear_cross_entropy(*leaves, targets), leaves)
    twice = torch.autograd.grad(kernels.linear_cross_entropy(*leaves, targets) * 2, leaves)
    assert all(map(torch.equal, [2 * grad for grad in once], twice))


def test_sums_over_many_rows_fit_float16(device):
    """Every row pushes the same way, so that their sum, before it is a mean, is beyond 65,504."""
    x = torch.ones((1, 98304, 1), dtype=torch.float16, device=device)
    weight = torch.zeros((4, 1), dtype=torch.float16, device=device).requires_grad_()
    kernels.linear_cross_entropy(x, weight, torch.zeros((1, 98304), dtype=torch.int64, device=device)).backward()
    assert weight.grad.flatten().tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25], rel=0.02)


def test_a_large_logit_overflows_nothing(device):
    x, weight, targets = make((1, 4, 8, 16), torch.float32, device)
    loss = kernels.linear_cross_entropy(1e4 * x, weight, targets)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("target", [-1, -100, 16, 2**40])
def test_a_target_outside_gives_nan(target, device):
    """From the kernel; PyTorch's cross-entropy raises on a CPU, and on a GPU ends the process's use of it."""
    x, weight, targets = make((1, 4, 8, 16), torch.float32, device)
    targets[0, 2] = target
    if dispatch.chosen() == "reference":
        if device.type == "cuda":
            pytest.skip("would end the process's use of the GPU")
        with pytest.raises(IndexError, match="out of bounds"):
            kernels.linear_cross_entropy(x, weight, targets)
        return
    x.requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, targets)
    assert bool(loss.isnan())
    loss.backward()
    assert x.grad.isnan().all(-1).tolist() == [[False, False, True, False]]


def test_what_is_kept_for_backward(device):
    """Besides the inputs one [B, T, V] in x's dtype."""
    if dispatch.chosen() == "reference":
        pytest.skip("autograd keeps what it likes of the reference")
    x, weight, targets = make((2, 9, 8, 16), torch.bfloat16, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernels.linear_cross_entropy(x.requires_grad_(), weight, targets)
    given = {tensor.data_ptr() for tensor in (x, weight)}
    assert [tensor.nbytes for tensor in kept if tensor.data_ptr() not in given] == [2 * 9 * 16 * 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16])
def test_targets_of_any_integer_dtype(dtype, device):
    x, weight, targets = make((2, 3, 8, 16), torch.float32, device)
    expected = kernels.linear_cross_entropy(x, weight, targets)
    assert torch.equal(kernels.linear_cross_entropy(x, weight, targets.to(dtype)), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, reduction, device, compiled):
    x, weight, targets = make((2, 7, 8, 24), dtype, device)
    results = []
    for function in (kernels.linear_cross_entropy, compiled(kernels.linear_cross_entropy)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        loss = function(*leaves, targets, soft_cap=4.0, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss, leaves, 0.5 * torch.ones_like(loss))))
    assert all(map(torch.equal, *results))


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        x, weight = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(16, 8, dtype=torch.bfloat16)
        targets = torch.zeros(2, 3, dtype=torch.int64)
        loss = kernels.linear_cross_entropy(x, weight, targets)
        losses = kernels.linear_cross_entropy(x, weight, targets, reduction="none")
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (losses.shape, losses.dtype) == ((2, 3), torch.float32)


X, WEIGHT, TARGETS = make((2, 3, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], WEIGHT, TARGETS), TypeError, "x_BTD must be a tensor, not list"),
        ((X.int(), WEIGHT, TARGETS), TypeError, "x_BTD is torch.int32; it may be torch.float32 or"),
        ((X[0], WEIGHT, TARGETS), ValueError, r"x_BTD has shape \[3, 4\]; it must be \[B, T, D\]"),
        ((X, WEIGHT.half(), TARGETS), TypeError, "weight_VD is torch.float16; it may be torch.float32"),
        ((X, WEIGHT[:, :3], TARGETS), ValueError, r"weight_VD has shape \[5, 3\]; .* it must be \[5, 4\]"),
        ((X, WEIGHT[:0], TARGETS), ValueError, "weight_VD's number of rows is 0; it must be from 1 to 1048576"),
        ((X, WEIGHT.to("meta"), TARGETS), ValueError, "weight_VD is on meta; it must be on cpu, as x_BTD is"),
        ((X, WEIGHT, TARGETS.float()), TypeError, "targets_BT is torch.float32; it may be torch.int64 or"),
        ((X, WEIGHT, TARGETS[:1]), ValueError, r"targets_BT has shape \[1, 3\]; .* it must be \[2, 3\]"),
        ((X, WEIGHT, TARGETS.to("meta")), ValueError, "targets_BT is on meta; it must be on cpu"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.linear_cross_entropy(*arguments)


@pytest.mark.parametrize(
    ("soft_cap", "error", "message"),
    [
        ("30", TypeError, "soft_cap must be a number or None, not str"),
        (0.0, ValueError, "soft_cap is 0.0; it must be above 0 and finite"),
        (float("inf"), ValueError, "soft_cap is inf; it must be above 0 and finite"),
        (float("nan"), ValueError, "soft_cap is nan; it must be above 0"),
    ],
)
def test_bad_caps(soft_cap, error, message):
    with pytest.raises(error, match=message):
        kernels.linear_cross_entropy(X, WEIGHT, TARGETS, soft_cap=soft_cap)


@pytest.mark.parametrize(
    ("reduction", "error", "message"),
    [
        (None, TypeError, "reduction must be a string, not NoneType"),
        ("sum", ValueError, "reduction is 'sum'; it may be 'mean' or 'none'"),
    ],
)
def test_bad_reductions(reduction, error, message):
    with pytest.raises(error, match=message):
        kernels.linear_cross_entropy(X, WEIGHT, TARGETS, reduction=reduction)
