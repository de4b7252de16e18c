"""Muon against RECIPE.md's formula written out, and against PyTorch's own where the two agree."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from golfmodel.optim.muon import Muon
from kernels import newton_schulz

SHAPES = [(6, 6), (4, 9), (9, 4), (64, 16), (1, 5), (5, 1)]


def random_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 3


def recipe_step(
    weight: Tensor, gradient: Tensor, buffer: Tensor, *, lr: float, wd: float, mu: float, steps: int = 5
) -> tuple[Tensor, Tensor]:
    """(new weight, new buffer) in float64, by the formula of RECIPE.md."""
    buffer = mu * buffer + gradient.double()
    # Only the orthogonalization is the op's own: it works in bf16 and has tests of its own.
    update = newton_schulz((gradient.double() + mu * buffer).float(), steps=steps).double()
    rows, columns = weight.shape
    update = update * math.sqrt(max(1, rows / columns))
    weight = weight * (1 - lr * wd)
    return weight - lr * update, buffer


def test_steps_follow_the_recipe_with_a_momentum_that_changes():
    parameters = random_parameters()
    weights = [p.detach().double() for p in parameters]
    buffers = [torch.zeros_like(w) for w in weights]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.3, momentum=0.9)
    for step, (lr, mu) in enumerate([(0.1, 0.5), (0.07, 0.8), (0.02, 0.95)]):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = lr, mu
        set_gradients(parameters, step)
        for index, parameter in enumerate(parameters):
            weights[index], buffers[index] = recipe_step(
                weights[index], parameter.grad, buffers[index], lr=lr, wd=0.3, mu=mu
            )
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        # An input that rounds to another bf16 number may change an update by some 2^-8 of its size, at most 1.2.
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-3)


def orthogonalized(gradient: Tensor) -> Tensor:
    """The Newton-Schulz iteration of RECIPE.md in float64."""
    X = gradient.double() / (gradient.double().norm() + 1e-7)
    tall = X.size(0) > X.size(1)
    X = X.T if tall else X
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_update_is_orthogonalized_and_scaled(shape):
    weight = nn.Parameter(torch.zeros(shape))
    set_gradients([weight], 0)
    Muon([weight], lr=1.0).step()
    expected = -math.sqrt(max(1, shape[0] / shape[1])) * orthogonalized(weight.grad)
    # Some 15 products in bf16, each rounded to 2^-9 of its size.
    error = (weight.detach().double() - expected).norm() / expected.norm()
    assert error < 15 * 2**-9


def test_weight_decay_is_decoupled():
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 2.0 * (1 - 0.1 * 0.5)))


def test_without_nesterov_the_update_is_the_buffer():
    weight = nn.Parameter(torch.zeros(4, 9))
    optimizer = Muon([weight], lr=1.0, momentum=0.9, nesterov=False)
    buffer = torch.zeros(4, 9)
    for step in range(3):
        before = weight.detach().clone()
        set_gradients([weight], step)
        buffer = 0.9 * buffer + weight.grad
        optimizer.step()
    torch.testing.assert_close(before - weight.detach(), newton_schulz(buffer).float(), rtol=0, atol=2**-7)
    ahead = newton_schulz(weight.grad + 0.9 * buffer).float()
    assert (before - weight.detach() - ahead).abs().max() > 0.05


def test_number_of_newton_schulz_steps():
    weight = nn.Parameter(torch.zeros(8, 8))
    set_gradients([weight], 0)
    Muon([weight], lr=1.0, ns_steps=2).step()
    assert torch.equal(-weight.detach(), newton_schulz(1.95 * weight.grad, steps=2).float())


@pytest.mark.parametrize("nesterov", [True, False])
def test_parity_with_pytorch_at_constant_momentum(nesterov):
    """PyTorch's buffer is `mu * buf + (1 - mu) * g` and its update `lerp(g, buf, mu)`: at constant momentum both are
    (1 - mu) times ours, which Newton-Schulz normalises away. "original" is its name for the recipe's scale."""
    ours, theirs = random_parameters(), random_parameters()
    start = random_parameters()
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizers = [Muon(ours, **options), torch.optim.Muon(theirs, **options, adjust_lr_fn="original")]
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
    for mine, other, begin in zip(ours, theirs, start, strict=True):
        # Theirs rounds to bf16 before it normalises.
        error = (mine - other).norm() / (other - begin).norm()
        assert error < 0.03


