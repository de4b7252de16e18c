"""Corpora small enough to know every token of, and tokenizers of a few pieces."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import train

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


@pytest.fixture(scope="session")
def tiny_model() -> bytes:
    """Normalises its input, has no byte pieces, and has control and user-defined pieces."""
    return train(
        unk_id=3, pad_id=0, bos_id=1, eos_id=2, control_symbols=["<mask>"], user_defined_symbols=["▁of▁the", "x▁▁y"]
    )


@pytest.fixture(scope="session")
def byte_model() -> bytes:
    """Takes its input as it is, a byte at a time where it has no piece."""
    return train(normalization_rule_name="identity", byte_fallback=True, vocab_size=290)


@pytest.fixture(scope="session")
def unigram_model() -> bytes:
    return train(model_type="unigram", vocab_size=20, normalization_rule_name="identity")
