"""Int6 weights: one fp16 scale a row, codes in [-31, 31].

Shapes: R rows, C columns. In the lists of matrices that every op takes, N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import (
    FLOATS,
    check_device,
    check_float_dtype,
    check_length,
    check_matrices,
    check_shape,
    check_tensor,
)
from kernels.grouped import (
    Work,
    all_at_once,
    find_matrix,
    for_each,
    input_pointer,
    is_list,
    offset_and_device,
    result_pointer,
    run_all,
    run_one,
)
from kernels.launch import cdiv, compute_dtype, tl, triton
from kernels.registration import register
from kernels.tuning import tile


@triton.jit
def load_weight(p_weight, mask, COMPUTE: tl.constexpr):
    """Weights as COMPUTE, 0 for NaN. An infinity needs no care: scale and code both saturate."""
    weight = tl.load(p_weight, mask=mask, other=0).to(COMPUTE)
    return tl.where(weight == weight, weight, 0)  # noqa: PLR0124


@triton.jit
def divide(x, y):
    """x / y rounded to nearest, which `/` alone does not promise for float32."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def store_levels(p_result, weight, scale_R, mask, DEQUANTIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """clamp(round(w / scale), -31, 31), or that times the scale."""
    # Adding 1.5 * 2^(mantissa bits) leaves no bits for a fraction: the sum rounds half to even.
    SHIFT: tl.constexpr = 6755399441055744.0 if COMPUTE.is_fp64() else 12582912.0
    level = divide(weight, scale_R[:, None])
    level = tl.minimum(tl.maximum(level, -31.0), 31.0)
    level = (level + SHIFT) - SHIFT
    if DEQUANTIZE:
        level = (level * scale_R[:, None]).to(tl.float32)  # exact: 17 bits
    tl.store(p_result, level.to(p_result.dtype.element_ty), mask=mask)


@triton.jit
def quantize_rows(
    p_weight, p_result, p_scale, program, R, C,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr,
):  # fmt: skip
    """Codes and scale of b_R rows; without p_scale, the weights that these stand for.

    The first b_C columns stay in registers. Those of a wider matrix are read twice, then from the cache.
    """
    C = C // VECTOR * VECTOR  # VECTOR divides C; here the compiler sees that it does
    first_row = program.to(tl.int64) * b_R
    r_R = tl.arange(0, b_R)
    r_C = tl.arange(0, b_C)
    m_R = r_R < R - first_row
    offsets = r_R[:, None] * C + r_C[None, :]  # [b_R, b_C]
    p_weight += first_row * C
    p_result += first_row * C

    mask = m_R[:, None] & (r_C < C)[None, :]
    weight = load_weight(p_weight + offsets, mask, COMPUTE)
    largest_R = tl.max(tl.abs(weight), axis=1)
    for column in range(b_C, C, b_C):
        later_mask = m_R[:, None] & (column + r_C < C)[None, :]
        later = load_weight(p_weight + column + offsets, later_mask, COMPUTE)
        largest_R = tl.maximum(largest_R, tl.max(tl.abs(later), axis=1))

    scale_R = tl.minimum(divide(largest_R, tl.full((b_R,), 31, COMPUTE)), 65504.0)
    scale_R = scale_R.to(tl.float32).to(tl.float16)  # by way of float32 from float64 as well, as PyTorch does
    scale_R = tl.where(scale_R == 0, 1, scale_R)
    if p_scale is not None:
        tl.store(p_scale + first_row + r_R, scale_R, mask=m_R)

    scale_R = scale_R.to(COMPUTE)
    store_levels(p_result + offsets, weight, scale_R, mask, p_scale is None, COMPUTE)
    for column in range(b_C, C, b_C):
        later_mask = m_R[:, None] & (column + r_C < C)[None, :]
        later = load_weight(p_weight + column + offsets, later_mask, COMPUTE)
        store_levels(p_result + column + offsets, later, scale_R, later_mask, p_scale is None, COMPUTE)


@triton.jit(do_not_specialize=["R", "C"])
def quantize_int6_kernel(
    p_weight, p_codes, p_scale, p_table, R, C,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """scale = fp16(max |w| / 31), codes = clamp(round(w / scale)). b_R whole rows a program."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_weight = input_pointer(p_weight, p_table, matrix, 3, VECTOR, b_N)
    p_codes = result_pointer(p_codes, p_table, matrix, 4, b_N)
    p_scale = result_pointer(p_scale, p_table, matrix, 5, b_N)
    quantize_rows(p_weight, p_codes, p_scale, program, R, C, COMPUTE, VECTOR, b_R, b_C)


