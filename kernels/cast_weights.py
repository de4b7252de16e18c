"""The compute-dtype copies of all weight matrices of a model, in one launch, and in another their gradients.

Shapes: Z matrices of R rows and C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.addresses import KeptTables, kept_tables, table_on, typed_pointer
from kernels.checks import (
    FLOATS,
    check_device,
    check_float_dtype,
    check_integer,
    check_length,
    check_shape,
    check_tensor,
)
from kernels.launch import aligned, cdiv, compute_dtype, launch, tl, triton
from kernels.registration import is_traced
from kernels.tuning import tile


@triton.jit
def rows_of_a_block(p_blocks, p_matrix_shape, b_R: tl.constexpr):
    """(this program's first row in its matrix, its rows, which of them there are, the matrix's columns)."""
    R = tl.load(p_matrix_shape)
    C = tl.load(p_matrix_shape + 1).to(tl.int32)
    first_row = tl.load(p_blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * b_R
    r_R = tl.arange(0, b_R)
    return first_row, r_R, r_R < R - first_row, C


@triton.jit
def load_scale(p_first_scale, p_address, r_R, m_R, first_row, COMPUTE: tl.constexpr, b_R: tl.constexpr):
    """The rows' scales; 1 where the address is 0, and where no matrix has a scale."""
    scale_R = tl.full((b_R,), 1, COMPUTE)
    if p_first_scale is not None:
        has_scale = tl.load(p_address) != 0
        p_scale = typed_pointer(p_first_scale, p_address, 1) + first_row + r_R
        scale_R = tl.where(has_scale, tl.load(p_scale, mask=m_R & has_scale, other=0).to(COMPUTE), scale_R)
    return scale_R


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in another dtype: from float64 to 16 bits by way of float32, as PyTorch does."""
    if x.dtype.is_fp64() and dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def cast_weights_fwd_kernel(
    p_first_weight, p_first_scale, p_first_result, p_blocks, p_table,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr,
):  # fmt: skip
    """y = scale * w. b_R rows of one matrix a program, b_C columns at a time.

    `p_blocks` is int32 [., 2]: matrix, number of the block of rows in it; `p_table` int64 [Z, 5]: R, C, and the
    addresses of the weight and the result, both at multiples of VECTOR elements, and of the scale, 0 for none.
    """
    p_matrix = p_table + 5 * tl.load(p_blocks + 2 * tl.program_id(0)).to(tl.int64)
    first_row, r_R, m_R, C = rows_of_a_block(p_blocks, p_matrix, b_R)
    C = C // VECTOR * VECTOR  # VECTOR divides C; here the compiler sees that it does
    p_weight = typed_pointer(p_first_weight, p_matrix + 2, VECTOR) + first_row * C
    p_result = typed_pointer(p_first_result, p_matrix + 3, VECTOR) + first_row * C
    scale_R = load_scale(p_first_scale, p_matrix + 4, r_R, m_R, first_row, COMPUTE, b_R)
    for column in range(0, C, b_C):
        r_C = column + tl.arange(0, b_C)
        mask = m_R[:, None] & (r_C < C)[None, :]
        offsets = r_R[:, None] * C + r_C[None, :]
        weight = tl.load(p_weight + offsets, mask=mask, other=0).to(COMPUTE)
        tl.store(p_result + offsets, rounded(scale_R[:, None] * weight, p_result.dtype.element_ty), mask=mask)


@triton.jit
def cast_weights_bwd_kernel(
    p_first_grad, p_first_weight, p_first_scale, p_blocks, p_table,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr,
):  # fmt: skip
    """grad_w = scale * grad, grad_scale[r] = sum_c grad[r, c] w[r, c]. b_R whole rows a program.

    `p_blocks` as above; `p_table` int64 [Z, 7]: R, C, and the addresses of the upstream gradient, of the weight and of
    its gradient, all at multiples of VECTOR elements, and of the scale and of its gradient. 0 for one that is not
    there, or not asked for.
    """
    p_matrix = p_table + 7 * tl.load(p_blocks + 2 * tl.program_id(0)).to(tl.int64)
    first_row, r_R, m_R, C = rows_of_a_block(p_blocks, p_matrix, b_R)
    C = C // VECTOR * VECTOR  # VECTOR divides C; here the compiler sees that it does
    p_grad = typed_pointer(p_first_grad, p_matrix + 2, VECTOR) + first_row * C
    p_weight = typed_pointer(p_first_weight, p_matrix + 3, VECTOR) + first_row * C
    p_grad_weight = typed_pointer(p_first_weight, p_matrix + 4, VECTOR) + first_row * C
    weight_wanted = tl.load(p_matrix + 4) != 0
    scale_wanted = tl.load(p_matrix + 6) != 0
    scale_R = load_scale(p_first_scale, p_matrix + 5, r_R, m_R, first_row, COMPUTE, b_R)
    sum_R = tl.zeros((b_R,), COMPUTE)
    for column in range(0, C, b_C):
        r_C = column + tl.arange(0, b_C)
        mask = m_R[:, None] & (r_C < C)[None, :]
        offsets = r_R[:, None] * C + r_C[None, :]
        grad = tl.load(p_grad + offsets, mask=mask, other=0).to(COMPUTE)
        if p_first_scale is not None:
            weight = tl.load(p_weight + offsets, mask=mask & scale_wanted, other=0).to(COMPUTE)
            sum_R += tl.sum(grad * weight, axis=1)
        grad = rounded(scale_R[:, None] * grad, p_grad_weight.dtype.element_ty)
        tl.store(p_grad_weight + offsets, grad, mask=mask & weight_wanted)
    if p_first_scale is not None:
        p_grad_scale = typed_pointer(p_first_scale, p_matrix + 6, 1) + first_row
        tl.store(p_grad_scale + r_R, rounded(sum_R, p_grad_scale.dtype.element_ty), mask=m_R & scale_wanted)


@kept_tables
def _blocks(rows: tuple[int, ...], b_R: int, device: torch.device) -> Tensor:
    blocks = [(matrix, block) for matrix, count in enumerate(rows) for block in range(cdiv(count, b_R))]
    return table_on(device, blocks, torch.int32)


_tables = KeptTables()


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    table: list[tuple[int, ...]],
    dtype: torch.dtype,
    itemsize: int,
    touched: tuple[Sequence[Tensor | None], ...],
) -> None:
    """Starts a kernel on matrices of `dtype`.

    `touched` is all that it reads or writes, `itemsize` that of the widest dtype among it.
    """
    device = tensors[0].device
    widths = {row[1] for row in table}
    b_R, b_C, num_warps = tile("cast_weights", max(widths), tensors[0].get_device())
    blocks = _blocks(tuple([row[0] for row in table]), b_R, device)
    # 16 bytes of the wider side for a lane, fewer where the rows of a matrix begin askew
    vector = math.gcd(16 // itemsize, *widths)
    constants = (compute_dtype(dtype), vector, b_R, b_C)
    tensors = (*tensors, blocks, _tables.on(device, table))
    launch(
        kernel,
        (len(blocks),),
        tensors,
        (),
        constants,
        num_warps=num_warps,
        counted=lambda: (sum(each.nbytes for several in touched for each in several if each is not None), 0.0),
    )


def _results(
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor],
    scaled: Sequence[int],
    joined: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The results, not yet written. Each has its own memory, as a registered op's must."""
    results, index = [], 0
    for count in joined:
        rows = sum([matrix.shape[0] for matrix in matrices[index : index + count]])
        results.append(matrices[index].new_empty((rows, matrices[index].shape[1]), dtype=dtype))
        index += count
    return results


