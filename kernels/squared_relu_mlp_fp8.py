"""The MLP of a block with the factors of its products in float8, which Hopper multiplies twice as fast as bfloat16.

Rows are scaled to one norm. So every product of two rows is a cosine, known to be small before it is computed, and
the kernel that computes it can round it to float8 on the way out: no pass looks for the largest number first.

Shapes: B batch, T time, D model width, H hidden width; N = B * T rows. Of the kernels: R rows, C columns; M rows, N
columns of a product, K summed over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.launch import MAX_COLUMNS, VECTOR, aligned, cdiv, launch, processors, tl, triton
from kernels.matmul import descriptor, takes, work_of_product
from kernels.reference import FP8_NORM
from kernels.registration import register
from kernels.squared_relu_mlp import check_mlp, setup_context
from kernels.tuning import products, tile

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def rounded(x, float8: tl.constexpr, INTERPRETED: tl.constexpr):
    """x, well within the range of the type float8, in that type."""
    if INTERPRETED:  # which loses a carry from the mantissa into the exponent, so it is given what needs no rounding
        DROPPED: tl.constexpr = 20 if float8 == tl.float8e4nv else 21  # bits of float32's mantissa
        SMALLEST: tl.constexpr = 2.0**-6 if float8 == tl.float8e4nv else 2.0**-14  # of the normal numbers
        bits = x.to(tl.int32, bitcast=True)
        bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
        normal = (bits >> DROPPED << DROPPED).to(tl.float32, bitcast=True)
        SHIFT: tl.constexpr = SMALLEST * 1.5 * 2**DROPPED  # float32's spacing there is float8's below SMALLEST
        x = tl.where(tl.abs(x) < SMALLEST, x + SHIFT - SHIFT, normal)
    return x.to(float8)


@triton.jit(do_not_specialize=["R"])
def rows_in_fp8_kernel(
    p_rows, p_factor, p_other_factor, p_codes, p_norm, R,
    NORM: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, INTERPRETED: tl.constexpr,
    b_R: tl.constexpr, b_C: tl.constexpr,
):  # fmt: skip
    """Rows times both factors, scaled to NORM and rounded; what their norms were. One tile of whole rows a program.

    With TRANSPOSED the rows are the columns of a matrix [C, R].
    """
    r_R = tl.program_id(0) * b_R + tl.arange(0, b_R).to(tl.int64)
    r_C = tl.arange(0, b_C)
    m_R = r_R < R
    m_C = r_C < C
    m_RC = m_R[:, None] & m_C[None, :]
    place = r_C.to(tl.int64)[None, :] * R + r_R[:, None] if TRANSPOSED else r_R[:, None] * C + r_C[None, :]
    x = tl.load(p_rows + place, mask=m_RC, other=0).to(tl.float32)
    if p_factor is not None:
        factor_C = tl.load(p_factor + r_C, mask=m_C, other=0) * tl.load(p_other_factor + r_C, mask=m_C, other=0)
        x = tl.where(m_RC, x * factor_C[None, :], 0)
    norm_R = tl.sqrt(tl.sum(x * x, axis=1))
    usable_R = (norm_R > 0) & (norm_R < float("inf"))
    scale_R = NORM / tl.where(usable_R, norm_R, 1)
    x = tl.where(usable_R[:, None], x * scale_R[:, None], 0)
    codes = rounded(x, p_codes.dtype.element_ty, INTERPRETED)
    tl.store(p_codes + r_R[:, None] * C + r_C[None, :], codes, mask=m_RC)
    tl.store(p_norm + r_R, norm_R, mask=m_R)


@triton.jit
def finish(
    x, d_other, d_c, d_rounded, d_hidden, p_row, p_other_row, p_column, p_other_column, row, column, M, N,
    EPILOGUE: tl.constexpr, NORM: tl.constexpr, INTERPRETED: tl.constexpr, b_M: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """Writes the finished x, NORM^2 times the products of rows of norm 1, at [row, column].

    EPILOGUE is "squares": relu(x)^2 in float8; "added": x times the norms, plus other; "slopes": x sqrt(other), which
    is half the derivative of relu(x)^2 where other is its value, in float8 and with the norms, and other with its
    norms; or "input": 2 x times the norms.
    """
    x *= 1 / (NORM * NORM)
    if EPILOGUE == "squares":
        x = tl.where(x < 0, 0, x)
        d_c.store([row, column], rounded(NORM * x * x, d_c.dtype, INTERPRETED))
    else:
        r_M = row + tl.arange(0, b_M)
        r_N = column + tl.arange(0, b_N)
        row_M = tl.load(p_row + r_M, mask=r_M < M, other=0)
        other_row_M = tl.load(p_other_row + r_M, mask=r_M < M, other=0)
        column_N = tl.load(p_column + r_N, mask=r_N < N, other=0)
        if EPILOGUE != "slopes":
            x *= (row_M * other_row_M)[:, None] * column_N[None, :]
            if EPILOGUE == "input":
                x *= 2  # of the square's derivative
            elif d_other is not None:
                x += d_other.load([row, column]).to(tl.float32)
            d_c.store([row, column], x.to(d_c.dtype))
        else:
            other_column_N = tl.load(p_other_column + r_N, mask=r_N < N, other=0)
            squares = d_other.load([row, column]).to(tl.float32) / NORM
            x *= tl.sqrt(squares)
            d_rounded.store([row, column], rounded(NORM * x, d_rounded.dtype, INTERPRETED))
            x *= (2 * row_M * other_row_M)[:, None] * (column_N * other_column_N)[None, :]
            d_c.store([row, column], x.to(d_c.dtype))
            root = row_M[:, None] * column_N[None, :]
            d_hidden.store([row, column], (squares * (root * root)).to(d_hidden.dtype))


@triton.jit(do_not_specialize=["M"])
def product_of_rows_kernel(
    d_a, d_b, d_other, d_c, d_rounded, d_hidden, p_row, p_other_row, p_column, p_other_column, M, N, K,
    EPILOGUE: tl.constexpr, NORM: tl.constexpr, FLATTEN: tl.constexpr, INTERPRETED: tl.constexpr,
    b_M: tl.constexpr, b_N: tl.constexpr, b_K: tl.constexpr,
):  # fmt: skip
    """Every row of a times every row of b, finished. Programs take tiles in turn, those of one row together.

    A tensor core keeps some 14 bits of a sum of float8 products, so each step's sum is added up in float32. A number
    that is rounded to float8 afterwards would else often fall to the other side.
    """
    columns = tl.cdiv(N, b_N)
    for number in tl.range(tl.program_id(0), tl.cdiv(M, b_M) * columns, tl.num_programs(0), flatten=FLATTEN):
        row = number // columns * b_M
        column = number % columns * b_N
        x = tl.zeros((b_M, b_N), tl.float32)
        for k in range(0, K, b_K):
            a = d_a.load([row, k])
            b = d_b.load([column, k]).T
            if INTERPRETED:  # which cannot multiply float8
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, b, x, max_num_imprecise_acc=b_K)
        left, right = tl.split(tl.permute(tl.reshape(x, (b_M, 2, b_N // 2)), (0, 2, 1)))
        finish(
            left, d_other, d_c, d_rounded, d_hidden, p_row, p_other_row, p_column, p_other_column, row, column,
            M, N, EPILOGUE, NORM, INTERPRETED, b_M, b_N // 2,
        )  # fmt: skip
        finish(
            right, d_other, d_c, d_rounded, d_hidden, p_row, p_other_row, p_column, p_other_column, row,
            column + b_N // 2, M, N, EPILOGUE, NORM, INTERPRETED, b_M, b_N // 2,
        )  # fmt: skip


def _rows_in_fp8(rows: Tensor, dtype: torch.dtype, *factors: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """As the definition's, of two factors or none; with `transposed` the rows are the columns of `rows`."""
    R, C = rows.shape[::-1] if transposed else rows.shape
    codes_RC, norm_R = rows.new_empty((R, C), dtype=dtype), rows.new_empty(R, dtype=torch.float32)
    b_R, b_C, num_warps = tile("rows_in_fp8", C, rows.get_device())
    launch(
        rows_in_fp8_kernel,
        (cdiv(R, b_R),),
        (rows, *(factors or (None, None)), codes_RC, norm_R),
        (R,),
        (FP8_NORM, C, transposed, not rows.is_cuda, b_R, b_C),
        num_warps=num_warps,
    )
    return codes_RC, norm_R


