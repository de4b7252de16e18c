from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from newton_schulz_truth import assert_accurate, like_gradients, make, svd, truth, with_singular_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import dispatch, reference

pytestmark = pytest.mark.usefixtures("every_implementation")

QUINTIC = (3.4445, -4.7750, 2.0315)
LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 3), (3, 1), (1, 127), (127, 1), (16, 16), (31, 64), (64, 31), (127, 127), (33, 513)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_float64_is_the_polynomial_of_the_singular_values(shape, steps, device):
    matrix = make(shape, device=device)
    result = reference.newton_schulz(matrix, steps=steps)
    assert (result.shape, result.dtype) == (shape, torch.float64)
    expected = truth(matrix, [QUINTIC] * steps)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-10)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    steps=st.integers(1, 7),
    exponent=st.integers(-3, 300),
    seed=st.integers(0, 2**31),
)
def test_float64_at_any_shape_and_size(rows, columns, steps, exponent, seed, device):
    matrix = make((rows, columns), device=device, seed=seed) * 10.0**exponent
    result = reference.newton_schulz(matrix, steps=steps)
    # numpy's own norm overflows above 1e154: there the sum that the 1e-7 belongs to no longer feels it.
    expected = truth(matrix * 10.0 ** -max(exponent - 100, 0), [QUINTIC] * steps)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_bfloat16_products_are_as_accurate_as_their_roundings(dtype, device):
    matrices = [make(shape, dtype, device, seed) for seed, shape in enumerate(SHAPES * 2)]
    results = [kernels.newton_schulz(matrix) for matrix in matrices]
    assert_accurate(results, matrices, [QUINTIC] * 5)


@pytest.mark.parametrize(
    "shape",
    [
        (16, 256),
        (300, 64),
        *(pytest.param(shape, marks=pytest.mark.gpu) for shape in [(16, 64), (256, 768), (512, 1536)]),
    ],
)
def test_gradients_of_few_large_singular_values(shape, device):
    """Where X X^T, rounded, knows little of the small ones; and wide or tall enough for two iterations at a time."""
    draws = 4 if device.type == "cuda" else 1
    drawn = [like_gradients(shape, seed) for seed in range(draws)]
    for kind in drawn[0]:
        matrices = [each[kind].to(device) for each in drawn]
        assert_accurate(kernels.newton_schulz(matrices), matrices, [QUINTIC] * 5)


@pytest.mark.parametrize("triple", [(1.5, -0.5, 0.0), (2.0, 0.0, -1.0), (0.0, 3.0, -2.0), (1.0, 0.0, 0.0)])
def test_coefficients_that_are_zero(triple, device):
    matrices = [make(shape, torch.float32, device, seed) for seed, shape in enumerate(SHAPES * 2)]
    results = kernels.newton_schulz(matrices, steps=2, coefficients=triple)
    assert_accurate(results, matrices, [triple] * 2)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_the_start_is_rounded_where_it_is_kept(dtype, device):
    """Once by the reference, after the division; by the kernel before it, if at all, and its result once more."""
    matrix = make((31, 64), dtype, device)
    start = kernels.newton_schulz(matrix, steps=1, coefficients=(1.0, 0.0, 0.0))
    exact = matrix.cpu().double() / (matrix.cpu().double().norm() + 1e-7)
    assert ((start.cpu().double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs()).all()
    once = exact
    if os.environ.get("TRITON_INTERPRET"):  # the interpreter cuts off where hardware rounds
        once = (exact.float().view(torch.int32) & -65536).view(torch.float32)
    # float32 is off by some 2^-23, so that one element in thousands may round to the other side.
    if dtype == torch.bfloat16 or os.environ.get("GOLF_KERNELS") == "reference":
        assert (start.cpu() == once.to(torch.bfloat16)).double().mean().item() > 0.99


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e38),
        (torch.float32, 1e-3),
        (torch.bfloat16, 1e38),
        (torch.bfloat16, 1e-3),
        (torch.float16, 1e4),
        (torch.float16, 1e-3),
    ],
)
def test_norms_beyond_the_range_of_the_dtype(dtype, scale, device):
    matrices = [make((31, 64), torch.float64, device, seed).clamp(-3, 3) for seed in range(4)]
    matrices = [(matrix * scale).to(dtype) for matrix in matrices]
    assert_accurate(kernels.newton_schulz(matrices), matrices, [QUINTIC] * 5)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_DTYPES])