@triton.jit(do_not_specialize=["R", "C"])
def fake_quantize_int6_kernel(
    p_weight, p_fake, p_table, R, C,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """fake = clamp(round(w / scale)) * scale, scale = fp16(max |w| / 31). b_R whole rows a program."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_weight = input_pointer(p_weight, p_table, matrix, 3, VECTOR, b_N)
    p_fake = result_pointer(p_fake, p_table, matrix, 4, b_N)
    quantize_rows(p_weight, p_fake, None, program, R, C, COMPUTE, VECTOR, b_R, b_C)


@triton.jit(do_not_specialize=["R", "C"])
def dequantize_int6_kernel(
    p_codes, p_scale, p_weight, p_table, R, C,
    VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """w = codes * scale. b_R rows a program, b_C columns at a time."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_codes = input_pointer(p_codes, p_table, matrix, 3, VECTOR, b_N)
    p_scale = input_pointer(p_scale, p_table, matrix, 4, 1, b_N)
    p_weight = result_pointer(p_weight, p_table, matrix, 5, b_N)
    C = C // VECTOR * VECTOR  # VECTOR divides C; here the compiler sees that it does
    first_row = program.to(tl.int64) * b_R
    r_R = tl.arange(0, b_R)
    r_C = tl.arange(0, b_C)
    m_R = r_R < R - first_row
    scale_R = tl.load(p_scale + first_row + r_R, mask=m_R, other=0).to(tl.float32)
    for column in range(0, C, b_C):
        mask = m_R[:, None] & (column + r_C < C)[None, :]
        offsets = first_row * C + (r_R[:, None] * C + (column + r_C)[None, :])
        weight = tl.load(p_codes + offsets, mask=mask, other=0).to(tl.float32) * scale_R[:, None]
        tl.store(p_weight + offsets, weight.to(p_weight.dtype.element_ty), mask=mask)


# Plans are kept: making one takes the host longer than asking for it.


@functools.cache
def _vector(columns: int, itemsize: int, offset: int, input_itemsize: int) -> int:
    """How many elements a lane can take at a time, of an input that begins `offset` bytes past a multiple of 16.

    16 bytes of the wider side, fewer where rows or inputs begin askew. The narrower side follows in steps of as many
    elements, so that no lane's elements are another's on the other side.
    """
    return math.gcd(columns, 16 // itemsize, offset // input_itemsize)


@functools.cache
def _quantize_plan(tuned: str, rows: int, columns: int, dtype: torch.dtype, offset: int, device: int) -> Work:
    b_R, b_C, num_warps = tile(tuned, columns, device)
    vector = _vector(columns, dtype.itemsize, offset, dtype.itemsize)
    constants = (compute_dtype(dtype), vector, b_R, b_C)
    results = (((rows, columns), torch.int8), ((rows,), torch.float16))
    return Work(quantize_int6_kernel, cdiv(rows, b_R), rows, columns, constants, num_warps, results)


@functools.cache
def _fake_quantize_plan(
    tuned: str, rows: int, columns: int, dtype: torch.dtype, offset: int, device: int, result_dtype: torch.dtype
) -> Work:
    b_R, b_C, num_warps = tile(tuned, columns, device)
    vector = _vector(columns, max(dtype.itemsize, result_dtype.itemsize), offset, dtype.itemsize)
    constants = (compute_dtype(dtype), vector, b_R, b_C)
    results = (((rows, columns), result_dtype),)
    return Work(fake_quantize_int6_kernel, cdiv(rows, b_R), rows, columns, constants, num_warps, results)


@functools.cache
def _dequantize_plan(tuned: str, rows: int, columns: int, offset: int, device: int, dtype: torch.dtype) -> Work:
    b_R, b_C, num_warps = tile(tuned, columns, device)
    constants = (_vector(columns, dtype.itemsize, offset, 1), b_R, b_C)
    results = (((rows, columns), dtype),)
    return Work(dequantize_int6_kernel, cdiv(rows, b_R), rows, columns, constants, num_warps, results)


def _quantize_work(weight_RC: Tensor, tuned: str = "quantize_int6_list") -> Work:
    return _quantize_plan(tuned, *weight_RC.shape, weight_RC.dtype, *offset_and_device(weight_RC))


def _fake_quantize_work(weight_RC: Tensor, dtype: torch.dtype, tuned: str = "quantize_int6_list") -> Work:
    return _fake_quantize_plan(tuned, *weight_RC.shape, weight_RC.dtype, *offset_and_device(weight_RC), dtype)


def _dequantize_work(codes: Tensor, scale: Tensor, dtype: torch.dtype, tuned: str = "dequantize_int6_list") -> Work:
    return _dequantize_plan(tuned, *codes.shape, *offset_and_device(codes), dtype)


def _quantize(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    weight_RC = weight_RC.contiguous()
    codes_RC, scale_R = run_one(_quantize_work(weight_RC, "quantize_int6"), weight_RC)
    return codes_RC, scale_R


def _quantize_shapes(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    codes_RC = weight_RC.new_empty(weight_RC.shape, dtype=torch.int8)
    return codes_RC, weight_RC.new_empty(weight_RC.shape[:1], dtype=torch.float16)


def _quantize_all(weights: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*run_all(_quantize_work, [(weight.contiguous(),) for weight in weights]), strict=True))


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    return run_one(_dequantize_work(codes, scale, dtype, "dequantize_int6"), codes, scale)[0]


def _dequantize_shapes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _dequantize_all(codes: Sequence[Tensor], scales: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    arguments = [(c.contiguous(), s.contiguous(), dtype) for c, s, dtype in zip(codes, scales, dtypes, strict=True)]
    return run_all(_dequantize_work, arguments)[0]


def _fake_quantize(weight_RC: Tensor, dtype: torch.dtype) -> Tensor:
    weight_RC = weight_RC.contiguous()
    return run_one(_fake_quantize_work(weight_RC, dtype, "quantize_int6"), weight_RC)[0]


def _fake_quantize_shapes(weight_RC: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_RC.new_empty(weight_RC.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.weight_dtype = inputs[0].dtype


def _backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None]:
    return grad_RC.to(ctx.weight_dtype), None


def _fake_quantize_lists(weights: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    fakes: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(dtypes):  # results of two dtypes cannot share an allocation
        indices = [index for index, other in enumerate(dtypes) if other == dtype]
        (results,) = run_all(_fake_quantize_work, [(weights[index].contiguous(), dtype) for index in indices])
        fakes.update(zip(indices, results, strict=True))
    return tuple([fakes[index] for index in range(len(weights))])


class _FakeQuantizeAll(torch.autograd.Function):
    """`_fake_quantize_lists` with gradients."""

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], *weights: Tensor) -> tuple[Tensor, ...]:
        fakes = _fake_quantize_lists(weights, dtypes)
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *[fake for fake, weight in zip(fakes, weights, strict=True) if not weight.requires_grad]
        )
        return fakes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(grads, ctx.weight_dtypes, strict=True)
        return None, *[grad if grad is None else grad.to(dtype) for grad, dtype in pairs]


def _fake_quantize_all(weights: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> Sequence[Tensor]:
    dtypes = [weight.dtype if dtype is None else dtype for weight, dtype in zip(weights, dtypes, strict=True)]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _FakeQuantizeAll.apply(dtypes, *weights)
    return _fake_quantize_lists(weights, dtypes)


_quantize_registered = register("quantize_int6", _quantize, _quantize_shapes)
_fake_quantize_registered = register(
    "fake_quantize_int6", _fake_quantize, _fake_quantize_shapes, differentiate=_backward, setup_context=_setup_context
)


@dispatch.register_triton("quantize_int6")
def _quantize_op(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    # A registered op without a derivative refuses to be traced where one is asked for.
    return _quantize_registered(weight_RC.detach() if weight_RC.requires_grad else weight_RC)


@dispatch.register_triton("fake_quantize_int6")
def _fake_quantize_op(weight_RC: Tensor, dtype: torch.dtype | None) -> Tensor:
    return _fake_quantize_registered(weight_RC, weight_RC.dtype if dtype is None else dtype)


_dequantize_op = dispatch.register_triton("dequantize_int6")(
    register("dequantize_int6", _dequantize, _dequantize_shapes)
)
all_at_once(_quantize_op)(_quantize_all)
all_at_once(_dequantize_op)(_dequantize_all)
all_at_once(_fake_quantize_op)(_fake_quantize_all)


def _check_scale(name: str, scale: object, codes_name: str, codes: Tensor) -> None:
    check_tensor(name, scale, (torch.float16,), "R")
    check_shape(name, scale, codes.shape[:1], codes_name, codes)
    check_device(name, scale, codes_name, codes)


def quantize_int6(
    weight_RC: Tensor | Sequence[Tensor],
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]] | tuple[tuple[Tensor, Tensor], ...]:
    """Rounds each row to 63 evenly spaced levels.

        scale[r] = min(fp16(max_c |w[r, c]| / 31), 65504), or 1 where that is 0
        codes[r, c] = clamp(round(w[r, c] / scale[r]), -31, 31)

    The codes use the scale as rounded to fp16, a true division, and round half to even. A scale of 0 comes
    from a row of zeros, of values too small for fp16 (up to 31 * 2^-25), or of no columns; its codes are 0.
    An infinity takes code 31 or -31 and makes the scale 65504; NaN takes code 0 and has no part in the scale.

    Args:
        weight_RC: [R, C], float32, bfloat16, float16 or float64; R and C may be 0. Or a list or tuple of such
            matrices on one device, of any shapes and dtypes, done together.

    Returns:
        codes int8 [R, C] and scale float16 [R]; for a list, a list of such pairs, which may share one piece of
        memory. Computed in float32 (float64 for a float64 weight). Not differentiable: see
        `fake_quantize_int6`.

    Raises:
        TypeError: a weight is no tensor or its dtype is not one of those above.
        ValueError: a weight is not a matrix, or the weights are on different devices.

    Source: per-row symmetric quantization as in the parameter-golf records, without their floor on the scale.
    """
    if is_list(weight_RC):
        check_matrices("weight_RC", weight_RC, FLOATS)
        return for_each("quantize_int6", weight_RC)
    check_tensor("weight_RC", weight_RC, FLOATS, "RC")
    return dispatch.implementation("quantize_int6", weight_RC)(weight_RC)


def dequantize_int6(
    codes: Tensor | Sequence[Tensor], scale: Tensor | Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """Turns codes back into weights.

        w[r, c] = codes[r, c] * scale[r]

    Args:
        codes: int8 [R, C], or a list or tuple of such matrices on one device, of any shapes, done together.
        scale: float16 [R], or as many of them as there are codes.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        [R, C] in `dtype`: the exact product (17 bits are enough for it), rounded once. Beyond 65504 float16
        has only infinity. Not differentiable. For a list, a list of such matrices, which may share one piece of memory.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a length does not fit, or the tensors are on different devices.
    """
    check_float_dtype("dtype", dtype)
    if is_list(codes):
        check_matrices("codes", codes, (torch.int8,))
        check_length("scale", scale, "codes", codes)
        for index, pair in enumerate(zip(scale, codes, strict=True)):
            _check_scale(f"scale[{index}]", pair[0], f"codes[{index}]", pair[1])
        scales = [entry.detach() for entry in scale]
        return for_each("dequantize_int6", codes, scales, [dtype] * len(codes))
    check_tensor("codes", codes, (torch.int8,), "RC")
    _check_scale("scale", scale, "codes", codes)
    scale = scale.detach() if scale.requires_grad else scale
    return dispatch.implementation("dequantize_int6", codes)(codes, scale, dtype)


def fake_quantize_int6(
    weight_RC: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """The weight as it will be after quantization, for training through it.

        w'[r, c] = dequantize_int6(*quantize_int6(w), dtype)[r, c],   dw'/dw = 1

    Args:
        weight_RC: [R, C], float32, bfloat16, float16 or float64. Or a list or tuple of such matrices on one
            device, of any shapes and dtypes, done together.
        dtype: of the result, one of the same; the weight's by default.

    Returns:
        [R, C] in `dtype`, bit for bit what the artifact will hold. The gradient passes to the weight as it
        is, cast to the weight's dtype (the straight-through estimator). For a list, a list of such matrices,
        which may share one piece of memory.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a weight is not a matrix, or the weights are on different devices.

    Source: Bengio, Leonard and Courville 2013, arXiv:1308.3432.
    """
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    if is_list(weight_RC):
        check_matrices("weight_RC", weight_RC, FLOATS)
        return for_each("fake_quantize_int6", weight_RC, [dtype] * len(weight_RC))
    check_tensor("weight_RC", weight_RC, FLOATS, "RC")
    return dispatch.implementation("fake_quantize_int6", weight_RC)(weight_RC, dtype)
