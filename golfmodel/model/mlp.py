"""The MLP of a block: `W2 relu(W1 x)^2`."""

from __future__ import annotations

from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.model.layers import Matrix
from golfmodel.model.parameters import Storage
from kernels import squared_relu_mlp


class MLP(nn.Module):
    """Squared ReLU (So et al. 2021), hidden width `MLP_MULT * D`; the output projection starts at zero."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        quantized = {"storage": Storage.INT6, "fake_quantize": config.qat_enabled}
        self.up = Matrix(config.model_dim, config.mlp_dim, **quantized)
        self.down = Matrix(config.mlp_dim, config.model_dim, gain=0.0, **quantized)

    def forward(self, x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor) -> Tensor:
        """`residual + W2 relu(W1 x)^2`, all `[B, T, D]`; W1 and W2 in x's dtype."""
        return squared_relu_mlp(x_BTD, up_HD, down_DH, residual_BTD)
