"""Causal grouped-query attention with QK-norm, rotary embedding and a gain per query head.

B batch, T time, D model width, H query heads, G key/value heads, h head size, C = (H + 2 G) h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from golfmodel.config import Config
from golfmodel.model.layers import RMS_NORM_EPSILON, Matrix, declare_channels
from golfmodel.model.parameters import Storage
from kernels import qk_norm_rotary

ROTARY_NATIVE_LENGTH = 1024

_BLOCK_TABLES = tuple(
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
)


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, h/2]` in float32 of the angles `position / base^(2j/h)`.

    Beyond 1,024 tokens the base grows to `base * (T / 1024)^(h / (h - 2))`, which stretches the slowest
    wavelengths by the same factor as the text (NTK-aware scaling).
    """
    if length > ROTARY_NATIVE_LENGTH and head_dim > 2:
        base = base * (length / ROTARY_NATIVE_LENGTH) ** (head_dim / (head_dim - 2))
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), base**-exponent)
    return angle.cos(), angle.sin()


class Rotary(nn.Module):
    """The tables for one length, sliced for shorter texts and remade for longer ones.

    Texts shorter than the training rows use the training rows' base, so that positions mean what they did there.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.length, self.head_dim, self.base = config.train_seq_len, config.head_dim, config.rope_base
        self.dtype = dtype
        self.register_buffer("cos", torch.empty(self.length, self.head_dim // 2, dtype=dtype), persistent=False)
        self.register_buffer("sin", torch.empty(self.length, self.head_dim // 2, dtype=dtype), persistent=False)
        self.fill_tables()

    def fill_tables(self) -> None:
        """Computes the tables where they are; again after `to_empty`."""
        cos, sin = rotary_tables(self.length, self.head_dim, self.base, self.cos.device)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self.length:
            return self.cos[:length], self.sin[:length]
        cos, sin = rotary_tables(length, self.head_dim, self.base, self.cos.device)
        return cos.to(self.dtype), sin.to(self.dtype)


def document_mask(document_start_BT: Tensor) -> Tensor | BlockMask:
    """Which keys a query sees: those before it, back to the start of its document.

    A block mask for the compiled GPU path, a boolean `[B, 1, T, T]` elsewhere.
    """
    document_BT = document_start_BT.cumsum(dim=1)
    batch, length = document_BT.shape
    if document_BT.is_cuda and torch.compiler.is_compiling():

        def same_document(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_BT[b, query] == document_BT[b, key])

        return _with_strides_kept(
            create_block_mask(same_document, batch, None, length, length, device=document_BT.device)
        )
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


def _with_strides_kept(mask: BlockMask) -> BlockMask:
    """The same mask, its tables laid out in memory as they say.

    flex_attention's kernels go from one text's tables to the next by the stride of the dimension of heads. That has
    one entry here, which leaves Inductor free to give it any stride, and the kernels then read past the tables (torch
    2.11, without gradients). A stride asked for by `as_strided` is kept.
    """
    for name in _BLOCK_TABLES:
        table = getattr(mask, name)
        setattr(mask, name, table.as_strided(table.shape, table.stride()))
    return mask


class Attention(nn.Module):
    """`softmax(q k^T / sqrt(h)) v` over earlier tokens, then an output projection that starts at zero."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        quantized = {"storage": Storage.INT6, "fake_quantize": config.qat_enabled}
        self.query = Matrix(config.model_dim, config.model_dim, **quantized)
        self.key = Matrix(config.model_dim, kv_dim, **quantized)
        self.value = Matrix(config.model_dim, kv_dim, **quantized)
        self.output = Matrix(config.model_dim, config.model_dim, gain=0.0, **quantized)
        declare_channels(self, "query_gain", self.num_heads, config.qk_gain_init)

    def forward(
        self,
        x_BTD: Tensor,
        qkv_CD: Tensor,
        output_DD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """x `[B, T, D]` to `[B, T, D]`, by weights in x's dtype: query's rows above key's and value's, and output's.

        `rotary` from `Rotary`, `mask` from `document_mask` or None for causal.
        """
        q_BTHh, k_BTGh, v_BTGh = qk_norm_rotary(
            F.linear(x_BTD, qkv_CD), self.query_gain, *rotary, self.num_kv_heads, eps=RMS_NORM_EPSILON
        )
        q, k, v = q_BTHh.transpose(1, 2), k_BTGh.transpose(1, 2), v_BTGh.transpose(1, 2)
        if isinstance(mask, BlockMask):
            y_BHTh = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            y_BHTh = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_heads != self.num_kv_heads
            )
        return F.linear(y_BHTh.transpose(1, 2).flatten(2), output_DD)
