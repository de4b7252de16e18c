"""Corpora small enough to know every token of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from golfmodel.data.shards import write_shard


@pytest.fixture
def shards_of(tmp_path) -> Callable[..., Path]:
    """Writes shards of the given lengths whose tokens are 0, 1, 2, ... across all of them; returns the directory."""

    def write(*lengths: int, split: str = "train", name: str = "count") -> Path:
        tokens = np.arange(sum(lengths), dtype=np.uint16)
        for number, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
            write_shard(tmp_path / f"{name}_{split}_{number:06d}.bin", part)
        return tmp_path

    return write
