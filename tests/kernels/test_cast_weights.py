"""Weights of many shapes cast in one launch: what the equivalence suite's draws do not have."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (3, 127), (127, 3), (0, 4), (4, 0), (2, 513), (16, 64), (1, 8))

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def weights_and_scales(device, dtype=torch.float32, scale_dtype=torch.float32):
    """A matrix of each shape, every other one with a scale."""
    matrices = [make(shape, dtype, device, seed) for seed, shape in enumerate(SHAPES)]
    scales = [make(shape[:1], scale_dtype, device, 50 + i) if i % 2 else None for i, shape in enumerate(SHAPES)]
    return matrices, scales


def leaves_of(tensors):
    return [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]


def within(found, expected, ulps):
    """Whether two tensors differ by at most so many units of the dtype's precision, of each element."""
    eps = torch.finfo(expected.dtype).eps
    return bool(((found.double() - expected.double()).abs() <= ulps * eps * expected.double().abs()).all())


@pytest.mark.parametrize("result_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_the_equation(dtype, result_dtype, device):
    matrices, scales = weights_and_scales(device, dtype)
    results = kernels.cast_weights(matrices, result_dtype, scales=scales)
    for result, weight, scale in zip(results, matrices, scales, strict=True):
        wide = torch.promote_types(dtype, torch.float32)
        expected = weight.to(wide) if scale is None else torch.einsum("rc,r->rc", weight.to(wide), scale.to(wide))
        assert (result.shape, result.dtype, result.device) == (weight.shape, result_dtype, weight.device)
        # one rounding; Triton's interpreter cuts bfloat16 off
        assert within(result, expected.to(result_dtype), 1)


def test_float64_loses_nothing_and_is_rounded_by_way_of_float32(device):
    matrices = [torch.tensor([[1 + 2.0**-40, 1 + 2.0**-11 + 2.0**-30]], dtype=torch.float64, device=device)]
    assert torch.equal(kernels.cast_weights(matrices, torch.float64)[0], matrices[0])
    assert torch.equal(kernels.cast_weights(matrices, torch.float16)[0], matrices[0].float().half())


def test_joined_matrices_are_one_result(device):
    matrices = [make(shape, device=device, seed=i) for i, shape in enumerate(((3, 5), (1, 5), (4, 5), (2, 7), (6, 5)))]
    scales = [None, make((1,), device=device, seed=7), None, make((2,), device=device, seed=8), None]
    results = kernels.cast_weights(matrices, torch.float32, scales=scales, joined=(3, 1, 1))
    expected = [w if s is None else s[:, None] * w for w, s in zip(matrices, scales, strict=True)]
    assert torch.equal(results[0], torch.cat(expected[:3]))
    assert torch.equal(results[1], expected[3])
    assert torch.equal(results[2], expected[4])


def test_special_values(device):
    weight = torch.tensor([[float("inf"), -float("inf"), float("nan"), -0.0, 1e38, 1e-45]], device=device)
    for scale in (None, torch.tensor([1.0], device=device)):
        (result,) = kernels.cast_weights([weight], torch.float16, scales=[scale])
        expected = weight.half()
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


@pytest.mark.parametrize("joined", [None, [1, 1, 2]])
def test_gradients(joined, device):
    matrices = [make(shape, torch.float64, device, i) for i, shape in enumerate(((2, 3), (1, 4), (2, 5), (1, 5)))]
    scales = [make((2,), torch.float64, device, 9), None, None, make((1,), torch.float64, device, 8)]
    given = [tensor.requires_grad_() for tensor in (*matrices, scales[0], scales[3])]

    def cast(*tensors):
        all_scales = [tensors[4], None, None, tensors[5]]
        return tuple(kernels.cast_weights(tensors[:4], torch.float64, scales=all_scales, joined=joined))

    assert torch.autograd.gradcheck(cast, given)


def test_gradients_have_the_dtypes_of_what_they_are_of(device):
    matrices, scales = (leaves_of(tensors) for tensors in weights_and_scales(device, torch.float16, torch.bfloat16))
    results = kernels.cast_weights(matrices, torch.float32, scales=scales)
    sum(result.sum() for result in results).backward()
    for matrix, scale in zip(matrices, scales, strict=True):
        assert (matrix.grad.dtype, matrix.grad.shape) == (torch.float16, matrix.shape)
        if scale is None:
            assert torch.equal(matrix.grad, torch.ones_like(matrix))
            continue
        assert (scale.grad.dtype, scale.grad.shape) == (torch.bfloat16, scale.shape)
        assert torch.equal(matrix.grad, scale.detach()[:, None].half().expand(matrix.shape))
        total = matrix.detach().double().sum(1)
        size = matrix.detach().double().abs().sum(1)
        assert bool(((scale.grad.double() - total).abs() <= 2**-7 * total.abs() + 1e-5 * size).all())


def test_a_result_that_is_not_used_gives_no_gradient(device):
    matrices, scales = map(leaves_of, weights_and_scales(device))
    results = kernels.cast_weights(matrices, torch.bfloat16, scales=scales, joined=[1] * len(matrices))
    (results[1].float().sum() + results[6].float().sum()).backward()
    assert [matrix.grad is not None for matrix in matrices] == [index in (1, 6) for index in range(len(matrices))]
    assert [scale is not None and scale.grad is not None for scale in scales] == [
        index == 1 for index in range(len(matrices))
    ]


@pytest.mark.parametrize("trained", ["matrices", "scales"])
def test_only_what_requires_grad_gets_one(trained, device):
    matrices, scales = [make((3, 5), device=device, seed=i) for i in range(3)], [None, make((3,), device=device), None]
    if trained == "matrices":
        matrices[2].requires_grad_()
    else:
        scales[1].requires_grad_()
    results = kernels.cast_weights(matrices, torch.float32, scales=scales)
    assert [result.requires_grad for result in results] == [False, trained == "scales", trained == "matrices"]
    upstream = make((3, 5), device=device, seed=9)
    (results[2 if trained == "matrices" else 1] * upstream).sum().backward()
    if trained == "matrices":
        assert torch.equal(matrices[2].grad, upstream)
    else:
        torch.testing.assert_close(scales[1].grad, (upstream * matrices[1]).sum(1))
    assert [matrix.grad is None for matrix in matrices] == [True, True, trained != "matrices"]


def test_no_gradients_where_none_are_asked_for(device):
    matrices, scales = map(leaves_of, weights_and_scales(device))
    with torch.no_grad():
        assert not any(result.requires_grad for result in kernels.cast_weights(matrices, torch.half, scales=scales))


def test_gradients_reach_what_a_matrix_was_computed_from_and_one_tensor_twice(device):
    leaf = make((3, 5), device=device).requires_grad_()
    results = kernels.cast_weights([leaf, 2 * leaf, leaf.mT, leaf], torch.float32)
    sum(result.sum() for result in results).backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 5))


