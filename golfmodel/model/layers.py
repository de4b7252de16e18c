"""The small pieces that the model is made of: a weight matrix, per-channel vectors, RMS norm.

B batch, T time (tokens in a row), D model width, I and O a matrix's input and output widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfmodel.model.parameters import Group, Storage, declare
from kernels import fake_quantize_int6

RMS_NORM_EPSILON = 2.0**-23
ORTHOGONAL_MIN_SIDE = 64


def rms_norm(x: Tensor) -> Tensor:
    """`x / sqrt(mean(x^2) + 2^-23)` over the last dimension, in x's dtype, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPSILON)


def initial_matrix(out_features: int, in_features: int, *, gain: float = 1.0) -> Tensor:
    """The start of a matrix `[O, I]`: orthogonal, or PyTorch's Linear default where a side is below 64.

    `gain` 0 gives zeros. Values are rounded to bfloat16, then kept in float32.
    """
    weight_OI = torch.zeros(out_features, in_features)
    if gain == 0.0:
        return weight_OI
    if min(out_features, in_features) >= ORTHOGONAL_MIN_SIDE:
        nn.init.orthogonal_(weight_OI)
    else:
        bound = in_features**-0.5
        nn.init.uniform_(weight_OI, -bound, bound)
    return (gain * weight_OI).bfloat16().float()


class Matrix(nn.Module):
    """`y = x W^T` with `W` `[O, I]` kept in float32 and cast to x's dtype; no bias.

    With `fake_quantize`, training sees W as the artifact will store it (int6), and W's gradient passes through.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        storage: Storage,
        group: Group = Group.MATRIX,
        gain: float = 1.0,
        fake_quantize: bool = False,
    ) -> None:
        super().__init__()
        self.fake_quantize = fake_quantize and storage is Storage.INT6
        declare(self, "weight", initial_matrix(out_features, in_features, gain=gain), storage, group)

    def cast(self, dtype: torch.dtype, scale_O: Tensor | None = None) -> Tensor:
        """W `[O, I]` in `dtype`, rounded to int6 levels first where training fakes the artifact.

        With a scale W's rows are multiplied by it, which scales y's channels without a pass over B * T rows of
        activations, or another for the scale's gradient.
        """
        rounded = self.fake_quantize and self.training
        if scale_O is None:
            return fake_quantize_int6(self.weight, dtype) if rounded else self.weight.to(dtype)
        weight_OI = fake_quantize_int6(self.weight, self.weight.dtype) if rounded else self.weight
        return (scale_O[:, None] * weight_OI).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.cast(x.dtype))


def declare_channels(module: nn.Module, name: str, size: int, value: float) -> None:
    """Registers a float32 per-channel parameter `[size]` that starts at `value`."""
    declare(module, name, torch.full((size,), value), Storage.FP32, Group.SCALAR)
