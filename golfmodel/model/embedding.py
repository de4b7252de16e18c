"""The input stage: token row + hashed bigram row, RMS norm, SmearGate.

B batch, T time, D model width, V vocabulary, K bigram buckets, I bigram width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.model.layers import RMS_NORM_EPSILON, Matrix, Source, cast_matrices, declare_channels
from golfmodel.model.parameters import Group, Storage, declare
from kernels import input_stage

BIGRAM_SCALE_INIT = 0.05
INT6_MIN_PROJECTION = 65_536


class TokenEmbedding(nn.Module):
    """The table `E` `[V, D]`, kept in the compute dtype; a tied head reads it too."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        std = config.tied_embed_init_std if config.tie_embeddings else 1.0
        weight_VD = (torch.randn(config.vocab_size, config.model_dim) * std).to(dtype)
        declare(self, "weight", weight_VD, Storage(config.embed_storage), Group.EMBEDDING)


class BigramEmbedding(nn.Module):
    """A hashed table `H` `[K, I]`, projected to the model's width by `P`, and the scale `s` of its rows.

    The projection commutes with the lookup, so `projected` makes it once, for K rows instead of B * T.
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

    def sources(self) -> tuple[Source, ...]:
        """Of P, where there is one."""
        return () if self.projection is None else (Source((self.projection,)),)

    def projected(self) -> Tensor:
        """`H P^T` `[K, D]`, P in the table's dtype; H where its rows are as wide as the model, without a P."""
        projections = cast_matrices(self.sources(), self.table.dtype)
        return F.linear(self.table, projections[0]) if projections else self.table


class SmearGate(nn.Module):
    """The logit of SmearGate's mix, per channel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        declare_channels(self, "gate", config.model_dim, 0.0)


class InputStage(nn.Module):
    """Tokens `[B, T]` to `x0` `[B, T, D]`, the input of the first block and a skip into every block.

    `x = E[t] + s * (H P^T)[h(t_prev, t)]`, RMS norm, then `x_i <- (1 - g) * x_i + g * x_{i-1}`: one kernel, which
    writes x0 and nothing else.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.token = TokenEmbedding(config, dtype)
        self.bigram = BigramEmbedding(config, dtype) if config.bigram_vocab_size else None
        self.smear = SmearGate(config)

    def forward(self, tokens_BT: Tensor, document_start_BT: Tensor | None = None) -> Tensor:
        """Integer tokens `[B, T]`, and where documents start (bool `[B, T]`) if they are to be kept apart."""
        return input_stage(
            tokens_BT,
            self.token.weight,
            self.smear.gate,
            None if self.bigram is None else self.bigram.projected(),
            None if self.bigram is None else self.bigram.scale,
            document_start_BT,
            eps=RMS_NORM_EPSILON,
        )
