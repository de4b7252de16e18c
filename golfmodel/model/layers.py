"""The small pieces that the model is made of: weight matrices and their casts, per-channel vectors, RMS norm.

B batch, T time (tokens in a row), D model width, I and O a matrix's input and output widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfmodel.model.parameters import Group, Storage, declare
from kernels import cast_weights, fake_quantize_int6

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
    """A weight `W` `[O, I]` of `y = x W^T`, kept in float32; `cast_matrices` makes what x is multiplied by. No bias.

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


class Source(NamedTuple):
    """What a weight of the forward pass is made from: matrices, one above the other, and a scale of the rows of one.

    The scale multiplies y's channels without a pass over B * T rows of activations, or another for its gradient.
    """

    matrices: tuple[Matrix, ...]
    scale_O: Tensor | None = None


def cast_matrices(sources: Sequence[Source], dtype: torch.dtype) -> list[Tensor]:
    """A weight `[O, I]` in `dtype` for each source, all from one kernel.

    Where training fakes the artifact, another rounds the matrices to int6 levels first.
    """
    matrices = [matrix for source in sources for matrix in source.matrices]
    weights = [matrix.weight for matrix in matrices]
    rounded = [index for index, matrix in enumerate(matrices) if matrix.fake_quantize and matrix.training]
    fakes = fake_quantize_int6([weights[index] for index in rounded])
    for index, fake_OI in zip(rounded, fakes, strict=True):
        weights[index] = fake_OI
    scales = [source.scale_O for source in sources for _ in source.matrices]
    return cast_weights(weights, dtype, scales=scales, joined=[len(source.matrices) for source in sources])


def declare_channels(module: nn.Module, name: str, size: int, value: float) -> None:
    """Registers a float32 per-channel parameter `[size]` that starts at `value`."""
    declare(module, name, torch.full((size,), value), Storage.FP32, Group.SCALAR)
