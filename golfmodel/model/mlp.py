"""The MLP of a block: `W2 relu(W1 x)^2`."""

from __future__ import annotations

from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.model.layers import Matrix
from golfmodel.model.parameters import Storage
from kernels import squared_relu_mlp, squared_relu_mlp_fp8


class MLP(nn.Module):
    """Squared ReLU (So et al. 2021), hidden width `MLP_MULT * D`; the output projection starts at zero.

    With `MLP_FP8` training rounds the products' factors to float8. A score does not: it is of the artifact's weights.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fp8 = config.mlp_fp8
        quantized = {"storage": Storage.INT6, "fake_quantize": config.qat_enabled}
        self.up = Matrix(config.model_dim, config.mlp_dim, **quantized)
        self.down = Matrix(config.mlp_dim, config.model_dim, gain=0.0, **quantized)

    def forward(self, x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor) -> Tensor:
        """`residual + W2 relu(W1 x)^2`, all `[B, T, D]`; W1 and W2 in x's dtype."""
        op = squared_relu_mlp_fp8 if self.fp8 and self.training else squared_relu_mlp
        return op(x_BTD, up_HD, down_DH, residual_BTD)
