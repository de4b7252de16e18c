"""Token ids as texts have them: a few are frequent, most are rare."""

from __future__ import annotations

import torch
from torch import Tensor


def token_batch(rows: int, length: int, vocab_size: int, device: torch.device, *, seed: int = 0) -> Tensor:
    """int64 `[rows, length]` in [0, vocab_size); token k is drawn in proportion to 1 / (k + 2) (Zipf's law).

    How long a lookup's gradient takes depends on the most frequent ids, which uniform ones would hide.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(2, vocab_size + 2, dtype=torch.float64)
    drawn = torch.multinomial(weights, rows * length, replacement=True, generator=generator)
    return drawn.view(rows, length).to(device)
