"""One transformer block with a learned mix of the residual stream and the input stage's output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from golfmodel.config import Config
from golfmodel.model.attention import Attention
from golfmodel.model.layers import RMS_NORM_EPSILON, Source, declare_channels
from golfmodel.model.mlp import MLP
from kernels import add_rms_norm


class BlockWeights(NamedTuple):
    """What a block multiplies by, in the compute dtype; the branches' scales are in the rows of `output` and `down`."""

    qkv_CD: Tensor
    output_DD: Tensor
    up_HD: Tensor
    down_DH: Tensor


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

    def sources(self) -> tuple[Source, ...]:
        """Of each of `BlockWeights`."""
        attention, mlp = self.attention, self.mlp
        return (
            Source((attention.query, attention.key, attention.value)),
            Source((attention.output,), self.attention_scale),
            Source((mlp.up,)),
            Source((mlp.down,), self.mlp_scale),
        )

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        weights: BlockWeights,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None = None,
        skip_BTD: Tensor | None = None,
        skip_scale_D: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, x0 and skip `[B, T, D]` to `[B, T, D]`; `weights` of `sources`, `rotary` and `mask` as for `Attention`.

        `skip_scale` `[D]` is w above. After the block's output come x and x0 again, for who uses them later: taken from
        here, their gradients are added up in the block's backward (`add_rms_norm`, `pass_on`).
        """
        mixed_BTD, normed_BTD, x_BTD, x0_BTD = add_rms_norm(
            *(x_BTD, x0_BTD, self.residual_mix, self.input_mix, skip_BTD, skip_scale_D),
            eps=RMS_NORM_EPSILON,
            pass_on=True,
        )
        attended_BTD = self.attention(normed_BTD, weights.qkv_CD, weights.output_DD, rotary, mask)
        residual_BTD, normed_BTD = add_rms_norm(mixed_BTD, attended_BTD, eps=RMS_NORM_EPSILON)
        return self.mlp(normed_BTD, weights.up_HD, weights.down_DH, residual_BTD), x_BTD, x0_BTD
