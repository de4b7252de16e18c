"""Two orders in which training shards become micro-batches.

A stream is a pure function of a position: `read(position)` gives this rank's part of the micro-batch that starts
there, and `advance` says how far the next one is. Positions count what all ranks together have consumed, so that
they mean the same under any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from golfmodel.data.shards import check_token_ids, open_shard, split_marker
from golfmodel.runtime.errors import DataError


class Stream(Protocol):
    """An endless sequence of micro-batches, read by position.

    Attributes:
        advance: the distance between the positions of one micro-batch and the next.
    """

    advance: int

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's `(inputs_BT, targets_BT)` of the micro-batch at `position`, uint16.

        Raises:
            DataError: a token id is outside the vocabulary; names the shard.
        """

    def identity(self) -> dict[str, Any]:
        """What two streams must agree on for a position of one to mean the same in the other; JSON values."""


class InOrderStream:
    """The seed's order: all shards as one endless text, of which each rank takes the next span in turn.

    Spans share no token: at position p, rank r reads the `micro_batch_tokens + 1` tokens from
    `p + r * (micro_batch_tokens + 1)`, cut into rows of `seq_len`. Rows run across documents and shards;
    after the last shard comes the first. A position counts tokens.

    Raises:
        DataError: a shard is damaged or is validation text, or all together hold less than one span.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        seq_len: int,
        micro_batch_tokens: int,
        rank: int,
        world_size: int,
        vocab_size: int,
    ) -> None:
        self._shards = _TrainingShards(paths, vocab_size)
        self._seq_len, self._rank = seq_len, rank
        self._span = micro_batch_tokens + 1
        self.advance = world_size * self._span
        if self._shards.total_tokens < self._span:
            raise DataError(
                f"the training shards in {self._shards.directory} hold {self._shards.total_tokens} tokens; "
                f"one micro-batch reads {self._span} (MICRO_BATCH_TOKENS + 1)"
            )

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's `(inputs_BT, targets_BT)` of the micro-batch at token `position`."""
        span = self._shards.read(position + self._rank * self._span, self._span)
        return span[:-1].reshape(-1, self._seq_len), span[1:].reshape(-1, self._seq_len)

    def identity(self) -> dict[str, Any]:
        """The order, the row length and the shards."""
        return {"order": "in_order", "seq_len": self._seq_len, "shards": self._shards.names()}


class ShuffledWindows:
    """Every window of every shard exactly once an epoch, in a seeded order.

    A shard of n tokens is cut into floor((n - 1) / seq_len) windows of `seq_len` targets; neighbours share
    one token, so that every target is covered. Epoch e takes them in the order
    `default_rng([seed, e]).permutation(windows)`. At position p, rank r reads the windows from `p + r * rows`, so
    the sequence of windows is the same for any number of ranks. A position counts windows.

    Raises:
        DataError: a shard is damaged or is validation text, or none holds a window.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        seq_len: int,
        micro_batch_tokens: int,
        rank: int,
        world_size: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self._shards = _TrainingShards(paths, vocab_size)
        self._seq_len, self._rank, self._seed = seq_len, rank, seed
        self._rows = micro_batch_tokens // seq_len
        self.advance = world_size * self._rows
        windows_S = [max(0, (len(tokens) - 1) // seq_len) for tokens in self._shards.tokens]
        self._ends_S = np.cumsum(windows_S)
        self._firsts_S = self._ends_S - windows_S
        self._total = int(self._ends_S[-1])
        if self._total == 0:
            raise DataError(
                f"no training shard in {self._shards.directory} holds a window of {seq_len} targets "
                f"(TRAIN_SEQ_LEN); it takes {seq_len + 1} tokens in one shard"
            )
        self._orders: dict[int, np.ndarray] = {}

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's `(inputs_BT, targets_BT)` of the micro-batch at window `position`."""
        windows_B = self._windows(position + self._rank * self._rows, self._rows)
        shard_B = np.searchsorted(self._ends_S, windows_B, side="right")
        start_B = (windows_B - self._firsts_S[shard_B]) * self._seq_len
        rows_BT = np.empty((self._rows, self._seq_len + 1), dtype=np.uint16)
        for row_T, shard, start in zip(rows_BT, shard_B.tolist(), start_B.tolist(), strict=True):
            row_T[:] = self._shards.tokens[shard][start : start + self._seq_len + 1]
        if rows_BT.max() >= self._shards.vocab_size:
            for row_T, shard, start in zip(rows_BT, shard_B.tolist(), start_B.tolist(), strict=True):
                self._shards.check(row_T, shard, start)
        return rows_BT[:, :-1], rows_BT[:, 1:]

    def identity(self) -> dict[str, Any]:
        """The order, the row length, the seed and the shards."""
        return {
            "order": "shuffled",
            "seq_len": self._seq_len,
            "seed": self._seed,
            "shards": self._shards.names(),
        }

    def _windows(self, start: int, count: int) -> np.ndarray:
        """The `count` windows from place `start` of the endless order; int64 `[count]`."""
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, within = divmod(start, self._total)
            part = self._order(epoch)[within : within + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of one epoch; it and the one before are kept, since a micro-batch may straddle them."""
        if epoch not in self._orders:
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._total)
        return self._orders[epoch]


class _TrainingShards:
    """Training shards, mapped into memory; refuses validation text before opening anything."""

    def __init__(self, paths: Sequence[Path], vocab_size: int) -> None:
        if not paths:
            raise DataError("a training stream needs at least one shard; the list of shards is empty")
        for path in paths:
            if split_marker("val") in path.name:
                raise DataError(
                    f"{path} is named as validation text ({split_marker('val')}); training may only open "
                    f"shards named {split_marker('train')}"
                )
        self.paths = list(paths)
        self.directory = self.paths[0].parent
        self.vocab_size = vocab_size
        self.tokens = [np.asarray(open_shard(path)) for path in self.paths]  # slicing a memmap takes 15 times as long
        self._ends_S = np.cumsum([len(tokens) for tokens in self.tokens])
        self.total_tokens = int(self._ends_S[-1])

    def names(self) -> list[str]:
        """Each shard's file name and length, such as "fineweb_train_000000.bin:100000000"."""
        return [f"{path.name}:{len(tokens)}" for path, tokens in zip(self.paths, self.tokens, strict=True)]

    def check(self, tokens: np.ndarray, shard: int, position: int) -> None:
        """Checks ids that were read from `position` on of shard number `shard`."""
        check_token_ids(tokens, self.vocab_size, f"shard {self.paths[shard]}", position=position)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from place `start` of the endless concatenation of all shards; uint16 `[count]`."""
        parts: list[np.ndarray] = []
        while count > 0:
            start %= self.total_tokens
            shard = int(np.searchsorted(self._ends_S, start, side="right"))
            within = start - (int(self._ends_S[shard]) - len(self.tokens[shard]))
            part = self.tokens[shard][within : within + count]
            self.check(part, shard, within)
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)
