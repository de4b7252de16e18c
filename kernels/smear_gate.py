"""SmearGate: each position mixed with the one before it, channel by channel.

Shapes: B batch, T time, D channels.
"""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_document_start, check_shape, check_tensor


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
