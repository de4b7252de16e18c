"""Models of a few thousand parameters, every one of them random, so that no zero or one at the start hides an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from golfmodel.config import Config
from golfmodel.model.gpt import GPT

SMALL = {
    "num_layers": 2,
    "model_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "vocab_size": 11,
    "bigram_vocab_size": 7,
    "bigram_dim": 5,
    "train_seq_len": 16,
    "train_batch_tokens": 64,
    "compute_dtype": "float32",
}


def small_config(**options: Any) -> Config:
    return Config(**{**SMALL, **options})


def random_model(config: Config, seed: int = 0) -> GPT:
    """A model whose matrices, vectors and scalars are all random: logits and attention scores of order 1."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "input.token" in name or name.endswith("table"):
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.size(1) ** -0.5)
            else:
                parameter.normal_(mean=0.7, std=0.6)
    return model


def random_batch(config: Config, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(tokens, targets) `[B, T]`; targets are the tokens one further on."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
