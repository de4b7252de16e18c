"""SmearGate: every position takes in some of the one before it, channel by channel.

Shapes: B batch, T time, D channels; N = B * T rows; P programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_document_start, check_shape, check_tensor
from kernels.column_sums import column_sums
from kernels.launch import cdiv, compute_dtype, contiguous, launch, tl, triton
from kernels.registration import register
from kernels.tuning import tile

BACKWARD_TILES = 32  # tiles a program adds up before it writes its share of the gate's gradient


@triton.jit
def load_mix(p_gate, r_D, m_D, COMPUTE: tl.constexpr):
    """g = sigmoid(gate) [b_D]."""
    return 1 / (1 + tl.exp(-tl.load(p_gate + r_D, mask=m_D, other=0).to(COMPUTE)))


@triton.jit(do_not_specialize=["N", "T"])
def smear_gate_fwd_kernel(
    p_x, p_gate, p_start, p_y, N, T, D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr
):
    """y = (1 - g) x + g x_before. One tile of rows a program; the row before comes out of the cache."""
    first_row = tl.program_id(0) * b_N
    r_N = tl.arange(0, b_N)
    r_D = tl.program_id(1) * b_D + tl.arange(0, b_D)
    m_N = r_N < N - first_row
    m_D = r_D < D
    starts_N = (first_row + r_N) % T == 0
    if p_start is not None:
        starts_N = starts_N | (tl.load(p_start + first_row + r_N, mask=m_N, other=0) != 0)
    offsets = r_N[:, None] * D + r_D[None, :]  # [b_N, b_D]
    m_ND = m_N[:, None] & m_D[None, :]
    base = first_row.to(tl.int64) * D
    p_x += base
    x = tl.load(p_x + offsets, mask=m_ND, other=0).to(COMPUTE)
    before = tl.load(p_x - D + offsets, mask=m_ND & ~starts_N[:, None], other=0).to(COMPUTE)
    mix = load_mix(p_gate, r_D, m_D, COMPUTE)[None, :]
    y = (1 - mix) * x + mix * before
    tl.store(p_y + base + offsets, y.to(p_y.dtype.element_ty), mask=m_ND)


@triton.jit(do_not_specialize=["N", "T"])
def smear_gate_bwd_kernel(
    p_grad, p_x, p_gate, p_start, p_grad_x, p_sums, N, T,
    D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """grad_x = (1 - g) grad + g grad_after; sums [P, D] of x (grad_after - grad), TILES tiles of rows a program."""
    r_N = tl.arange(0, b_N)
    r_D = tl.program_id(1) * b_D + tl.arange(0, b_D)
    m_D = r_D < D
    offsets = r_N[:, None] * D + r_D[None, :]  # [b_N, b_D]
    mix = load_mix(p_gate, r_D, m_D, COMPUTE)[None, :]
    sums = tl.zeros((b_N, b_D), COMPUTE)
    begin = tl.program_id(0) * TILES * b_N
    for index in range(tl.cdiv(tl.minimum(N - begin, TILES * b_N).to(tl.int32), b_N)):
        first_row = begin + index * b_N
        m_N = r_N < N - first_row
        continues_N = m_N & ((first_row + r_N + 1) % T != 0)
        if p_start is not None:
            continues_N = continues_N & (tl.load(p_start + first_row + r_N + 1, mask=continues_N, other=1) == 0)
        m_ND = m_N[:, None] & m_D[None, :]
        base = first_row.to(tl.int64) * D
        grad = tl.load(p_grad + base + offsets, mask=m_ND, other=0).to(COMPUTE)
        after = tl.load(p_grad + base + D + offsets, mask=continues_N[:, None] & m_D[None, :], other=0).to(COMPUTE)
        x = tl.load(p_x + base + offsets, mask=m_ND, other=0).to(COMPUTE)
        grad_x = (1 - mix) * grad + mix * after
        tl.store(p_grad_x + base + offsets, grad_x.to(p_grad_x.dtype.element_ty), mask=m_ND)
        sums += x * (after - grad)
    tl.store(p_sums + tl.program_id(0).to(tl.int64) * D + r_D, tl.sum(sums, axis=0), mask=m_D)


@triton.jit(do_not_specialize=["P"])
def gate_grad_kernel(
    p_sums, p_gate, p_grad_gate, P, D: tl.constexpr, COMPUTE: tl.constexpr, b_P: tl.constexpr, b_D: tl.constexpr
):
    """grad_gate = g (1 - g) * the sum of `sums` [P, D] down each column."""
    r_D = tl.program_id(0) * b_D + tl.arange(0, b_D)
    m_D = r_D < D
    mix = load_mix(p_gate, r_D, m_D, COMPUTE)
    grad_gate = mix * (1 - mix) * column_sums(p_sums, r_D, P, D, COMPUTE, b_P, b_D)
    tl.store(p_grad_gate + r_D, grad_gate.to(p_grad_gate.dtype.element_ty), mask=m_D)


def gate_grad(sums_PD: Tensor, gate_D: Tensor) -> Tensor:
    """g (1 - g) * sums_PD.sum(0), in the gate's dtype."""
    grad_D = torch.empty_like(gate_D)
    programs, channels = sums_PD.shape
    b_P, b_D, num_warps = tile("column_sums", channels, sums_PD.get_device())
    constants = (channels, compute_dtype(sums_PD.dtype), b_P, b_D)
    grid = (cdiv(channels, b_D),)
    launch(gate_grad_kernel, grid, (sums_PD, gate_D, grad_D), (programs,), constants, num_warps=num_warps)
    return grad_D