def test_far_below_the_epsilon_of_the_norm_nothing_is_left(dtype, device):
    tiny = torch.full((4, 6), torch.finfo(dtype).smallest_normal, dtype=dtype, device=device)
    result = kernels.newton_schulz(tiny)
    if dtype == torch.float16:  # its least normal number, 6e-5, is far above 1e-7
        assert_accurate([result], [tiny], [QUINTIC] * 5)
    else:
        assert result.abs().max().item() < 1e-20


def gains(result, matrix):
    """u_i^T R v_i and s_i: what became of each singular value, and what it was as a part of the norm."""
    u, s, vt = svd(matrix)
    return np.einsum("ri,rc,ic->i", u, result.detach().cpu().double().numpy(), vt), s


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "matrix",
    [
        make((64, 256)),
        make((256, 64)),
        make((128, 128)),
        with_singular_values(np.geomspace(1, 0.03, 32), 48),
        with_singular_values(np.geomspace(1, 1e-6, 64), 64),
        with_singular_values([1.0] * 7, 9),
    ],
    ids=["wide", "tall", "square", "condition 30", "condition 1e6", "orthogonal"],
)
def test_singular_values_reach_the_quintics_band(matrix, dtype, device):
    matrix = matrix.to(device, dtype)
    result = kernels.newton_schulz(matrix)
    gain, part = gains(result, matrix)
    # The polynomial's own band, widened by bfloat16: three roundings of 2^-9 a step, which the next steps damp.
    slack = 0.002 if dtype == torch.float64 else 0.02
    assert (gain[part >= 0.01] >= 0.682 - slack).all()
    assert (gain[part >= 0.01] <= 1.135 + slack).all()
    assert (gain[part >= 0.002] >= 0.682 - slack).all()
    assert (gain <= 1.203 + slack).all()
    largest = np.linalg.svd(result.cpu().double().numpy(), compute_uv=False)[0]
    assert largest <= 1.203 + 2 * slack


@pytest.mark.parametrize("steps", [8, 10, 12])
def test_polar_express_converges_to_the_orthogonal_factor(steps, device):
    matrix = with_singular_values(np.geomspace(1, 0.005, 32), 48).to(device)
    u, s, vt = svd(matrix)
    assert s.min() > 1e-3
    result = kernels.newton_schulz(matrix, steps=steps, coefficients="polar_express")
    torch.testing.assert_close(result.cpu(), torch.from_numpy(u @ vt), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_polar_express_in_five_steps(dtype, device):
    matrix = with_singular_values(np.geomspace(1, 0.005, 32), 48).to(device, dtype)
    result = kernels.newton_schulz(matrix, coefficients="polar_express")
    gain, _ = gains(result, matrix)
    slack = 0.001 if dtype == torch.float64 else 0.02
    assert (gain >= 0.846 - slack).all()
    assert (gain <= 1.124 + slack).all()
    distance, quintic_distance = (
        np.linalg.norm(gains(r, matrix)[0] - 1) for r in (result, kernels.newton_schulz(matrix))
    )
    assert distance < 0.5 * quintic_distance


def test_polar_express_as_published(device):
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    ]
    triples = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in published] + [(1.875, -1.25, 0.375)] * 2
    matrix = make((5, 7), device=device)
    result = kernels.newton_schulz(matrix, steps=9, coefficients="polar_express")
    torch.testing.assert_close(result.cpu(), truth(matrix, triples), rtol=0, atol=1e-10)