def _run(
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor],
    scaled: Sequence[int],
    joined: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Matrix `scaled[j]` has `scales[j]`; the next `joined[i]` matrices make result i."""
    results = _results(matrices, scales, scaled, joined, dtype)
    matrices, scales = [aligned(matrix) for matrix in matrices], [aligned(scale) for scale in scales]
    scale_addresses = dict(zip(scaled, [scale.data_ptr() for scale in scales], strict=True))
    table = []
    for result, count in zip(results, joined, strict=True):
        address = result.data_ptr()
        for _ in range(count):
            matrix, scale_address = matrices[len(table)], scale_addresses.get(len(table), 0)
            table.append((*matrix.shape, matrix.data_ptr(), address, scale_address))
            address += matrix.numel() * dtype.itemsize
    tensors = (matrices[0], scales[0] if scales else None, results[0])
    itemsize = max(matrices[0].itemsize, dtype.itemsize)
    _launch(cast_weights_fwd_kernel, tensors, table, matrices[0].dtype, itemsize, (matrices, scales, results))
    return results


def _gradients(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    scaled: Sequence[int],
    rows: Sequence[int],
    joined: Sequence[int],
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The wanted gradients, not yet written."""
    upstream = [grad for grad, count in zip(grads, joined, strict=True) for _ in range(count)]
    return [
        *[
            grad.new_empty((height, grad.shape[1]), dtype=dtype)
            for grad, height, asked in zip(upstream, rows, wanted[: len(rows)], strict=True)
            if asked
        ],
        *[scale.new_empty(scale.shape) for scale, asked in zip(scales, wanted[len(rows) :], strict=True) if asked],
    ]


