"""No bytes in a shard, however they came about, give other tokens than the file holds or ids outside the vocabulary."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutants, refused_or_right
from peak_memory import peak_growth

from golfmodel.data.shards import open_shard
from golfmodel.data.streams import InOrderStream, ShuffledWindows
from golfmodel.data.text import ValidationText, load_validation_text
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.errors import DataError

VOCABULARY = 1024
SIZES = {"seq_len": 8, "micro_batch_tokens": 16, "rank": 0, "world_size": 1, "vocab_size": VOCABULARY}


def shard(tokens: np.ndarray, *, count: int | None = None) -> bytes:
    """A shard by an independent writer; `count` is what its header says."""
    count = len(tokens) if count is None else count
    return struct.pack("<256i", 20240520, 1, count, *[0] * 253) + tokens.astype("<u2").tobytes()


@pytest.fixture(scope="module")
def originals() -> tuple[bytes, ...]:
    draw = np.random.default_rng(0).integers(0, VOCABULARY, 300)
    return shard(draw), shard(draw[:33]), shard(draw[:0])


def held(data: bytes) -> np.ndarray:
    return np.frombuffer(data[1024:], dtype="<u2")


def test_no_mutation_gives_other_tokens_than_the_file_holds(originals, tmp_path: Path):
    path = tmp_path / "x_train_000000.bin"
    accepted = 0
    for data in mutants("shard", *originals):
        path.write_bytes(data)
        accepted += refused_or_right(
            lambda: open_shard(path),
            lambda tokens: data[:12] == shard(tokens)[:12] and np.array_equal(tokens, held(data)),  # noqa: B023
            DataError,
            path.name,
        )
    assert accepted > 300


@pytest.mark.parametrize(
    "order", [InOrderStream, lambda *arguments, **sizes: ShuffledWindows(*arguments, **sizes, seed=1)]
)
def test_no_mutation_trains_on_ids_outside_the_vocabulary(order, originals, tmp_path: Path):
    """Read for two epochs: the targets are those of the file, every one of them a token of the vocabulary."""
    path = tmp_path / "x_train_000000.bin"

    def read() -> set[int]:
        stream = order([path], **SIZES)
        batches = [stream.read(position * stream.advance) for position in range(600 // stream.advance + 1)]
        return {int(token) for batch in batches for part in batch for token in part.flat}

    accepted = 0
    for data in mutants("shard in training", *originals):
        path.write_bytes(data)
        accepted += refused_or_right(
            read,
            lambda tokens: tokens <= set(held(data).tolist()) & set(range(VOCABULARY)),  # noqa: B023
            DataError,
            str(tmp_path),
        )
    assert accepted > 50


def test_no_mutation_scores_another_text(originals, demo_tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "x_val_000000.bin"

    def is_the_files(text: ValidationText, data: bytes) -> bool:
        tokens = held(data).astype(np.int64)
        return (
            text.digest == hashlib.sha256(data[1024:]).hexdigest()
            and tokens.max() < VOCABULARY
            and np.array_equal(text.tokens, tokens)
            and np.array_equal(text.target_bytes, demo_tokenizer.target_bytes(tokens[:-1], tokens[1:]))
        )

    accepted = 0
    for data in mutants("shard in validation", *originals):
        path.write_bytes(data)
        accepted += refused_or_right(
            lambda: load_validation_text(tmp_path, demo_tokenizer),
            lambda text: is_the_files(text, data),  # noqa: B023
            DataError,
            str(tmp_path),
        )
    assert accepted > 50


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    start=st.sampled_from([(), (20240520,), (20240520, 1)]),
    content=st.binary(max_size=40),
)
def test_any_header_is_refused_or_says_what_there_is(header, start, content, tmp_path: Path):
    path = tmp_path / "x_train_000000.bin"
    values = [*start, *header][:256]
    data = struct.pack(f"<{len(values)}i", *values).ljust(1024, b"\0") + content
    path.write_bytes(data)
    refused_or_right(
        lambda: open_shard(path),
        lambda tokens: data[:12] == shard(tokens)[:12] and np.array_equal(tokens, held(data)),
        DataError,
        path.name,
    )


def test_a_count_of_two_billion_in_a_kilobyte_takes_no_memory(tmp_path: Path):
    (tmp_path / "x_train_000000.bin").write_bytes(shard(np.zeros(0, dtype=np.uint16), count=2**31 - 1))
    growth, said = peak_growth(
        "from golfmodel.data.shards import find_shards, open_shard",
        "open_shard(find_shards(sys.argv[1], 'train')[0])",
        tmp_path,
    )
    assert "is truncated: its header says 2147483647 tokens" in said
    assert growth < 2**20