def test_upstream_gradients_of_any_layout(device):
    matrices, scales = [make((4, 6), device=device), make((3, 6), device=device, seed=1)], [None, make((3,))]
    leaves = leaves_of(matrices), leaves_of([None, scales[1].to(device)])
    (result,) = kernels.cast_weights(leaves[0], torch.float32, scales=leaves[1], joined=[2])
    upstream = make((6, 7), device=device, seed=3)
    wanted = [*leaves[0], leaves[1][1]]
    plain = torch.autograd.grad(result, wanted, upstream.mT.contiguous(), retain_graph=True)
    askew = torch.empty(43, device=device)[1:].view(7, 6).copy_(upstream.mT)
    # PyTorch may add up a strided gradient in another order: of n terms either sum is off by (n - 1) * 2^-24 of their
    # absolute values' sum at most.
    terms = (upstream.mT[4:] * matrices[1]).abs().sum(dim=1)
    bound = 2 * 5 * 2.0**-24 * terms if dispatch.chosen() == "reference" else torch.zeros_like(terms)
    for other in (upstream.mT, askew):
        *of_matrices, of_scale = torch.autograd.grad(result, wanted, other, retain_graph=True)
        assert all(map(torch.equal, of_matrices, plain))
        assert bool(((of_scale - plain[-1]).abs() <= bound).all())
    (ones,) = torch.autograd.grad(result.sum(), leaves[0][:1], retain_graph=True)  # expanded from one number
    assert torch.equal(ones, torch.ones_like(ones))


def test_results_share_no_memory(device):
    """Not with each other, and not with a matrix, of the same dtype too."""
    matrices, _ = weights_and_scales(device)
    for _ in range(2):
        results = kernels.cast_weights(matrices, torch.float32)
        addresses = [tensor.untyped_storage().data_ptr() for tensor in (*matrices, *results) if tensor.numel()]
        assert len(set(addresses)) == len(addresses)
        assert all(result.data_ptr() % 16 == 0 for result in results)


def test_a_second_call_sees_what_was_changed_in_place(device):
    matrices, scales = weights_and_scales(device)
    kernels.cast_weights(matrices, torch.float32, scales=scales)
    for matrix in matrices:
        matrix.mul_(-2)
    results = kernels.cast_weights(matrices, torch.float32, scales=scales)
    expected = reference.cast_weights(matrices, torch.float32, scales, [1] * len(matrices))
    assert all(map(torch.equal, results, expected))


def test_a_changed_weight_is_noticed_before_its_scale_gets_a_wrong_gradient(device):
    weight, scale = make((3, 5), device=device), make((3,), device=device).requires_grad_()
    (result,) = kernels.cast_weights([weight], torch.float32, scales=[scale])
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_one_launch_each_way(device, monkeypatch):
    if dispatch.chosen() == "reference":
        pytest.skip("the reference launches what PyTorch launches")
    module, names = sys.modules["kernels.cast_weights"], []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *a, **k: names.append(kernel.__name__) or launch(kernel, *a, **k)
    )
    matrices, scales = map(leaves_of, weights_and_scales(device))
    results = kernels.cast_weights(matrices, torch.bfloat16, scales=scales)
    sum(result.float().sum() for result in results).backward()
    assert names == ["cast_weights_fwd_kernel", "cast_weights_bwd_kernel"]


