"""One transformer block with a learned mix of the residual stream and the input stage's output."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from golfmodel.config import Config
from golfmodel.model.attention import Attention
from golfmodel.model.layers import declare_channels, rms_norm
from golfmodel.model.mlp import MLP


class Block(nn.Module):
    """`x <- m0 x + m1 x0`; `x <- x + a Attn(rmsnorm(x))`; `x <- x + b MLP(rmsnorm(x))`, all per channel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)
        declare_channels(self, "residual_mix", config.model_dim, 1.0)
        declare_channels(self, "input_mix", config.model_dim, 0.0)
        declare_channels(self, "attention_scale", config.model_dim, 1.0)
        declare_channels(self, "mlp_scale", config.model_dim, 1.0)

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """x and x0 `[B, T, D]` to `[B, T, D]`; `rotary` and `mask` as `Attention` takes them."""
        dtype = x_BTD.dtype
        x_BTD = self.residual_mix.to(dtype) * x_BTD + self.input_mix.to(dtype) * x0_BTD
        x_BTD = x_BTD + self.attention_scale.to(dtype) * self.attention(rms_norm(x_BTD), rotary, mask)
        return x_BTD + self.mlp_scale.to(dtype) * self.mlp(rms_norm(x_BTD))
