"""The input stage: token row + hashed bigram row, RMS norm, SmearGate.

B batch, T time, D model width, V vocabulary, K bigram buckets, I bigram width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.model.layers import Matrix, declare_channels, rms_norm
from golfmodel.model.parameters import Group, Storage, declare
from kernels import bigram_hash_embed, smear_gate

BIGRAM_SCALE_INIT = 0.05
INT6_MIN_PROJECTION = 65_536


class TokenEmbedding(nn.Module):
    """The table `E` `[V, D]`, kept in the compute dtype; a tied head reads it too."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        std = config.tied_embed_init_std if config.tie_embeddings else 1.0
        weight_VD = (torch.randn(config.vocab_size, config.model_dim) * std).to(dtype)
        declare(self, "weight", weight_VD, Storage(config.embed_storage), Group.EMBEDDING)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class BigramEmbedding(nn.Module):
    """`s * (H[h(t_prev, t)] @ P^T)`: a hashed table `H` `[K, I]`, projected to the model's width.

    The projection commutes with the lookup, so `H @ P^T` is made once a call, K rows instead of B * T.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        table_KI = torch.zeros(config.bigram_vocab_size, config.bigram_dim, dtype=dtype)
        declare(self, "table", table_KI, Storage.INT8, Group.EMBEDDING)
        declare(self, "scale", torch.tensor(BIGRAM_SCALE_INIT), Storage.FP32, Group.SCALAR)
        self.projection: Matrix | None = None
        if config.bigram_dim != config.model_dim:
            large = config.bigram_dim * config.model_dim > INT6_MIN_PROJECTION
            self.projection = Matrix(
                config.bigram_dim,
                config.model_dim,
                storage=Storage.INT6 if large else Storage.FP16,
                gain=(2 * config.num_layers) ** -0.5,  # muP scaling of an output projection
                fake_quantize=config.qat_enabled,
            )

    def forward(self, tokens_BT: Tensor, document_start_BT: Tensor | None) -> Tensor:
        table_KD = self.table if self.projection is None else self.projection(self.table)
        return bigram_hash_embed(tokens_BT, table_KD, self.scale, document_start_BT)


class SmearGate(nn.Module):
    """`x_i <- (1 - g) * x_i + g * x_{i-1}`, `g = sigmoid(gate)` per channel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        declare_channels(self, "gate", config.model_dim, 0.0)

    def forward(self, x_BTD: Tensor, document_start_BT: Tensor | None) -> Tensor:
        return smear_gate(x_BTD, self.gate, document_start_BT)


class InputStage(nn.Module):
    """Tokens `[B, T]` to `x0` `[B, T, D]`, the input of the first block and a skip into every block."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.token = TokenEmbedding(config, dtype)
        self.bigram = BigramEmbedding(config, dtype) if config.bigram_vocab_size else None
        self.smear = SmearGate(config)

    def forward(self, tokens_BT: Tensor, document_start_BT: Tensor | None = None) -> Tensor:
        """Integer tokens `[B, T]`, and where documents start (bool `[B, T]`) if they are to be kept apart."""
        x_BTD = self.token(tokens_BT)
        if self.bigram is not None:
            x_BTD = x_BTD + self.bigram(tokens_BT, document_start_BT)
        return self.smear(rms_norm(x_BTD), document_start_BT)
