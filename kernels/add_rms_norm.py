"""Sum of the residual stream and what joins it, and the sum's RMS norm, in one pass.

Shapes: B batch, T time, D channels; N = B * T rows; P programs; 3 scales: of x, y and skip, in this order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_eps, check_integer, check_shape, check_tensor
from kernels.column_sums import column_sums
from kernels.launch import MAX_COLUMNS, cdiv, compute_dtype, contiguous, launch, tl, triton
from kernels.registration import is_traced, register
from kernels.tuning import tile

BACKWARD_TILES = 32  # tiles a program adds up before it writes its share of the scales' gradients


@triton.jit
def load_scale(p_scale, r_D, m_D, COMPUTE: tl.constexpr):
    """A scale [1, b_D]; 1 where there is none."""
    scale = 1.0
    if p_scale is not None:
        scale = tl.load(p_scale + r_D, mask=m_D, other=0).to(COMPUTE)[None, :]
    return scale


@triton.jit
def load_tile(p_x, base, offsets, m_ND, COMPUTE: tl.constexpr):
    """The tile [b_N, b_D] of a tensor."""
    return tl.load(p_x + base + offsets, mask=m_ND, other=0).to(COMPUTE)


@triton.jit
def load_stream(p_x, p_skip, skip_scale, base, offsets, m_ND, COMPUTE: tl.constexpr):
    """x + skip_scale skip, and skip (0 where there is none)."""
    stream = load_tile(p_x, base, offsets, m_ND, COMPUTE)
    skip = tl.zeros_like(stream)
    if p_skip is not None:
        skip = load_tile(p_skip, base, offsets, m_ND, COMPUTE)
        stream += skip_scale * skip
    return stream, skip


@triton.jit(do_not_specialize=["N"])
def add_rms_norm_fwd_kernel(
    p_x, p_y, p_x_scale, p_y_scale, p_skip, p_skip_scale, p_sum, p_normed, p_inverse, N,
    EPS: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """sum, normed and inverse = 1 / rms(sum). One tile of whole rows a program."""
    first_row = tl.program_id(0) * b_N
    r_N = tl.arange(0, b_N)
    r_D = tl.arange(0, b_D)
    m_N = r_N < N - first_row
    m_D = r_D < D
    m_ND = m_N[:, None] & m_D[None, :]
    offsets = r_N[:, None] * D + r_D[None, :]  # [b_N, b_D]
    base = first_row.to(tl.int64) * D
    x_scale = load_scale(p_x_scale, r_D, m_D, COMPUTE)
    y_scale = load_scale(p_y_scale, r_D, m_D, COMPUTE)
    skip_scale = load_scale(p_skip_scale, r_D, m_D, COMPUTE)
    stream, _ = load_stream(p_x, p_skip, skip_scale, base, offsets, m_ND, COMPUTE)
    total = x_scale * stream + y_scale * load_tile(p_y, base, offsets, m_ND, COMPUTE)
    inverse_N = tl.rsqrt(tl.sum(total * total, axis=1) / D + EPS)
    tl.store(p_sum + base + offsets, total.to(p_sum.dtype.element_ty), mask=m_ND)
    tl.store(p_normed + base + offsets, (total * inverse_N[:, None]).to(p_normed.dtype.element_ty), mask=m_ND)
    tl.store(p_inverse + first_row + r_N, inverse_N, mask=m_N)


@triton.jit(do_not_specialize=["N"])
def add_rms_norm_bwd_kernel(
    p_inverse, p_normed, p_x, p_y, p_x_scale, p_y_scale, p_skip, p_skip_scale, p_grad_sum, p_grad_normed,
    p_later_x, p_later_y, p_grad_x, p_grad_y, p_grad_skip, p_sums, N,
    D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """grad = grad_sum + inverse (grad_normed - n mean(grad_normed n)), times the scales; sums [3, P, D] for theirs.

    `later_x` and `later_y` are the gradients of what uses x and y after this op; they are added to theirs. n is read
    from `normed`, or where that is None computed again. TILES tiles of whole rows a program.
    """
    r_N = tl.arange(0, b_N)
    r_D = tl.arange(0, b_D)
    m_D = r_D < D
    offsets = r_N[:, None] * D + r_D[None, :]  # [b_N, b_D]
    x_scale = load_scale(p_x_scale, r_D, m_D, COMPUTE)
    y_scale = load_scale(p_y_scale, r_D, m_D, COMPUTE)
    skip_scale = load_scale(p_skip_scale, r_D, m_D, COMPUTE)
    x_sums = tl.zeros((b_N, b_D), COMPUTE)
    y_sums = tl.zeros((b_N, b_D), COMPUTE)
    skip_sums = tl.zeros((b_N, b_D), COMPUTE)
    begin = tl.program_id(0) * TILES * b_N
    for index in range(tl.cdiv(tl.minimum(N - begin, TILES * b_N).to(tl.int32), b_N)):
        first_row = begin + index * b_N
        m_N = r_N < N - first_row
        m_ND = m_N[:, None] & m_D[None, :]
        base = first_row.to(tl.int64) * D
        inverse = tl.load(p_inverse + first_row + r_N, mask=m_N, other=0)[:, None]
        if p_normed is not None:
            n = load_tile(p_normed, base, offsets, m_ND, COMPUTE)
        else:
            stream, skip = load_stream(p_x, p_skip, skip_scale, base, offsets, m_ND, COMPUTE)
            y = load_tile(p_y, base, offsets, m_ND, COMPUTE)
            n = (x_scale * stream + y_scale * y) * inverse
        grad = tl.zeros((b_N, b_D), COMPUTE)
        if p_grad_normed is not None:
            grad_n = load_tile(p_grad_normed, base, offsets, m_ND, COMPUTE)
            grad = inverse * (grad_n - n * (tl.sum(grad_n * n, axis=1) / D)[:, None])
        if p_grad_sum is not None:
            grad += load_tile(p_grad_sum, base, offsets, m_ND, COMPUTE)
        grad_stream = x_scale * grad
        grad_x = grad_stream
        if p_later_x is not None:
            grad_x += load_tile(p_later_x, base, offsets, m_ND, COMPUTE)
        tl.store(p_grad_x + base + offsets, grad_x.to(p_grad_x.dtype.element_ty), mask=m_ND)
        if p_grad_y is not None:
            grad_y = y_scale * grad
            if p_later_y is not None:
                grad_y += load_tile(p_later_y, base, offsets, m_ND, COMPUTE)
            tl.store(p_grad_y + base + offsets, grad_y.to(p_grad_y.dtype.element_ty), mask=m_ND)
        if p_grad_skip is not None:
            grad_skip = skip_scale * grad_stream
            tl.store(p_grad_skip + base + offsets, grad_skip.to(p_grad_skip.dtype.element_ty), mask=m_ND)
        if p_x_scale is not None:
            x_sums += grad * stream
        if p_y_scale is not None:
            y_sums += grad * y
        if p_skip_scale is not None:
            skip_sums += grad_stream * skip
    programs = tl.num_programs(0).to(tl.int64)
    share = tl.program_id(0).to(tl.int64) * D + r_D
    if p_x_scale is not None:
        tl.store(p_sums + share, tl.sum(x_sums, axis=0), mask=m_D)
    if p_y_scale is not None:
        tl.store(p_sums + programs * D + share, tl.sum(y_sums, axis=0), mask=m_D)
    if p_skip_scale is not None:
        tl.store(p_sums + 2 * programs * D + share, tl.sum(skip_sums, axis=0), mask=m_D)


@triton.jit
def store_total(p_sums, p_grad, P, D: tl.constexpr, COMPUTE: tl.constexpr, b_P: tl.constexpr, b_D: tl.constexpr):
    """grad = the sum of `sums` [P, D] down each column; nothing where grad is None."""
    if p_grad is not None:
        r_D = tl.program_id(0) * b_D + tl.arange(0, b_D)
        total = column_sums(p_sums, r_D, P, D, COMPUTE, b_P, b_D)
        tl.store(p_grad + r_D, total.to(p_grad.dtype.element_ty), mask=r_D < D)


@triton.jit(do_not_specialize=["P"])
def scale_grads_kernel(
    p_sums, p_grad_x_scale, p_grad_y_scale, p_grad_skip_scale, P,
    D: tl.constexpr, COMPUTE: tl.constexpr, b_P: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """Each scale's gradient, from its part of `sums` [3, P, D]; a program has some columns of one scale."""
    scale = tl.program_id(1)
    p_sums += scale.to(tl.int64) * P * D
    if scale == 0:
        store_total(p_sums, p_grad_x_scale, P, D, COMPUTE, b_P, b_D)
    elif scale == 1:
        store_total(p_sums, p_grad_y_scale, P, D, COMPUTE, b_P, b_D)
    else:
        store_total(p_sums, p_grad_skip_scale, P, D, COMPUTE, b_P, b_D)


