"""The MLP of a block: two matrix products around a squared ReLU, and the residual stream they are added to.

Shapes: B batch, T time, D model width, H hidden width; N = B * T rows.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_shape, check_tensor
from kernels.launch import aligned
from kernels.matmul import matmul, takes
from kernels.registration import register


def _run(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and what backward needs [N, H]: relu(h)^2 from the kernel, relu(h) from PyTorch's products."""
    x_ND, up_HD, down_DH = aligned(x_BTD).flatten(0, 1), aligned(up_HD), aligned(down_DH)
    residual_ND = None if residual_BTD is None else residual_BTD.flatten(0, 1)
    if takes(x_ND, up_HD, down_DH):
        kept_NH = matmul(x_ND, up_HD, b_transposed=True, epilogue="squared_relu")
        y_ND = matmul(kept_NH, down_DH, residual_ND, b_transposed=True, epilogue="added")
    else:
        kept_NH = F.linear(x_ND, up_HD).relu_()
        y_ND = F.linear(kept_NH.square(), down_DH)
        if residual_ND is not None:
            y_ND += residual_ND
    return y_ND.view(x_BTD.shape), kept_NH


def _fake(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x_BTD.shape[0] * x_BTD.shape[1]
    return x_BTD.new_empty(x_BTD.shape), x_BTD.new_empty((rows, up_HD.shape[0]))


def _run_backward(
    grad_BTD: Tensor, x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, kept_NH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down."""
    grad_ND, x_ND = (aligned(tensor).flatten(0, 1) for tensor in (grad_BTD, x_BTD))
    up_HD, down_DH = aligned(up_HD), aligned(down_DH)
    if takes(x_ND, up_HD, down_DH):
        hidden_NH = kept_NH
        grad_h_NH = matmul(grad_ND, down_DH, hidden_NH, epilogue="squared_relu_backward")
    else:
        hidden_NH = kept_NH.square()
        grad_h_NH = (grad_ND @ down_DH).mul_(kept_NH).mul_(2)
    grad_x_ND = grad_h_NH @ up_HD
    return grad_x_ND.view(x_BTD.shape), grad_h_NH.mT @ x_ND, grad_ND.mT @ hidden_NH


def _fake_backward(
    grad_BTD: Tensor, x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, kept_NH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), up_HD.new_empty(up_HD.shape), down_DH.new_empty(down_DH.shape)


_backward_op = register("squared_relu_mlp_backward", _run_backward, _fake_backward)


def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keeps for backward the inputs but the residual, and every output but the first, the result `[B, T, D]`."""
    x_BTD, up_HD, down_DH, residual_BTD = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.adds = residual_BTD is not None
    ctx.save_for_backward(x_BTD, up_HD, down_DH, *output[1:])


def _backward(ctx: Any, grad_BTD: Tensor | None, _: None) -> tuple:
    if grad_BTD is None:
        return None, None, None, None
    return *_backward_op(grad_BTD, *ctx.saved_tensors), grad_BTD if ctx.adds else None


_op = register("squared_relu_mlp", _run, _fake, differentiate=_backward, setup_context=setup_context)


@dispatch.register_triton("squared_relu_mlp")
def _result(*arguments: Any) -> Tensor:
    return _op(*arguments)[0]


def check_mlp(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None) -> None:
    """The arguments of an MLP: floats of one dtype on one device, of shapes that fit."""
    check_tensor("x_BTD", x_BTD, FLOATS, "BTD")
    check_tensor("up_HD", up_HD, (x_BTD.dtype,), "HD")
    check_shape("up_HD", up_HD, (up_HD.shape[0], x_BTD.shape[2]), "x_BTD", x_BTD)
    check_tensor("down_DH", down_DH, (x_BTD.dtype,), "DH")
    check_shape("down_DH", down_DH, up_HD.shape[::-1], "up_HD", up_HD)
    for name, weight in (("up_HD", up_HD), ("down_DH", down_DH)):
        check_device(name, weight, "x_BTD", x_BTD)
    if residual_BTD is not None:
        check_tensor("residual_BTD", residual_BTD, (x_BTD.dtype,), "BTD")
        check_shape("residual_BTD", residual_BTD, x_BTD.shape, "x_BTD", x_BTD)
        check_device("residual_BTD", residual_BTD, "x_BTD", x_BTD)


def squared_relu_mlp(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
    """An MLP with a squared ReLU, added to the residual stream where there is one.

        h = x up^T,   y = residual + relu(h)^2 down^T

    The kernels take bfloat16 on Hopper, where D and H are multiples of 8; what else there is, PyTorch multiplies.
    Between them lies relu(h)^2 alone, [B, T, H] in x's dtype: backward has its derivative, 2 relu(h), from its root.

    Args:
        x_BTD: [B, T, D], float32, bfloat16, float16 or float64.
        up_HD: [H, D] in x's dtype.
        down_DH: [D, H] in x's dtype.
        residual_BTD: [B, T, D] in x's dtype; None for 0.

    Returns:
        [B, T, D] in x's dtype; products are accumulated in float32 (float64 for float64). Differentiable in all.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not one of those above or not x's.
        ValueError: a shape does not fit, or the tensors are on different devices.

    Source: So et al. 2021, arXiv:2109.08668, for the squared ReLU.
    """
    check_mlp(x_BTD, up_HD, down_DH, residual_BTD)
    return dispatch.implementation("squared_relu_mlp", x_BTD)(x_BTD, up_HD, down_DH, residual_BTD)