@pytest.mark.parametrize("nesterov", [True, False])
def test_tensors_for_rates_are_as_numbers_and_may_change_in_place(nesterov):
    numbers, tensors = random_parameters(), random_parameters()
    lr, momentum = torch.tensor(0.0), torch.tensor(0.0)
    by_number = Muon(numbers, weight_decay=0.3, nesterov=nesterov)
    by_tensor = Muon(tensors, lr=lr, weight_decay=0.3, momentum=momentum, nesterov=nesterov)
    for step, (rate, mu) in enumerate([(0.1, 0.5), (0.07, 0.8), (0.02, 0.95)]):
        by_number.param_groups[0].update(lr=rate, momentum=mu)
        lr.fill_(rate)
        momentum.fill_(mu)
        for parameters, optimizer in ((numbers, by_number), (tensors, by_tensor)):
            set_gradients(parameters, step)
            optimizer.step()
    for one, other in zip(numbers, tensors, strict=True):
        # A momentum of float32 and one of float64 may round an input of Newton-Schulz to different bfloat16 numbers.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_a_scheduler_moves_the_rate():
    parameters = random_parameters()
    optimizer = Muon(parameters, lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    set_gradients(parameters, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters = random_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
    set_gradients(parameters[:2], 0)
    optimizer.step()
    for index, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
        assert torch.equal(parameter, old) == (index >= 2)
        assert (parameter in optimizer.state) == (index < 2)


def test_no_gradients_at_all():
    parameters = random_parameters()
    Muon(parameters).step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, random_parameters(), strict=True))


def test_gradients_are_not_changed():
    parameters = random_parameters()
    set_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters]
    Muon(parameters).step()
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_dtype(dtype):
    weight = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer = Muon([weight], lr=1.0)
    optimizer.step()
    assert weight.dtype == optimizer.state[weight]["momentum_buffer"].dtype == dtype
    assert 0.3 < weight.detach().float().norm() / 4**0.5 < 1.3


def test_the_closure_is_called_with_gradients_and_its_loss_returned():
    weight = nn.Parameter(torch.eye(3))
    optimizer = Muon([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert not torch.equal(weight.detach(), torch.eye(3))
    assert optimizer.step() is None


def test_a_restored_state_goes_on_the_same():
    parameters = random_parameters()
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    for step in range(2):
        set_gradients(parameters, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    restored = Muon(others, lr=0.9)
    restored.load_state_dict(state)
    for each, its_parameters in ((optimizer, parameters), (restored, others)):
        set_gradients(its_parameters, 2)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_step_never_waits_for_the_device(implementation, monkeypatch):
    """But the first, which makes what the later ones keep."""
    monkeypatch.setenv("GOLF_KERNELS", implementation)
    device = torch.device("cuda")
    parameters = [nn.Parameter(parameter.detach().to(device)) for parameter in random_parameters()]
    rates = {"lr": torch.tensor(0.1, device=device), "momentum": torch.tensor(0.9, device=device)}
    optimizer = Muon(parameters, **rates, weight_decay=0.1)
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    for number in range(3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.cuda.set_sync_debug_mode("default" if number == 0 else "error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)


def test_a_copy_goes_on_the_same():
    parameters = random_parameters()
    optimizer = Muon(parameters, lr=0.1)
    set_gradients(parameters, 0)
    optimizer.step()
    set_gradients(parameters, 1)
    twin, others = copy.deepcopy((optimizer, parameters))
    for other, parameter in zip(others, parameters, strict=True):
        other.grad = parameter.grad.clone()
    optimizer.step()
    twin.step()
    assert all(map(torch.equal, parameters, others))


def test_groups_have_their_own_rates():
    first, second = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = Muon([{"params": [first], "lr": 1.0}, {"params": [second]}], lr=0.25)
    for parameter in (first, second):
        set_gradients([parameter], 0)
    optimizer.step()
    assert torch.equal(first.detach() * 0.25, second.detach())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lr": -0.1}, "lr -0.1"),
        ({"weight_decay": -1}, "weight_decay -1"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"momentum": -0.1}, "momentum -0.1"),
        ({"ns_steps": 0}, "ns_steps 0"),
    ],
)
def test_bad_numbers(options, part):
    with pytest.raises(ValueError, match=part):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_only_matrices(shape):
    with pytest.raises(ValueError, match="2-D"):
        Muon([nn.Parameter(torch.zeros(shape))])