def test_coefficients_in_every_form(device):
    matrix = make((5, 7), device=device)
    steps = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (3.0, -3.0, 1)]
    for coefficients, triples in (
        (None, [QUINTIC] * 3),
        ("quintic", [QUINTIC] * 3),
        (QUINTIC, [QUINTIC] * 3),
        ([1.5, -0.5, 0.0], [(1.5, -0.5, 0.0)] * 3),
        (steps, steps),
        (tuple(map(list, steps)), steps),
    ):
        result = kernels.newton_schulz(matrix, steps=3, coefficients=coefficients)
        torch.testing.assert_close(result.cpu(), truth(matrix, triples), rtol=0, atol=1e-10)
    three_of_three = kernels.newton_schulz(matrix, steps=3, coefficients=steps)
    reordered = kernels.newton_schulz(matrix, steps=3, coefficients=steps[::-1])
    assert not torch.allclose(three_of_three, reordered)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_DTYPES])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 7)])
def test_zeros_stay_zeros(shape, dtype, device):
    result = kernels.newton_schulz(torch.zeros(shape, dtype=dtype, device=device))
    assert torch.equal(result.float(), torch.zeros(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient(dtype, device):
    matrix = (make((24, 2)) @ make((2, 40), seed=1)).to(device, dtype)
    result = kernels.newton_schulz(matrix)
    gain, part = gains(result, matrix)
    assert part[2:].max() < 1e-6
    assert ((gain[:2] > 0.66) & (gain[:2] < 1.155)).all()
    if dtype == torch.float64:
        assert (np.abs(gain[2:]) <= 1e-10).all()
    else:  # rounding the start to bfloat16 fills the null space with noise, which five steps multiply by up to 485
        assert np.linalg.svd(result.cpu().double().numpy(), compute_uv=False)[0] <= 1.203 + 0.04
        assert_accurate([result], [matrix], [QUINTIC] * 5)


def test_one_bad_matrix_spoils_no_other(device):
    batch = make((4, 5, 6), torch.float32, device)
    clean = kernels.newton_schulz(batch)
    batch[1, 0, 0] = float("nan")
    batch[3, 4, 5] = float("inf")
    result = kernels.newton_schulz(batch)
    assert torch.equal(result[::2], clean[::2])
    assert bool(result[1::2].isnan().all())


MIXED_SHAPES = [(8, 8), (6, 12), (12, 6), (3, 8, 8), (1, 5), (12, 6), (2, 2, 6, 12), (5, 1), (7, 8)]


def test_a_list_equals_one_by_one(device):
    matrices = [make(shape, device=device, seed=seed) for seed, shape in enumerate(MIXED_SHAPES)]
    results = kernels.newton_schulz(matrices)
    assert isinstance(results, list)
    for matrix, result in zip(matrices, results, strict=True):
        flat = matrix.reshape(-1, *matrix.shape[-2:])
        singly = torch.stack([kernels.newton_schulz(single) for single in flat]).reshape(matrix.shape)
        assert result.shape == matrix.shape
        torch.testing.assert_close(result, singly, rtol=0, atol=1e-12)
        for single, exact in zip(result.reshape(flat.shape), flat, strict=True):
            torch.testing.assert_close(single.cpu(), truth(exact, [QUINTIC] * 5), rtol=0, atol=1e-10)


def test_a_list_of_many_dtypes(device):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32)
    matrices = [make((16, 24), dtype, device, seed) for seed, dtype in enumerate(dtypes)]
    results = kernels.newton_schulz(matrices)
    assert [result.dtype for result in results] == [
        torch.float64 if dtype == torch.float64 else torch.bfloat16 for dtype in dtypes
    ]
    expected = truth(matrices[1], [QUINTIC] * 5)
    torch.testing.assert_close(results.pop(1).cpu(), expected, rtol=0, atol=1e-10)
    matrices.pop(1)
    assert_accurate(results, matrices, [QUINTIC] * 5)


def test_the_structure_comes_back(device):
    matrix = make((3, 4), device=device)
    assert kernels.newton_schulz([]) == []
    assert kernels.newton_schulz(()) == ()
    single = kernels.newton_schulz(matrix)
    (listed,) = kernels.newton_schulz([matrix])
    results = kernels.newton_schulz((matrix, matrix.mT))
    assert isinstance(results, tuple)
    assert torch.equal(single, listed)
    torch.testing.assert_close(results[0], single)
    torch.testing.assert_close(results[1], single.mT)
    batch = make((2, 0, 3, 4), device=device)
    assert kernels.newton_schulz(batch).shape == (2, 0, 3, 4)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_empty(shape, dtype, device):
    empty = torch.empty(shape, dtype=dtype, device=device)
    results = kernels.newton_schulz([empty, make((3, 4), dtype, device)])
    assert (results[0].shape, results[0].dtype) == (shape, dtype)
    assert results[1].shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 10)])