def _product_of_rows(
    a_MK: Tensor,
    b_NK: Tensor,
    dtype: torch.dtype,
    epilogue: str,
    row_norms: tuple[Tensor | None, Tensor | None] = (None, None),
    column_norms: tuple[Tensor | None, Tensor | None] = (None, None),
    other_MN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `finish` writes for an epilogue: c in `dtype`, and for "slopes" them in float8 and the hidden values."""
    (M, K), N = a_MK.shape, b_NK.shape[0]
    size = products(a_MK.get_device())[f"fp8_{epilogue}"]
    b_M, b_N, b_K = size.rows, size.columns, size.depth
    half = [b_M, b_N // 2]
    c_MN = a_MK.new_empty((M, N), dtype=dtype)
    rounded_MN = hidden_MN = None
    if epilogue == "slopes":
        rounded_MN, hidden_MN = a_MK.new_empty((M, N), dtype=E5M2), torch.empty_like(c_MN)
    finished = (other_MN, c_MN, rounded_MN, hidden_MN)
    grid = (min(cdiv(M, b_M) * cdiv(N, b_N), size.programs * processors(a_MK.device)),)
    launch(
        product_of_rows_kernel,
        grid,
        (*row_norms, *column_norms),
        (M,),
        (N, K, epilogue, FP8_NORM, size.flatten, not a_MK.is_cuda, b_M, b_N, b_K),
        descriptors=(
            *(descriptor(a_MK, [b_M, b_K]), descriptor(b_NK, [b_N, b_K])),
            *(None if tensor is None else descriptor(tensor, half) for tensor in finished),
        ),
        num_warps=size.num_warps,
        num_stages=size.stages,
        counted=lambda: work_of_product(M, N, K, (a_MK, b_NK, *finished, *row_norms, *column_norms)),
    )
    return c_MN, rounded_MN, hidden_MN


def _takes(x_ND: Tensor, up_HD: Tensor, down_DH: Tensor) -> bool:
    """Whether the kernels work on these: what bfloat16's take, and rows of whole vectors in float8 too."""
    widths = up_HD.shape
    return takes(x_ND, up_HD, down_DH) and all(width % VECTOR == 0 and width <= MAX_COLUMNS for width in widths)


def _run(
    x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and what backward needs: the squares' float8 as bytes, and the norms of x's and up's rows.

    As bytes, because the checks of registered ops (`torch.library.opcheck`) sum what an op returns.
    """
    x_ND, up_HD, down_DH = aligned(x_BTD).flatten(0, 1), aligned(up_HD), aligned(down_DH)
    if not _takes(x_ND, up_HD, down_DH):
        y_BTD, squares_NH, *norms = reference.squared_relu_mlp_fp8_forward(x_BTD, up_HD, down_DH, residual_BTD)
        return y_BTD, squares_NH.view(torch.uint8), *norms
    residual_ND = None if residual_BTD is None else aligned(residual_BTD).flatten(0, 1)
    x_ND, x_norm_N = _rows_in_fp8(x_ND, E4M3)
    up_HD, up_norm_H = _rows_in_fp8(up_HD, E4M3)
    down_DH, down_norm_D = _rows_in_fp8(down_DH, E4M3, up_norm_H, up_norm_H)
    squares_NH, *_ = _product_of_rows(x_ND, up_HD, E4M3, "squares")
    norms = (x_norm_N, x_norm_N), (down_norm_D, None)
    y_ND, *_ = _product_of_rows(squares_NH, down_DH, x_BTD.dtype, "added", *norms, residual_ND)
    return y_ND.view(x_BTD.shape), squares_NH.view(torch.uint8), x_norm_N, up_norm_H


def _fake(
    x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, hidden = x_BTD.shape[0] * x_BTD.shape[1], up_HD.shape[0]
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    norms = (x_BTD.new_empty(size, dtype=dtype) for size in (rows, hidden))
    return x_BTD.new_empty(x_BTD.shape), x_BTD.new_empty((rows, hidden), dtype=torch.uint8), *norms


def _run_backward(
    grad_BTD: Tensor,
    x_BTD: Tensor,
    up_HD: Tensor,
    down_DH: Tensor,
    squares_NH: Tensor,
    x_norm_N: Tensor,
    up_norm_H: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down.

    The weights' sum over the rows of x, along which float8 lies the wrong way for Hopper: they stay in bfloat16.
    """
    grad_ND, x_ND = (aligned(tensor).flatten(0, 1) for tensor in (grad_BTD, x_BTD))
    up_HD, down_DH, squares_NH = aligned(up_HD), aligned(down_DH), squares_NH.view(E4M3)
    if not _takes(x_ND, up_HD, down_DH):
        kept = squares_NH, x_norm_N, up_norm_H
        return reference.squared_relu_mlp_fp8_backward(grad_BTD, x_BTD, up_HD, down_DH, *kept)
    codes_ND, grad_norm_N = _rows_in_fp8(grad_ND, E5M2)
    down_HD, down_norm_H = _rows_in_fp8(down_DH, E4M3, transposed=True)
    up_DH, back_norm_D = _rows_in_fp8(up_HD, E4M3, up_norm_H, down_norm_H, transposed=True)
    row_norms = x_norm_N, grad_norm_N
    grad_h_NH, rounded_NH, hidden_NH = _product_of_rows(
        codes_ND, down_HD, x_BTD.dtype, "slopes", row_norms, (up_norm_H, down_norm_H), squares_NH
    )
    grad_x_ND, *_ = _product_of_rows(rounded_NH, up_DH, x_BTD.dtype, "input", row_norms, (back_norm_D, None))
    return grad_x_ND.view(x_BTD.shape), grad_h_NH.mT @ x_ND, grad_ND.mT @ hidden_NH


def _fake_backward(
    grad_BTD: Tensor, x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), up_HD.new_empty(up_HD.shape), down_DH.new_empty(down_DH.shape)


_backward_op = register("squared_relu_mlp_fp8_backward", _run_backward, _fake_backward)


def _backward(ctx: Any, grad_BTD: Tensor | None, *_: None) -> tuple:
    if grad_BTD is None:
        return None, None, None, None
    return *_backward_op(grad_BTD, *ctx.saved_tensors), grad_BTD if ctx.adds else None


_op = register("squared_relu_mlp_fp8", _run, _fake, differentiate=_backward, setup_context=setup_context)


@dispatch.register_triton("squared_relu_mlp_fp8")
def _result(*arguments: Any) -> Tensor:
    return _op(*arguments)[0]


def squared_relu_mlp_fp8(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
    """`squared_relu_mlp` with the factors of four of its six products rounded to float8.

        h = x up^T,   y = residual + relu(h)^2 down^T

    Each row of a factor is scaled to norm 256 and rounded, to e4m3 (4 significant bits) activations and weights, to
    e5m2 (3) gradients. Products are accumulated in float32 and take the norms back. In float8 are both products
    forward and backward those that lead to x; a weight's gradient is a product in x's dtype, of the unrounded x and
    upstream gradient, of relu(h)^2 as it was rounded forward and of h's gradient before it is rounded. On normal
    numbers the result is some 5 % off the unrounded op's, gradients 5 to 10 % (relative norms). relu(h)^2 is kept for
    backward in float8, half of what `squared_relu_mlp` keeps.

    The kernels take bfloat16 on Hopper, where D and H are multiples of 16; for what else there is, the definition
    rounds the same way and multiplies in float32, which is slow.

    Args:
        x_BTD: [B, T, D], float32, bfloat16, float16 or float64.
        up_HD: [H, D] in x's dtype.
        down_DH: [D, H] in x's dtype.
        residual_BTD: [B, T, D] in x's dtype; None for 0.

    Returns:
        [B, T, D] in x's dtype. Differentiable in all; rounding passes gradients as they are. A row of zeros gives
        zeros. A row of x whose norm is not finite in float32 gives NaN, and one below 1e-19 or so zeros.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not one of those above or not x's.
        ValueError: a shape does not fit, or the tensors are on different devices.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, for the formats and which takes what; So et al. 2021,
    arXiv:2109.08668, for the squared ReLU.
    """
    check_mlp(x_BTD, up_HD, down_DH, residual_BTD)
    return dispatch.implementation("squared_relu_mlp_fp8", x_BTD)(x_BTD, up_HD, down_DH, residual_BTD)
