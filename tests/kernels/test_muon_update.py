"""Muon's in-place kernels beside their definitions."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch, muon_update, newton_schulz_tiles, reference
from kernels.muon_update import momentum_newton_schulz_, muon_update_

SHAPES = [(130, 70), (20, 300), (128, 128), (1, 5), (513, 3)]
SCALES = [1.5, 1.0, 0.25, 2.0, 1.0]


@pytest.fixture
def launched(monkeypatch):
    """Names of the ops whose kernels were asked for."""
    names = []
    implementation = dispatch.implementation

    def watched(name, tensor):
        names.append(name)
        return implementation(name, tensor)

    monkeypatch.setattr(dispatch, "implementation", watched)
    return names


@pytest.fixture
def started(monkeypatch):
    """Names of the kernels that were started."""
    names = []
    for module in (muon_update, newton_schulz_tiles):
        start = module.launch

        def watched(kernel, *arguments, start=start, **options):
            names.append(kernel.__name__)
            start(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", watched)
    return names


def matrices(device, dtype=torch.float32, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * size).to(device, dtype) for shape in SHAPES]


def factor(value, kind, device):
    return torch.tensor(value, device=device) if kind == "tensor" else value


def both(op, definition, *lists, **options):
    """(what the op returns, what it leaves in the first list), and the same of the definition."""
    found = []
    for function in (op, definition):
        copies = [[tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for tensor in each] for each in lists]
        returned = function(*copies, **options)
        for before, after in zip(lists[1:], copies[1:], strict=True):  # only the first list is changed
            assert all(
                torch.equal(b, a) if isinstance(b, torch.Tensor) else b == a for b, a in zip(before, after, strict=True)
            )
        found.append((returned, copies[0]))
    return found


def ulps(found, expected):
    """The largest difference in units of the dtype's precision at the tensor's size."""
    eps = torch.finfo(expected.dtype).eps
    return float((found.double() - expected.double()).abs().max() / (eps * expected.double().abs().max()))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("dtype", "nesterov", "kind", "size"),
    [
        (torch.float32, True, "number", 1.0),
        (torch.float32, False, "tensor", 1.0),
        (torch.bfloat16, True, "tensor", 1.0),
        (torch.bfloat16, False, "number", 1.0),
        # sizes of which float32 holds no products
        (torch.float32, True, "tensor", 1e-20),
        (torch.bfloat16, False, "number", 1e-20),
        (torch.float32, False, "number", 1e25),
        (torch.bfloat16, True, "number", 1e25),
    ],
)
def test_momentum_moves_and_what_is_ahead_is_orthogonalized(dtype, size, nesterov, kind, device, launched):
    buffers, gradients = matrices(device, dtype, 1, size), matrices(device, dtype, 2, size)
    (ours, moved), (theirs, expected) = both(
        momentum_newton_schulz_,
        reference.momentum_newton_schulz_,
        buffers,
        gradients,
        momentum=factor(0.9, kind, device),
        nesterov=nesterov,
        steps=2,
    )
    assert "momentum_newton_schulz_" in launched
    for one, other in zip(moved, expected, strict=True):
        assert ulps(one, other) <= 1
        assert one.dtype == dtype
    for one, other in zip(ours, theirs, strict=True):
        # both round some six products to bfloat16, each in its own way
        assert (one.float() - other.float()).norm() <= 0.05 * other.float().norm()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_gradients_are_clipped_on_their_way(size, device, launched):
    buffers, gradients = matrices(device, seed=1, size=size), matrices(device, seed=2, size=size)
    options = {"momentum": 0.9, "nesterov": True, "clip": torch.tensor(0.125, device=device), "steps": 2}
    (ours, moved), (theirs, expected) = both(
        momentum_newton_schulz_, reference.momentum_newton_schulz_, buffers, gradients, **options
    )
    assert "momentum_newton_schulz_" in launched
    assert all(ulps(one, other) <= 1 for one, other in zip(moved, expected, strict=True))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 0.05 * other.float().norm()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_second_step_sees_the_first_ones_momentum(nesterov, device):
    ours, theirs = [torch.zeros(64, 32, device=device)], [torch.zeros(64, 32, device=device)]
    for seed, momentum in ((1, 0.5), (2, 0.9), (3, 0.95)):
        gradient = [torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)).to(device)]
        results = [
            function(buffers, gradient, momentum=momentum, nesterov=nesterov)[0].float()
            for function, buffers in ((momentum_newton_schulz_, ours), (reference.momentum_newton_schulz_, theirs))
        ]
    assert ulps(ours[0], theirs[0]) <= 2
    assert (results[0] - results[1]).norm() <= 0.03 * results[1].norm()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_decay_and_move(dtype, kind, device, launched):
    weights, updates = matrices(device, dtype, 3), matrices(device, dtype, 4)
    (_, ours), (_, theirs) = both(
        muon_update_,
        reference.muon_update_,
        weights,
        updates,
        SCALES,
        lr=factor(0.05, kind, device),
        weight_decay=0.1,
    )
    assert "muon_update_" in launched
    for one, other in zip(ours, theirs, strict=True):
        # the definition rounds three times on the way where the dtype is narrow
        assert ulps(one, other) <= (2 if dtype == torch.float32 else 3)


@pytest.mark.usefixtures("triton_kernels")
def test_updates_of_another_dtype(device, launched):
    """As they come: weights in float32, updates in bfloat16."""
    weights, updates = matrices(device, torch.float32, 5), matrices(device, torch.bfloat16, 6)
    (_, ours), (_, theirs) = both(
        muon_update_, reference.muon_update_, weights, updates, SCALES, lr=0.05, weight_decay=0.1
    )
    assert launched == ["muon_update_"]
    assert all(ulps(one, other) <= 2 for one, other in zip(ours, theirs, strict=True))


def strided(tensors):
    return [torch.stack((tensor, tensor), dim=-1)[..., 0] for tensor in tensors]


def askew(tensors):
    return [torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t) for t in tensors]


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    "change",
    [
        strided,
        askew,
        lambda tensors: [t.double() for t in tensors],
        lambda tensors: [*tensors[:-1], tensors[-1].half()],
        lambda tensors: [*tensors[:-1], tensors[-1][:0]],
    ],
    ids=["strided", "misaligned", "float64", "mixed dtypes", "an empty one"],
)
def test_what_the_kernels_do_not_take_goes_to_the_definition(change, device, started):
    buffers, gradients = change(matrices(device, seed=7)), change(matrices(device, seed=8))
    results = momentum_newton_schulz_(buffers, gradients, momentum=0.9, nesterov=True)
    assert started == []
    assert len(results) == len(SHAPES)
    weights, before = change(matrices(device, seed=9)), change(matrices(device, seed=9))
    muon_update_(weights, gradients, SCALES, lr=0.1, weight_decay=0.0)
    assert started == []
    assert not any(map(torch.equal, weights[:-1], before[:-1]))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("change", [list, strided], ids=["aligned", "strided"])
def test_updates_as_they_come_are_as_tensors(change, device, started):
    """They are made when they are asked for; the kernel goes without."""
    updates = momentum_newton_schulz_(
        matrices(device, seed=7), matrices(device, seed=8), momentum=0.9, nesterov=True, steps=2
    )
    assert [tuple(update.shape) for update in updates] == SHAPES
    assert len(updates) == len(SHAPES)
    weights, others = change(matrices(device, seed=9)), change(matrices(device, seed=9))
    muon_update_(weights, updates, SCALES, lr=0.1, weight_decay=0.1)
    assert started[3:] == ["muon_update_kernel"] * (change is list)
    muon_update_(others, [updates[index].clone() for index in range(len(SHAPES))], SCALES, lr=0.1, weight_decay=0.1)
    assert all(map(torch.equal, weights, others))


@pytest.mark.usefixtures("every_implementation")
def test_nothing_to_do():
    assert momentum_newton_schulz_([], [], momentum=0.9, nesterov=True) == []
    assert muon_update_([], [], [], lr=0.1, weight_decay=0.1) is None


@pytest.mark.usefixtures("triton_kernels")
def test_parameters_are_updated_without_a_graph(device):
    weight = torch.nn.Parameter(torch.randn(8, 8, device=device))
    update = torch.randn(8, 8, device=device).bfloat16()
    with torch.no_grad():
        muon_update_([weight], [update], [1.0], lr=0.1, weight_decay=0.0)
    assert weight.requires_grad
    assert weight.grad_fn is None


@pytest.mark.usefixtures("triton_kernels")
def test_a_graph_that_kept_a_weight_notices_its_change(device):
    weight = torch.nn.Parameter(torch.randn(8, 8, device=device))
    kept = (weight * weight).sum()
    with torch.no_grad():
        muon_update_([weight], [torch.randn(8, 8, device=device)], [1.0], lr=0.1, weight_decay=0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.usefixtures("triton_kernels")
def test_traced_steps_run_the_definitions(device, compiled):
    def step(module, weight, buffer, gradient):
        (update,) = module.momentum_newton_schulz_([buffer], [gradient], momentum=0.9, nesterov=True)
        module.muon_update_([weight], [update], [1.0], lr=0.1, weight_decay=0.1)

    ours, theirs = (
        [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).to(device) for seed in range(3)]
        for _ in range(2)
    )
    with torch.no_grad():
        compiled(step)(muon_update, *ours)
        step(reference, *theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("triton_kernels")
def test_lists_that_do_not_fit_are_refused(device):
    """The kernels go by one list's sizes and would write past the end of the other's."""
    first, second = torch.randn(8, 16, device=device), torch.randn(8, 16, device=device)
    with pytest.raises(ValueError, match="1 buffers for 2 gradients"):
        momentum_newton_schulz_([torch.zeros_like(first)], [first, second], momentum=0.9, nesterov=True)
    weight = torch.zeros(8, 8, device=device)
    with pytest.raises(ValueError, match="differ in size"):
        muon_update_([weight], [first], [1.0], lr=0.1, weight_decay=0.0)