def test_a_transpose_gives_the_transpose(shape, dtype, device):
    matrix = make(shape, dtype, device)
    assert torch.equal(kernels.newton_schulz(matrix.mT), kernels.newton_schulz(matrix).mT)


def test_non_contiguous_inputs(device):
    batch = make((4, 6, 10), torch.float32, device)
    expected = kernels.newton_schulz(batch)
    strided = batch.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(kernels.newton_schulz(strided), expected)
    wider = torch.cat((batch, batch), dim=2)[:, :, :10]
    assert torch.equal(kernels.newton_schulz(wider), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_are_left_alone_and_not_returned(dtype, device):
    matrices = [make(shape, dtype, device) for shape in ((4, 4), (4, 4), (3, 5), (5, 3), (0, 2))]
    copies = [matrix.clone() for matrix in matrices]
    results = [*kernels.newton_schulz(matrices), *map(kernels.newton_schulz, matrices)]
    assert all(map(torch.equal, matrices, copies))
    results = [result for result in results if result.numel()]
    for result in results:
        result.fill_(7)
    assert all(map(torch.equal, matrices, copies))


def test_results_of_a_list_do_not_overlap(device):
    results = kernels.newton_schulz([make((4, 6), device=device, seed=seed) for seed in range(3)])
    kept = results[1].clone()
    results[0].zero_()
    results[2].zero_()
    assert torch.equal(results[1], kept)


class ProductCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function._overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.bmm,
            torch.ops.aten.baddbmm,
        )
        return function(*args, **(kwargs or {}))


def test_all_matrices_of_the_model_take_few_launches(device):
    # The model's 49 matrices at a sixteenth of their size: four shapes up to transposes, three products a step.
    shapes = [(32, 32)] * 16 + [(16, 32)] * 16 + [(96, 32)] * 8 + [(32, 96)] * 8 + [(32, 8)]
    matrices = [make(shape, torch.bfloat16, device, seed) for seed, shape in enumerate(shapes)]
    with ProductCounter() as counter:
        results = reference.newton_schulz(matrices)
    assert counter.products == 4 * 3 * 5
    assert_accurate(results, matrices, [QUINTIC] * 5)


def test_bitwise_repeatable(device):
    matrices = [make(shape, torch.bfloat16, device) for shape in ((64, 64), (31, 127), (127, 31))]
    first, second = kernels.newton_schulz(matrices), kernels.newton_schulz(matrices)
    assert all(map(torch.equal, first, second))


def test_gradients(device):
    matrices = (make((3, 4), device=device), make((4, 3), device=device, seed=1) * 10)
    assert torch.autograd.gradcheck(
        lambda *leaves: tuple(reference.newton_schulz(list(leaves), steps=2)),
        [matrix.requires_grad_() for matrix in matrices],
    )


