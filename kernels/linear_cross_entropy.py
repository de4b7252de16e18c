"""The head of a language model and its loss: logits, soft cap, cross-entropy, and their gradient in the logits' place.

Shapes: B batch, T time, D model width, V vocabulary; N = B * T rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, INTEGERS, check_device, check_integer, check_shape, check_tensor
from kernels.launch import MAX_COLUMNS, aligned, cdiv, compute_dtype, launch, tl, triton
from kernels.registration import register
from kernels.tuning import tile

REDUCTIONS = ("mean", "none")


@triton.jit
def tanh(x, COMPUTE: tl.constexpr):
    """tanh(x), to float32's precision near 0 too."""
    size = tl.abs(x)
    power = tl.exp(-2 * size)
    value = (1 - power) / (1 + power)
    if tl.float32 == COMPUTE:  # where 1 - power cancels, the first terms of the series
        square = size * size
        series = 2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))
        series = size * (1 + square * (-1.0 / 3 + square * series))
        value = tl.where(size < 0.25, series, value)
    return tl.where(x < 0, -value, value)


@triton.jit(do_not_specialize=["N"])
def cross_entropy_kernel(
    p_logits, p_targets, p_losses, N,
    CAP: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_V: tl.constexpr,
):  # fmt: skip
    """The loss of b_N whole rows a program, and its gradient by the logits in their place. NaN without a target."""
    first_row = tl.program_id(0) * b_N
    r_N = tl.arange(0, b_N)
    r_V = tl.arange(0, b_V)[None, :]
    m_N = r_N < N - first_row
    m_NV = m_N[:, None] & (r_V < V)
    p_logits += first_row.to(tl.int64) * V + r_N[:, None] * V + r_V
    z = tl.load(p_logits, mask=m_NV, other=0).to(COMPUTE)
    if CAP is not None:
        ratio = tanh(z / CAP, COMPUTE)
        slope = 1 - ratio * ratio
        z = CAP * ratio
    else:
        slope = tl.full((b_N, b_V), 1, COMPUTE)
    z = tl.where(r_V < V, z, -float("inf"))
    largest_N = tl.max(z, axis=1)
    power = tl.exp(z - largest_N[:, None])
    total_N = tl.sum(power, axis=1)
    target_N = tl.load(p_targets + first_row + r_N, mask=m_N, other=0)
    known_N = (target_N >= 0) & (target_N < V)
    hit = r_V == target_N.to(tl.int64)[:, None]
    loss_N = largest_N + tl.log(total_N) - tl.sum(tl.where(hit, z, 0), axis=1)
    tl.store(p_losses + first_row + r_N, tl.where(known_N, loss_N, float("nan")), mask=m_N)
    grad = (power / total_N[:, None] - tl.where(hit, 1, 0)) * slope
    grad = tl.where(known_N[:, None], grad, float("nan"))
    tl.store(p_logits, grad.to(p_logits.dtype.element_ty), mask=m_NV)


