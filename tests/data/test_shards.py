"""Shards: the format byte for byte, and every way a file can be wrong."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from golfmodel.data import shards
from golfmodel.data.shards import check_token_ids, find_shards, open_shard, write_shard
from golfmodel.runtime.errors import ConfigError, DataError, StorageError

TOKENS = np.array([1, 0, 1023, 65535, 7], dtype=np.uint16)


def header(magic: int = 20240520, version: int = 1, count: int = len(TOKENS)) -> bytes:
    return struct.pack("<256i", magic, version, count, *[0] * 253)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "text_train_000000.bin"


def test_the_format_byte_for_byte(path):
    write_shard(path, TOKENS)
    assert path.read_bytes() == header() + struct.pack("<5H", *TOKENS.tolist())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_open_maps_the_tokens_read_only(path):
    path.write_bytes(header() + TOKENS.astype("<u2").tobytes())
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, TOKENS)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 3


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
@pytest.mark.parametrize("length", [0, 1, 513])
def test_round_trip(path, dtype, length):
    tokens = np.random.default_rng(length).integers(0, 1024, length).astype(dtype)
    write_shard(path, tokens)
    np.testing.assert_array_equal(open_shard(path), tokens)
    assert open_shard(path).dtype == np.uint16


def test_writes_a_strided_view(path):
    write_shard(path, np.arange(20, dtype=np.uint16)[::3])
    np.testing.assert_array_equal(open_shard(path), np.arange(0, 20, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long, shorter than its header of 1024 bytes"),
        (header()[:1000], "is 1000 bytes long, shorter than its header of 1024 bytes"),
        (header(magic=20240801) + bytes(10), "magic number 20240801; a token shard has 20240520"),
        (header(version=2) + bytes(10), "format version 2; this program reads version 1"),
        (header(count=-5) + bytes(10), "says it holds -5 tokens; the count may be 0 to 2147483647"),
        (header() + bytes(8), r"is truncated: its header says 5 tokens, which makes 1034 bytes, but .* has 1032 bytes"),
        (header(count=2**31 - 1) + bytes(8), "which makes 4294968318 bytes, but the file has 1032 bytes"),
        (header() + bytes(11), "has bytes after its last token: .* 1034 bytes, but the file has 1035 bytes"),
    ],
)
def test_a_damaged_shard_is_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)


def test_a_missing_shard(tmp_path):
    with pytest.raises(DataError, match=r"cannot read shard .*gone_train_0\.bin: No such file"):
        open_shard(tmp_path / "gone_train_0.bin")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_shard_that_is_no_file_is_refused_at_once(path, make):
    make(path)
    with pytest.raises(DataError, match=r"shard .*text_train_000000\.bin is not a file"):
        open_shard(path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([3, 65536]), "has token id 65536 at position 1"),
        (np.array([3, 4, -1]), "has token id -1 at position 2"),
        (np.array([0.5]), "float64; they must be a vector of integers"),
        (np.zeros((2, 2), dtype=np.int64), r"shape \(2, 2\)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(path, tokens, message):
    with pytest.raises(DataError, match=message):
        write_shard(path, tokens)
    assert list(path.parent.iterdir()) == []


def test_more_tokens_than_the_header_can_say(path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_TOKENS", 4)
    with pytest.raises(DataError, match="5 tokens are too many"):
        write_shard(path, TOKENS)


def test_a_place_that_cannot_be_written(path):
    path.write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        write_shard(path / "x_train_0.bin", TOKENS)


def test_find_shards_sorts_and_keeps_the_splits_apart(tmp_path):
    for name in ("a_train_000010.bin", "a_train_000002.bin", "a_val_000000.bin", "train.bin", "a_train_000003.txt"):
        write_shard(tmp_path / name, TOKENS)
    (tmp_path / "a_train_000004.bin").mkdir()
    assert [path.name for path in find_shards(tmp_path, "train")] == ["a_train_000002.bin", "a_train_000010.bin"]
    assert [path.name for path in find_shards(str(tmp_path), "val")] == ["a_val_000000.bin"]


@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("val", "validation")])
def test_no_data_says_how_to_get_some(tmp_path, split, name):
    (tmp_path / "file").touch()
    for directory, problem in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "file", "is not a directory"),
        (tmp_path, f"holds no {name} shard"),
    ):
        with pytest.raises(DataError, match=problem) as caught:
            find_shards(directory, split)
        for part in (str(directory), "golfmodel.data download", "golfmodel.data demo", "golfmodel.data tokenize"):
            assert part in str(caught.value)


def test_find_shards_refuses_another_split(tmp_path):
    with pytest.raises(ConfigError, match=r"'test'; it may be 'train' or 'val'"):
        find_shards(tmp_path, "test")


def test_check_token_ids_names_source_id_and_position():
    tokens = np.array([5, 1023, 1024, 1025], dtype=np.uint16)
    check_token_ids(tokens[:2], 1024, "shard x")
    check_token_ids(tokens[:0], 1024, "shard x")
    with pytest.raises(DataError, match=r"shard x has token id 1024 at position 2; .* 1024 \(VOCAB_SIZE\).* 0 to 1023"):
        check_token_ids(tokens, 1024, "shard x")
    with pytest.raises(DataError, match="token id 1025 at position 103"):
        check_token_ids(tokens[3:], 1024, "shard x", position=103)
    with pytest.raises(DataError, match="token id -2 at position 0"):
        check_token_ids(np.array([-2, 5000]), 1024, "shard x")
