"""Bits per byte of a text under a model.

W windows, R rows in a batch, T targets a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from golfmodel.evaluation.windows import Windows
from golfmodel.runtime import faults
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import TrainingError
from golfmodel.runtime.progress import Progress

TokenLosses = Callable[[Tensor, Tensor], Tensor]


class Text(Protocol):
    """What is scored: tokens, and the bytes that each target stands for."""

    tokens: np.ndarray
    target_bytes: np.ndarray


@dataclass(frozen=True)
class Score:
    """What a text cost.

    Attributes:
        nats: the cost of every target.
        nats_after_prefix: the cost of the targets that a paid prefix does not cover.
        num_bytes: UTF-8 bytes that the targets stand for.
        num_targets: targets scored.
    """

    nats: float
    nats_after_prefix: float
    num_bytes: int
    num_targets: int

    @property
    def bits_per_byte(self) -> float:
        """(nats / ln 2) / bytes."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def bits_per_byte_with_prefix(self) -> float:
        """The same with covered targets at 0 bits; their bytes count."""
        return self.nats_after_prefix / math.log(2) / self.num_bytes


@torch.no_grad()
def score_text(
    token_losses: TokenLosses,
    text: Text,
    windows: Windows,
    ranks: Ranks,
    *,
    batch_tokens: int,
    prefix_targets: int = 0,
    label: str = "scoring",
) -> Score:
    """Scores every target of `text` once, the windows shared among the ranks.

    Every batch has the same shape, the last one padded with repeats that do not count, so that a compiled model is
    compiled once.

    Args:
        token_losses: (tokens `[R, T]`, targets `[R, T]`), int64, to nats `[R, T]`, float32.
        text: the text, with its windows from `plan_windows`.
        windows: which targets each row scores.
        ranks: who takes part; every rank gets the same score.
        batch_tokens: tokens scored at a time over all ranks; at least one row a rank is.
        prefix_targets: how many of the first targets a paid prefix covers.
        label: what the progress bar says.

    Raises:
        TrainingError: a loss is not finite.
    """
    length = windows.length
    rows = max(1, min(batch_tokens // (length * ranks.world_size), -(-len(windows) // ranks.world_size)))
    position_T = torch.arange(length, device=ranks.device)
    totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    mine = np.array_split(np.arange(len(windows)), ranks.world_size)[ranks.rank]
    with Progress(label, len(mine), unit="windows", enabled=ranks.is_main) as progress:
        for begin in range(0, len(mine), rows):
            faults.reach("scoring")
            chosen = mine[begin : begin + rows]
            padded = np.resize(chosen, rows)
            span = windows.start_W[padded][:, None] + np.arange(length + 1)
            tokens = torch.from_numpy(text.tokens[span].astype(np.int64)).to(ranks.device)
            start_R, first_R = (
                torch.from_numpy(a[padded]).to(ranks.device) for a in (windows.start_W, windows.first_W)
            )
            real_R = torch.arange(rows, device=ranks.device) < len(chosen)
            nats_RT = token_losses(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).double()
            counted_RT = (position_T >= first_R[:, None]) & real_R[:, None]
            uncovered_RT = counted_RT & (start_R[:, None] + position_T >= prefix_targets)
            totals += torch.stack(
                [
                    torch.where(counted_RT, nats_RT, 0.0).sum(),
                    torch.where(uncovered_RT, nats_RT, 0.0).sum(),
                    counted_RT.sum().double(),
                ]
            )
            progress.update(len(chosen))
    nats, nats_after_prefix, count = ranks.reduce_sum(totals).tolist()
    if not math.isfinite(nats):
        raise TrainingError(f"{label}: the model's losses on the validation text are not finite")
    return Score(nats, nats_after_prefix, int(text.target_bytes.sum()), int(count))