def _run(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, soft_cap: float | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """The mean loss or all of them, and each row's gradient by its logits [N, V]."""
    rows_NV = F.linear(aligned(x_BTD).flatten(0, 1), aligned(weight_VD))
    rows, vocabulary = rows_NV.shape
    losses_N = x_BTD.new_empty(rows, dtype=torch.promote_types(x_BTD.dtype, torch.float32))
    b_N, b_V, num_warps = tile("cross_entropy", vocabulary, x_BTD.get_device())
    constants = (soft_cap, vocabulary, compute_dtype(x_BTD.dtype), b_N, b_V)
    tensors = (rows_NV, targets_BT.contiguous(), losses_N)
    launch(cross_entropy_kernel, (cdiv(rows, b_N),), tensors, (rows,), constants, num_warps=num_warps)
    return losses_N.mean() if reduction == "mean" else losses_N.view(targets_BT.shape), rows_NV


def _fake(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, soft_cap: float | None, reduction: str
) -> tuple[Tensor, Tensor]:
    rows = x_BTD.shape[0] * x_BTD.shape[1]
    loss = x_BTD.new_empty(
        () if reduction == "mean" else targets_BT.shape, dtype=torch.promote_types(x_BTD.dtype, torch.float32)
    )
    return loss, x_BTD.new_empty((rows, weight_VD.shape[0]))


def _run_backward(grad: Tensor, x_BTD: Tensor, weight_VD: Tensor, grad_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the weight, from the mean's [] or every loss's [B, T]."""
    x_ND, weight_VD = aligned(x_BTD).flatten(0, 1), aligned(weight_VD)
    if x_BTD.dtype == torch.float16:  # which holds neither weights as small as 1 / N nor sums over N rows
        grad_NV, x_ND, weight_VD = grad_NV.float(), x_ND.float(), weight_VD.float()
    if grad.dim():
        scale_N1 = grad.flatten()[:, None]
        grad_x_ND = grad_NV @ weight_VD * scale_N1
        grad_weight_VD = grad_NV.mT @ (x_ND * scale_N1).to(x_ND.dtype)
    else:
        scale = grad / max(len(grad_NV), 1)
        grad_x_ND = grad_NV @ (weight_VD * scale).to(weight_VD.dtype)
        grad_weight_VD = grad_NV.mT @ x_ND * scale
    return grad_x_ND.view(x_BTD.shape).to(x_BTD.dtype), grad_weight_VD.to(x_BTD.dtype)


def _fake_backward(grad: Tensor, x_BTD: Tensor, weight_VD: Tensor, grad_NV: Tensor) -> tuple[Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), weight_VD.new_empty(weight_VD.shape)


_backward_op = register("linear_cross_entropy_backward", _run_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_BTD, weight_VD, *_ = inputs
    _, grad_NV = output
    ctx.mark_non_differentiable(grad_NV)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_BTD, weight_VD, grad_NV)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return None, None, None, None, None
    return *_backward_op(grad, *ctx.saved_tensors), None, None, None


_op = register("linear_cross_entropy", _run, _fake, differentiate=_backward, setup_context=_setup_context)


@dispatch.register_triton("linear_cross_entropy")
def _loss(*arguments: Any) -> Tensor:
    return _op(*arguments)[0]


def linear_cross_entropy(
    x_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    soft_cap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The cross-entropy, in nats, of logits that are made here and never kept.

        z = x weight^T,   z <- soft_cap * tanh(z / soft_cap)
        loss = log(sum(exp(z))) - z[target],   and its mean over B and T

    Logits are rounded to x's dtype, as a product's result is, and everything after that is computed in float32
    (float64 for a float64 x). The forward pass leaves their gradient in their place.

    Args:
        x_BTD: [B, T, D], float32, bfloat16, float16 or float64; the mean of no rows is NaN.
        weight_VD: [V, D] in x's dtype, V from 1 to 2^20.
        targets_BT: [B, T], any integer dtype, each in [0, V). Looking at the values would make the host wait for
            the device, so a GPU does not check them: a target outside gives NaN, and never a stray read.
        soft_cap: the largest size of a capped logit, above 0 and finite; None for no cap.
        reduction: "mean", or "none" for the loss of every target.

    Returns:
        [], or [B, T] without reduction; float32 (float64 for a float64 x). Differentiable in x and weight.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above, soft_cap is no number, or reduction
            is no string.
        ValueError: a shape does not fit, V is not from 1 to 2^20, soft_cap is not above 0 or not finite, reduction is
            neither of its choices, or the tensors are on different devices.

    Source: the soft cap of Gemma 2, 2024, arXiv:2408.00118; the gradient in the logits' place is an idea of Hsu et al.
    2024, arXiv:2410.10989.
    """
    check_tensor("x_BTD", x_BTD, FLOATS, "BTD")
    check_tensor("weight_VD", weight_VD, (x_BTD.dtype,), "VD")
    check_shape("weight_VD", weight_VD, (weight_VD.shape[0], x_BTD.shape[2]), "x_BTD", x_BTD)
    check_integer("weight_VD's number of rows", weight_VD.shape[0], 1, MAX_COLUMNS)
    check_device("weight_VD", weight_VD, "x_BTD", x_BTD)
    check_tensor("targets_BT", targets_BT, INTEGERS, "BT")
    check_shape("targets_BT", targets_BT, x_BTD.shape[:2], "x_BTD", x_BTD)
    check_device("targets_BT", targets_BT, "x_BTD", x_BTD)
    if soft_cap is not None:
        if not isinstance(soft_cap, (int, float)):
            raise TypeError(f"soft_cap must be a number or None, not {type(soft_cap).__name__}")
        if not 0 < soft_cap < math.inf:
            raise ValueError(f"soft_cap is {soft_cap}; it must be above 0 and finite")
        soft_cap = float(soft_cap)
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, not {type(reduction).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it may be {' or '.join(map(repr, REDUCTIONS))}")
    return dispatch.implementation("linear_cross_entropy", x_BTD)(x_BTD, weight_VD, targets_BT, soft_cap, reduction)