def _run(x_BTD: Tensor, gate_D: Tensor, document_start_BT: Tensor | None) -> Tensor:
    x_BTD, gate_D = x_BTD.contiguous(), gate_D.contiguous()
    y_BTD = torch.empty_like(x_BTD)
    batch, time, channels = x_BTD.shape
    b_N, b_D, num_warps = tile("smear_gate_fwd", channels, x_BTD.get_device())
    grid = (cdiv(batch * time, b_N), cdiv(channels, b_D))
    constants = (channels, compute_dtype(x_BTD.dtype), b_N, b_D)
    tensors = (x_BTD, gate_D, contiguous(document_start_BT), y_BTD)
    launch(smear_gate_fwd_kernel, grid, tensors, (batch * time, time), constants, num_warps=num_warps)
    return y_BTD


def _fake(x_BTD: Tensor, gate_D: Tensor, document_start_BT: Tensor | None) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


def _run_backward(
    grad_BTD: Tensor, x_BTD: Tensor, gate_D: Tensor, document_start_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_BTD, x_BTD, gate_D = grad_BTD.contiguous(), x_BTD.contiguous(), gate_D.contiguous()
    batch, time, channels = x_BTD.shape
    b_N, b_D, num_warps = tile("smear_gate_bwd", channels, x_BTD.get_device())
    programs = cdiv(batch * time, b_N * BACKWARD_TILES)
    grad_x_BTD = torch.empty_like(x_BTD)
    sums_PD = x_BTD.new_empty((programs, channels), dtype=torch.promote_types(x_BTD.dtype, torch.float32))
    tensors = (grad_BTD, x_BTD, gate_D, contiguous(document_start_BT), grad_x_BTD, sums_PD)
    constants = (channels, compute_dtype(x_BTD.dtype), b_N, b_D, BACKWARD_TILES)
    grid = (programs, cdiv(channels, b_D))
    launch(smear_gate_bwd_kernel, grid, tensors, (batch * time, time), constants, num_warps=num_warps)
    return grad_x_BTD, gate_grad(sums_PD, gate_D)


def _fake_backward(
    grad_BTD: Tensor, x_BTD: Tensor, gate_D: Tensor, document_start_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), gate_D.new_empty(gate_D.shape)


_backward_op = register("smear_gate_backward", _run_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward_op(grad_BTD, *ctx.saved_tensors), None


_op = register("smear_gate", _run, _fake, differentiate=_backward, setup_context=_setup_context)
dispatch.register_triton("smear_gate")(_op)


def smear_gate(x_BTD: Tensor, gate_D: Tensor, document_start_BT: Tensor | None = None) -> Tensor:
    """Mixes every position with its predecessor by a learned gate per channel.

        y[b, i] = (1 - g) * x[b, i] + g * x[b, i - 1],   g = sigmoid(gate)

    where x[b, -1] = 0, and the predecessor is 0 (not merely multiplied by 0: a NaN or an infinity in it has
    no effect) wherever `document_start` is true as well.

    Args:
        x_BTD: [B, T, D], float32, bfloat16, float16 or float64; any of the three may be 0.
        gate_D: [D], the logit of the mix; any of the same dtypes, not necessarily x's.
        document_start_BT: [B, T] bool, true at the first token of each document; None: position 0 alone.

    Returns:
        [B, T, D] in x's dtype, computed in float32 (float64 for a float64 x), rounded once.
        Differentiable in x and gate.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above.
        ValueError: a shape does not fit, or the tensors are on different devices.

    Source: the SmearGate of the parameter-golf records; one position of smearing is a depthwise causal
    convolution of width two whose taps sum to 1.
    """
    check_tensor("x_BTD", x_BTD, FLOATS, "BTD")
    check_tensor("gate_D", gate_D, FLOATS, "D")
    check_shape("gate_D", gate_D, x_BTD.shape[2:], "x_BTD", x_BTD)
    check_device("gate_D", gate_D, "x_BTD", x_BTD)
    check_document_start(document_start_BT, "x_BTD", x_BTD)
    return dispatch.implementation("smear_gate", x_BTD)(x_BTD, gate_D, document_start_BT)