def _run_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    scaled: Sequence[int],
    rows: Sequence[int],
    joined: Sequence[int],
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The wanted gradients of the matrices, then of the scales.

    `weights` are those with a scale, `rows` the heights of all; every matrix is of `dtype`.
    """
    found = _gradients(grads, weights, scales, scaled, rows, joined, wanted, dtype)
    remaining = iter([gradient.data_ptr() for gradient in found])
    addresses = [next(remaining) if asked else 0 for asked in wanted]
    grads = [None if grad is None else aligned(grad) for grad in grads]
    weights, scales = [aligned(weight) for weight in weights], [aligned(scale) for scale in scales]
    of_scaled = {
        matrix: (weight.data_ptr(), scale.data_ptr(), address)
        for matrix, weight, scale, address in zip(scaled, weights, scales, addresses[len(rows) :], strict=True)
    }
    table, index = [], 0
    for grad, count in zip(grads, joined, strict=True):
        if grad is not None:
            address, columns = grad.data_ptr(), grad.shape[1]
            for matrix in range(index, index + count):
                weight, scale, grad_scale = of_scaled.get(matrix, (0, 0, 0))
                table.append((rows[matrix], columns, address, weight, addresses[matrix], scale, grad_scale))
                address += rows[matrix] * columns * grad.itemsize
        index += count
    given = next(grad for grad in grads if grad is not None)
    # without scales, the gradients are the matrices'
    tensors = (given, weights[0] if weights else found[0], scales[0] if scales else None)
    itemsize = max(given.itemsize, dtype.itemsize)
    _launch(cast_weights_bwd_kernel, tensors, table, dtype, itemsize, (grads, weights, scales, found))
    return found


_backward_registered = torch.library.custom_op("golf::cast_weights_backward", _run_backward, mutates_args=())
_backward_registered.register_fake(_gradients)


def _setup_context(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    matrices, scales, ctx.scaled, ctx.joined, _ = inputs
    ctx.dtype = matrices[0].dtype
    ctx.rows = [matrix.shape[0] for matrix in matrices]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[matrices[index] for index in ctx.scaled], *scales)


def _backward(ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the matrices, then of the scales; None where one is not needed or its result was not used."""
    used = [grad is not None for grad, count in zip(grads, ctx.joined, strict=True) for _ in range(count)]
    used += [used[index] for index in ctx.scaled]
    wanted = [need and use for need, use in zip(needed, used, strict=True)]
    if not any(wanted):
        return [None] * len(wanted)
    weights, scales = ctx.saved_tensors[: len(ctx.scaled)], ctx.saved_tensors[len(ctx.scaled) :]
    arguments = (grads, weights, scales, ctx.scaled, ctx.rows, ctx.joined, wanted, ctx.dtype)
    run = _backward_registered if is_traced(arguments) else _run_backward
    found = iter(run(*arguments))
    return [next(found) if asked else None for asked in wanted]