def test_what_is_kept_for_backward(device):
    """The scales and their matrices, which are there anyway, and nothing else."""
    if dispatch.chosen() == "reference":
        pytest.skip("autograd keeps what it likes of the reference")
    matrices, scales = map(leaves_of, weights_and_scales(device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernels.cast_weights(matrices, torch.bfloat16, scales=scales)
    given = {id(tensor) for pair in zip(matrices, scales, strict=True) if pair[1] is not None for tensor in pair}
    assert {id(tensor) for tensor in kept} == given


@pytest.mark.parametrize("used", [slice(None), slice(1, 3)])
def test_compiled_equals_eager(used, device, compiled):
    def loss(matrices, scales):
        results = kernels.cast_weights(matrices, torch.bfloat16, scales=scales, joined=[1] * len(matrices))
        return sum(result.float().square().sum() for result in results[used])

    found = []
    for function in (loss, compiled(loss)):
        matrices, scales = map(leaves_of, weights_and_scales(device))
        function(matrices, scales).backward()
        found.append([tensor.grad for tensor in (*matrices, *scales) if tensor is not None])
    for eager, other in zip(*found, strict=True):
        assert other is None if eager is None else torch.equal(other, eager)


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        weight = torch.empty(3, 5)
        results = kernels.cast_weights([weight, weight[:2], weight], torch.half, scales=[None, None, weight[:, 0]])
        (joined,) = kernels.cast_weights([weight, weight[:2]], torch.bfloat16, joined=[2])
    assert [(tuple(result.shape), result.dtype) for result in results] == [
        ((rows, 5), torch.half) for rows in (3, 2, 3)
    ]
    assert (joined.shape, joined.dtype) == ((5, 5), torch.bfloat16)


def test_nothing_at_all():
    assert kernels.cast_weights([], torch.bfloat16) == []
    assert kernels.cast_weights((), torch.bfloat16, scales=[], joined=()) == []


W, S = make((2, 5)), make((2,))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((W, torch.half), {}, TypeError, "^matrices must be a list or tuple of tensors, not Tensor"),
        (([W, None], torch.half), {}, TypeError, r"^matrices\[1\] must be a tensor, not NoneType"),
        (([W.int()], torch.half), {}, TypeError, r"^matrices\[0\] is torch.int32; it may be torch.float32 or"),
        (([W, W.half()], torch.half), {}, TypeError, r"^matrices\[1\] is torch.float16; it may be torch.float32$"),
        (([W, W[0]], torch.half), {}, ValueError, r"^matrices\[1\] has shape \[5\]; it must be \[R, C\]"),
        (([W, W.to("meta")], torch.half), {}, ValueError, r"^matrices\[1\] is on meta; it must be on cpu, as matrices"),
        (([W], torch.int8), {}, TypeError, "^dtype is torch.int8; it may be torch.float32 or"),
        (([], "half"), {}, TypeError, "^dtype is 'half'; it may be torch.float32 or"),
        (([W], torch.half), {"scales": S}, TypeError, "^scales must be a list or tuple, as matrices is, not Tensor"),
        (
            ([W] * 2, torch.half),
            {"scales": [S]},
            ValueError,
            "^scales has length 1; it must have length 2, as matrices",
        ),
        (([W] * 2, torch.half), {"scales": [S, 1.0]}, TypeError, r"^scales\[1\] must be a tensor, not float"),
        (([W] * 2, torch.half), {"scales": [S, S.int()]}, TypeError, r"^scales\[1\] is torch.int32; it may be"),
        (
            *(([W] * 3, torch.half), {"scales": [S, None, S.half()]}, TypeError),
            r"^scales\[2\] is torch.float16; it may be torch.float32$",
        ),
        (([W], torch.half), {"scales": [W]}, ValueError, r"^scales\[0\] has shape \[2, 5\]; it must be \[R\]"),
        (
            *(([W, W], torch.half), {"scales": [None, S[:1]]}, ValueError),
            r"^scales\[1\] has shape \[1\]; beside matrices\[1\] of shape \[2, 5\] it must be \[2\]",
        ),
        (([W], torch.half), {"scales": [S.to("meta")]}, ValueError, r"^scales\[0\] is on meta; it must be on cpu, as"),
        (([W], torch.half), {"joined": 1}, TypeError, "^joined must be a list or tuple of integers, not int"),
        (([W], torch.half), {"joined": [1.0]}, TypeError, r"^joined\[0\] must be an integer, not float"),
        (([W], torch.half), {"joined": [1, 0]}, ValueError, r"^joined\[1\] is 0; it must be at least 1"),
        (
            *(([W] * 3, torch.half), {"joined": [1, 1]}, ValueError),
            "^joined adds up to 2; it must add up to 3, the number of matrices",
        ),
        (
            *(([W, W, W[:, :4]], torch.half), {"joined": [1, 2]}, ValueError),
            r"^matrices\[2\] has shape \[2, 4\]; joined to matrices\[1\] of shape \[2, 5\] it must be \[R, 5\]",
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        kernels.cast_weights(*arguments, **options)