def _run(
    x_BTD: Tensor,
    y_BTD: Tensor,
    x_scale_D: Tensor | None,
    y_scale_D: Tensor | None,
    skip_BTD: Tensor | None,
    skip_scale_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The two results, and the inverse of the root mean square of each row for the backward pass."""
    x_BTD = x_BTD.contiguous()
    batch, time, channels = x_BTD.shape
    sum_BTD, normed_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
    inverse_BT = x_BTD.new_empty((batch, time), dtype=torch.promote_types(x_BTD.dtype, torch.float32))
    b_N, b_D, num_warps = tile("add_rms_norm_fwd", channels, x_BTD.get_device())
    tensors = (
        *(x_BTD, y_BTD.contiguous(), contiguous(x_scale_D), contiguous(y_scale_D)),
        *(contiguous(skip_BTD), contiguous(skip_scale_D), sum_BTD, normed_BTD, inverse_BT),
    )
    constants = (eps, channels, compute_dtype(x_BTD.dtype), b_N, b_D)
    grid = (cdiv(batch * time, b_N),)
    launch(add_rms_norm_fwd_kernel, grid, tensors, (batch * time,), constants, num_warps=num_warps)
    return sum_BTD, normed_BTD, inverse_BT


def _fake(x_BTD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    return x_BTD.new_empty(x_BTD.shape), x_BTD.new_empty(x_BTD.shape), x_BTD.new_empty(x_BTD.shape[:2], dtype=wide)


def _run_backward(
    grad_sum_BTD: Tensor | None,
    grad_normed_BTD: Tensor | None,
    inverse_BT: Tensor,
    normed_BTD: Tensor | None,
    x_BTD: Tensor | None,
    y_BTD: Tensor | None,
    x_scale_D: Tensor | None,
    y_scale_D: Tensor | None,
    skip_BTD: Tensor | None,
    skip_scale_D: Tensor | None,
    later_x_BTD: Tensor | None,
    later_y_BTD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, y, x_scale, y_scale, skip and skip_scale; empty for what is None.

    Of `normed_BTD` and those six, one or the other is None. `later_x` and `later_y`, which go with the six, are the
    gradients of what uses x and y afterwards.
    """
    like_BTD = contiguous(x_BTD if normed_BTD is None else normed_BTD)
    batch, time, channels = like_BTD.shape
    b_N, b_D, num_warps = tile("add_rms_norm_bwd", channels, like_BTD.get_device())
    # with no sums to add up there is nothing to be won from fewer programs
    tiles = BACKWARD_TILES if normed_BTD is None else 1
    programs = cdiv(batch * time, b_N * tiles)
    grad_x_BTD = torch.empty_like(like_BTD)
    grad_y_BTD, grad_skip_BTD = (None if term is None else torch.empty_like(like_BTD) for term in (y_BTD, skip_BTD))
    sums_3PD = None if normed_BTD is not None else inverse_BT.new_empty((3, programs, channels))
    tensors = (
        *(inverse_BT.contiguous(), contiguous(normed_BTD), contiguous(x_BTD), contiguous(y_BTD)),
        *(contiguous(x_scale_D), contiguous(y_scale_D), contiguous(skip_BTD), contiguous(skip_scale_D)),
        *(contiguous(grad_sum_BTD), contiguous(grad_normed_BTD), contiguous(later_x_BTD), contiguous(later_y_BTD)),
        *(grad_x_BTD, grad_y_BTD, grad_skip_BTD, sums_3PD),
    )
    compute = compute_dtype(like_BTD.dtype)
    constants = (channels, compute, b_N, b_D, tiles)
    launch(add_rms_norm_bwd_kernel, (programs,), tensors, (batch * time,), constants, num_warps=num_warps)

    scales = (x_scale_D, y_scale_D, skip_scale_D)
    grads = [None if scale_D is None else scale_D.new_empty(channels) for scale_D in scales]
    if sums_3PD is not None:
        b_P, b_D, num_warps = tile("column_sums", channels, like_BTD.get_device())
        constants = (channels, compute, b_P, b_D)
        grid = (cdiv(channels, b_D), 3)
        launch(scale_grads_kernel, grid, (sums_3PD, *grads), (programs,), constants, num_warps=num_warps)
    grads = (grad_x_BTD, grad_y_BTD, *grads[:2], grad_skip_BTD, grads[2])
    return tuple(like_BTD.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(
    grad_sum_BTD: Tensor | None,
    grad_normed_BTD: Tensor | None,
    inverse_BT: Tensor,
    normed_BTD: Tensor | None,
    x_BTD: Tensor | None,
    y_BTD: Tensor | None,
    x_scale_D: Tensor | None,
    y_scale_D: Tensor | None,
    skip_BTD: Tensor | None,
    skip_scale_D: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like_BTD = x_BTD if normed_BTD is None else normed_BTD
    others = (y_BTD, x_scale_D, y_scale_D, skip_BTD, skip_scale_D)
    return (
        like_BTD.new_empty(like_BTD.shape),
        *(like_BTD.new_empty(0) if other is None else other.new_empty(other.shape) for other in others),
    )


_backward_op = register("add_rms_norm_backward", _run_backward, _fake_backward)


def _has_scales(inputs: tuple) -> bool:
    """Whether any of an op's arguments is a scale."""
    _, _, x_scale_D, y_scale_D, _, skip_scale_D, _ = inputs
    return any([scale_D is not None for scale_D in (x_scale_D, y_scale_D, skip_scale_D)])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    _, normed_BTD, inverse_BT = output
    ctx.mark_non_differentiable(inverse_BT)
    ctx.set_materialize_grads(False)
    ctx.scaled = _has_scales(inputs)
    # Without scales every term has the same gradient, and nothing but the norm is needed for it.
    ctx.save_for_backward(inverse_BT, *((None, *tensors) if ctx.scaled else (normed_BTD, *[None] * len(tensors))))


def _backward(
    ctx: Any,
    grad_sum_BTD: Tensor | None,
    grad_normed_BTD: Tensor | None,
    _: None,
    later_x_BTD: Tensor | None = None,
    later_y_BTD: Tensor | None = None,
) -> tuple:
    grads = _backward_op(grad_sum_BTD, grad_normed_BTD, *ctx.saved_tensors, later_x_BTD, later_y_BTD)
    if not ctx.scaled:
        grads = [grads[0]] * len(grads)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


_op = register("add_rms_norm", _run, _fake, differentiate=_backward, setup_context=_setup_context)


class _PassesOn(torch.autograd.Function):
    """`_run` with scales, and with x and y among its outputs, as no registered op may have them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = _run(*arguments)
        _setup_context(ctx, arguments, output)
        return *output, *arguments[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        return _backward(ctx, *gradients)


@dispatch.register_triton("add_rms_norm")
def _results(*arguments: Any, pass_on: bool) -> tuple[Tensor, ...]:
    x_BTD, y_BTD, *_ = arguments
    # Without scales both have the same gradient, in the same memory; and what the function returns requires one.
    differentiated = torch.is_grad_enabled() and x_BTD.requires_grad and y_BTD.requires_grad
    if pass_on and _has_scales(arguments) and differentiated and not is_traced(arguments):
        sum_BTD, normed_BTD, _, x_BTD, y_BTD = _PassesOn.apply(*arguments)
    else:
        sum_BTD, normed_BTD, _ = _op(*arguments)
    return (sum_BTD, normed_BTD, x_BTD, y_BTD) if pass_on else (sum_BTD, normed_BTD)


def add_rms_norm(
    x_BTD: Tensor,
    y_BTD: Tensor,
    x_scale_D: Tensor | None = None,
    y_scale_D: Tensor | None = None,
    skip_BTD: Tensor | None = None,
    skip_scale_D: Tensor | None = None,
    *,
    eps: float = 2.0**-23,
    pass_on: bool = False,
) -> tuple[Tensor, ...]:
    """Adds two or three tensors, each scaled by channel, and normalizes every row of the sum.

        sum    = x_scale * (x + skip_scale * skip) + y_scale * y
        normed = sum / sqrt(mean(sum^2) + eps)

    with the mean over a row's channels.

    Args:
        x_BTD: [B, T, D] with D from 1 to 2^20, float32, bfloat16, float16 or float64; B and T may be 0.
        y_BTD: [B, T, D], in x's dtype.
        x_scale_D: [D], any of the same dtypes, not necessarily x's, as are the other scales; None for 1.
        y_scale_D: [D]; None for 1.
        skip_BTD: [B, T, D], in x's dtype; None for no third term.
        skip_scale_D: [D]; None for 1.
        eps: added to the mean square; not negative.
        pass_on: whether x and y are returned as well.

    Returns:
        sum and normed, each [B, T, D] in x's dtype, computed in float32 (float64 for a float64 x) and rounded
        once: what is normalized is the sum before its rounding. Differentiable in all tensors. Without scales
        `normed` and a number for each row are all that is kept for the backward pass, so that the rounding of
        `normed` is part of the gradient.

        With `pass_on` also x and y, in the memory of those given and not to be changed in place. Who uses these from
        here on instead of those given has the gradients added in this op's backward pass: one more read, where
        autograd's own addition is a pass over three tensors. So it is with a kernel, with scales, and where x and y
        both require a gradient; else they are the tensors that were given.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above, eps is no number, or pass_on no
            bool.
        ValueError: a shape does not fit, D is not from 1 to 2^20, eps is negative, skip_scale comes without skip, or
            the tensors are on different devices.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, for RMS norm; the blocks of the parameter-golf records for
    what is added: the input stage's output and a U-Net's skip connection.
    """
    check_tensor("x_BTD", x_BTD, FLOATS, "BTD")
    check_integer("x_BTD's number of channels", x_BTD.shape[2], 1, MAX_COLUMNS)
    for name, term_BTD in (("y_BTD", y_BTD), ("skip_BTD", skip_BTD)):
        if term_BTD is not None or name == "y_BTD":
            check_tensor(name, term_BTD, (x_BTD.dtype,), "BTD")
            check_shape(name, term_BTD, x_BTD.shape, "x_BTD", x_BTD)
            check_device(name, term_BTD, "x_BTD", x_BTD)
    for name, scale_D in (("x_scale_D", x_scale_D), ("y_scale_D", y_scale_D), ("skip_scale_D", skip_scale_D)):
        if scale_D is not None:
            check_tensor(name, scale_D, FLOATS, "D")
            check_shape(name, scale_D, x_BTD.shape[2:], "x_BTD", x_BTD)
            check_device(name, scale_D, "x_BTD", x_BTD)
    if skip_scale_D is not None and skip_BTD is None:
        raise ValueError("skip_scale_D is given without skip_BTD, the tensor that it scales")
    check_eps(eps)
    if not isinstance(pass_on, bool):
        raise TypeError(f"pass_on must be a bool, not {type(pass_on).__name__}")
    run = dispatch.implementation("add_rms_norm", x_BTD)
    return run(x_BTD, y_BTD, x_scale_D, y_scale_D, skip_BTD, skip_scale_D, eps, pass_on=pass_on)