class _CastWeights(torch.autograd.Function):
    """`_run` with gradients; the tensors are the matrices, then the scales."""

    @staticmethod
    def forward(
        ctx: Any, scaled: Sequence[int], joined: Sequence[int], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(tensors) - len(scaled)
        arguments = (tensors[:count], tensors[count:], scaled, joined, dtype)
        results = _run(*arguments)
        _setup_context(ctx, arguments, results)
        needed = list(ctx.needs_input_grad[3 : 3 + count])
        for index, need in zip(scaled, ctx.needs_input_grad[3 + count :], strict=True):
            needed[index] |= need
        remaining = iter(needed)
        ctx.mark_non_differentiable(
            *[
                result
                for result, number in zip(results, joined, strict=True)
                if not any([next(remaining) for _ in range(number)])
            ]
        )
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *_backward(ctx, grads, ctx.needs_input_grad[3:])


_registered = torch.library.custom_op("golf::cast_weights", _run, mutates_args=())
_registered.register_fake(_results)


def _backward_of_registered(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    matrices_needed, scales_needed, *_ = ctx.needs_input_grad
    found = _backward(ctx, list(grads), [*matrices_needed, *scales_needed])
    # torch.library takes an empty list of numbers for one of tensors
    return found[: len(ctx.rows)], found[len(ctx.rows) :], None if ctx.scaled else [], None, None


_registered.register_autograd(_backward_of_registered, setup_context=_setup_context)


@dispatch.register_triton("cast_weights")
def _op(
    matrices: Sequence[Tensor], dtype: torch.dtype, scales: Sequence[Tensor | None], joined: Sequence[int]
) -> list[Tensor]:
    scaled = [index for index, scale in enumerate(scales) if scale is not None]
    given = [scales[index] for index in scaled]
    tensors = [*matrices, *given]
    if is_traced(tensors):
        return _registered(matrices, given, scaled, joined, dtype)
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return list(_CastWeights.apply(scaled, joined, dtype, *tensors))
    return _run(matrices, given, scaled, joined, dtype)


def cast_weights(
    matrices: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    scales: Sequence[Tensor | None] | None = None,
    joined: Sequence[int] | None = None,
) -> list[Tensor]:
    """All weight matrices of a model in the dtype that it computes in, done together.

        y_i[r, c] = scale_i[r] * w_i[r, c]

    rounded once to `dtype`. A scale of rows is one of the channels that the matrix's product gives, without a pass
    over activations. Matrices may be joined by rows: of query, key and value [C, D] each one result [3 C, D].

    Args:
        matrices: a list or tuple of [R, C], of any shapes, on one device and of one dtype: float32, bfloat16, float16
            or float64. R and C may be 0.
        dtype: of the results, one of the same.
        scales: for each matrix [R], of one dtype among the same, or None for 1. None: no matrix has one.
        joined: how many matrices make each result, one after another; all matrices, in their order. None: one each.

    Returns:
        As many tensors as `joined` has entries, each with its own memory; [sum of its matrices' R, C] in `dtype`.
        Computed in float32 (float64 for float64 matrices). Differentiable in matrices and scales:

            grad w_i[r, c] = scale_i[r] * grad y_i[r, c],   grad scale_i[r] = sum_c grad y_i[r, c] * w_i[r, c]

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a length does not fit, `joined` does not add up to the number of matrices or joins
            matrices of different widths, or the tensors are on different devices.

    Source: a kernel over a list of tensors by their addresses is the idea of Apex's multi-tensor apply.
    """
    check_float_dtype("dtype", dtype)
    if not isinstance(matrices, (list, tuple)):
        raise TypeError(f"matrices must be a list or tuple of tensors, not {type(matrices).__name__}")
    dtypes = FLOATS
    for index, matrix in enumerate(matrices):
        check_tensor(f"matrices[{index}]", matrix, dtypes, "RC")
        check_device(f"matrices[{index}]", matrix, "matrices[0]", matrices[0])
        dtypes = (matrix.dtype,)
    scales = [None] * len(matrices) if scales is None else scales
    check_length("scales", scales, "matrices", matrices)
    dtypes = FLOATS
    for index, (scale, matrix) in enumerate(zip(scales, matrices, strict=True)):
        if scale is not None:
            name, matrix_name = f"scales[{index}]", f"matrices[{index}]"
            check_tensor(name, scale, dtypes, "R")
            check_shape(name, scale, matrix.shape[:1], matrix_name, matrix)
            check_device(name, scale, matrix_name, matrix)
            dtypes = (scale.dtype,)
    joined = [1] * len(matrices) if joined is None else joined
    _check_joined(joined, matrices)
    if not matrices:
        return []
    return dispatch.implementation("cast_weights", matrices[0])(matrices, dtype, scales, joined)


def _check_joined(joined: object, matrices: Sequence[Tensor]) -> None:
    if not isinstance(joined, (list, tuple)):
        raise TypeError(f"joined must be a list or tuple of integers, not {type(joined).__name__}")
    for index, count in enumerate(joined):
        check_integer(f"joined[{index}]", count, 1)
    if sum(joined) != len(matrices):
        raise ValueError(f"joined adds up to {sum(joined)}; it must add up to {len(matrices)}, the number of matrices")
    first = 0
    for count in joined:
        for index in range(first + 1, first + count):
            if matrices[index].shape[1] != matrices[first].shape[1]:
                raise ValueError(
                    f"matrices[{index}] has shape {list(matrices[index].shape)}; joined to matrices[{first}] of shape "
                    f"{list(matrices[first].shape)} it must be [R, {matrices[first].shape[1]}]"
                )
        first += count