@pytest.mark.parametrize("coefficients", [None, "polar_express", [(2.0, -1.5, 0.5)] * 5])
def test_compiled_equals_eager(coefficients, device, compiled):
    def orthogonalize(matrices):
        return kernels.newton_schulz(matrices, coefficients=coefficients)

    matrices = [make(shape, torch.float32, device) for shape in ((8, 8), (6, 12), (12, 6), (2, 8, 8))]
    results = compiled(orthogonalize)(matrices)
    assert isinstance(results, list)
    assert all(map(torch.equal, results, orthogonalize(matrices)))
    assert torch.equal(compiled(orthogonalize)(matrices[1]), orthogonalize(matrices[1]))


def test_fake_tensors(device):
    with FakeTensorMode():
        matrices = [torch.empty(4, 6, device=device), torch.empty(2, 6, 4, dtype=torch.float64, device=device)]
        results = kernels.newton_schulz(matrices)
    assert [(tuple(result.shape), result.dtype) for result in results] == [
        ((4, 6), torch.bfloat16),
        ((2, 6, 4), torch.float64),
    ]


MATRIX = make((3, 4), torch.float32)


@pytest.mark.parametrize(
    ("matrices", "options", "error", "message"),
    [
        (1.0, {}, TypeError, "matrices must be a tensor or a list or tuple of them, not <class 'float'>"),
        ({"a": MATRIX}, {}, TypeError, "matrices must be a tensor or a list or tuple of them"),
        (MATRIX.int(), {}, TypeError, "matrices is torch.int32; it may be torch.float32 or"),
        (MATRIX[0], {}, ValueError, r"matrices has shape \[4\]; it must be \[..., M, N\]"),
        ([1.0, MATRIX], {}, TypeError, r"matrices\[0\] must be a tensor, not float"),
        ([MATRIX, None], {}, TypeError, r"matrices\[1\] must be a tensor, not NoneType"),
        ([MATRIX, MATRIX.bool()], {}, TypeError, r"matrices\[1\] is torch.bool"),
        ([MATRIX, MATRIX[0, 0]], {}, ValueError, r"matrices\[1\] has shape \[\]; it must be \[..., M, N\]"),
        ([MATRIX, MATRIX.to("meta")], {}, ValueError, r"matrices\[1\] is on meta; it must be on cpu"),
        (MATRIX, {"steps": 0}, ValueError, "steps is 0; it must be at least 1"),
        (MATRIX, {"steps": 2.0}, TypeError, "steps must be an integer, not float"),
        ([], {"steps": -1}, ValueError, "steps is -1"),
        (MATRIX, {"coefficients": "cubic"}, ValueError, "coefficients is 'cubic'; .* quintic, polar_express"),
        (MATRIX, {"coefficients": 3.4445}, TypeError, "coefficients must be None, a name, .* not float"),
        (MATRIX, {"coefficients": (1.0, 2.0)}, ValueError, r"coefficients is \(1.0, 2.0\); it may be a triple"),
        (MATRIX, {"coefficients": [QUINTIC, (1.0, 2.0)]}, ValueError, "coefficients is .* may be a triple"),
        (MATRIX, {"coefficients": (1.0, "b", 2.0)}, ValueError, "coefficients is .* may be a triple"),
        (MATRIX, {"coefficients": [QUINTIC] * 4}, ValueError, "has 4 triples; for steps 5 it must have 5"),
        (MATRIX, {"coefficients": []}, ValueError, "coefficients has 0 triples; for steps 5 it must have 5"),
    ],
)
def test_bad_arguments(matrices, options, error, message):
    with pytest.raises(error, match=message):
        kernels.newton_schulz(matrices, **options)


def test_changing_a_result_leaves_what_autograd_keeps_of_another(device):
    if dispatch.chosen() == "reference":
        pytest.skip("matrices of one shape are a batch there, their results views of it")
    one, other = kernels.newton_schulz([make((5, 7), torch.float32, device), make((7, 5), torch.float32, device)])
    weight = torch.ones(5, 7, dtype=torch.bfloat16, device=device, requires_grad=True)
    total = (one * weight).sum()
    other.mul_(2)
    total.backward()
    assert torch.equal(weight.grad, one)
