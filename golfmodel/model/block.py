"""One transformer block with a learned mix of the residual stream and the input stage's output."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from golfmodel.config import Config
from golfmodel.model.attention import Attention
from golfmodel.model.layers import RMS_NORM_EPSILON, declare_channels
from golfmodel.model.mlp import MLP
from kernels import add_rms_norm


class Block(nn.Module):
    """`x <- m0 (x + w skip) + m1 x0`; `x <- x + a Attn(rmsnorm(x))`; `x <- x + b MLP(rmsnorm(x))`, all per channel."""

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
        skip_BTD: Tensor | None = None,
        skip_scale_D: Tensor | None = None,
    ) -> Tensor:
        """x, x0 and skip `[B, T, D]` to `[B, T, D]`; `rotary` and `mask` as `Attention` takes them.

        `skip_scale` `[D]` is w above.
        """
        mixed_BTD, normed_BTD = add_rms_norm(
            x_BTD, x0_BTD, self.residual_mix, self.input_mix, skip_BTD, skip_scale_D, eps=RMS_NORM_EPSILON
        )
        attended_BTD = self.attention(normed_BTD, rotary, mask, self.attention_scale)
        x_BTD, normed_BTD = add_rms_norm(mixed_BTD, attended_BTD, eps=RMS_NORM_EPSILON)
        return self.mlp(normed_BTD, x_BTD, self.mlp_scale)
