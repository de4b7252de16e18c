"""The shard format: 256 little-endian int32 of header, then little-endian uint16 tokens.

The header is the magic number 20240520, the version 1, the number of tokens, then zeros. Shards are found by
name: `*_train_*.bin` is training text, `*_val_*.bin` is validation text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from golfmodel.runtime.errors import ConfigError, DataError
from golfmodel.runtime.files import atomic_writer

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAX_SHARD_TOKENS = 2**31 - 1
MAX_TOKEN_ID = 2**16 - 1

Split = Literal["train", "val"]
_SPLIT_NAMES: dict[str, str] = {"train": "training", "val": "validation"}

HOW_TO_GET_DATA = (
    "get FineWeb with `python -m golfmodel.data download`, build the small offline corpus with "
    "`python -m golfmodel.data demo`, or turn your own text into shards with "
    "`python -m golfmodel.data tokenize`"
)


def split_marker(split: Split) -> str:
    """The part of a shard's file name that says which split it belongs to."""
    return f"_{split}_"


def find_shards(directory: str | Path, split: Split) -> list[Path]:
    """The shards of one split in `directory`, sorted by name; at least one.

    Raises:
        DataError: the directory is missing, not a directory, or has no shard of that split; says how to get
            data.
        ConfigError: `split` is neither "train" nor "val".
    """
    if split not in _SPLIT_NAMES:
        raise ConfigError(f"split is {split!r}; it may be 'train' or 'val'")
    directory = Path(directory)
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise DataError(f"data directory {directory} {state}; {HOW_TO_GET_DATA}")
    pattern = f"*{split_marker(split)}*.bin"
    shards = sorted(path for path in directory.glob(pattern) if path.is_file())
    if not shards:
        name = _SPLIT_NAMES[split]
        raise DataError(f"data directory {directory} holds no {name} shard ({pattern}); {HOW_TO_GET_DATA}")
    return shards


def open_shard(path: str | Path) -> np.ndarray:
    """Opens a shard as a read-only, memory-mapped uint16 array `[tokens]`.

    Raises:
        DataError: the file is missing, unreadable or no regular file (a pipe would block), shorter than its
            header, has another magic number or version, or holds another number of bytes than its header says.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"shard {path} is not a file")
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            actual_bytes = file.seek(0, 2)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror or error}") from error
    if len(head) < HEADER_BYTES:
        raise DataError(f"shard {path} is {len(head)} bytes long, shorter than its header of {HEADER_BYTES} bytes")
    magic, version, count = (int(value) for value in np.frombuffer(head, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(f"shard {path} has magic number {magic}; a token shard has {MAGIC}")
    if version != VERSION:
        raise DataError(f"shard {path} has format version {version}; this program reads version {VERSION}")
    if count < 0:
        raise DataError(f"shard {path} says it holds {count} tokens; the count may be 0 to {MAX_SHARD_TOKENS}")
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * count
    if actual_bytes != expected_bytes:
        problem = "is truncated" if actual_bytes < expected_bytes else "has bytes after its last token"
        raise DataError(
            f"shard {path} {problem}: its header says {count} tokens, which makes {expected_bytes} bytes, "
            f"but the file has {actual_bytes} bytes"
        )
    if count == 0:
        return np.frombuffer(b"", dtype="<u2")
    try:
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot map shard {path} into memory: {error}") from error


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes integer `tokens` `[N]` to `path` as a shard; the file is either whole or absent.

    Raises:
        DataError: `tokens` is not a vector of integers, is too long for the header, or has an id that does
            not fit uint16.
        StorageError: the file cannot be written.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"tokens for shard {path} have shape {tokens.shape} and type {tokens.dtype}; "
            "they must be a vector of integers"
        )
    if len(tokens) > MAX_SHARD_TOKENS:
        raise DataError(f"{len(tokens)} tokens are too many for shard {path}; it may hold up to {MAX_SHARD_TOKENS}")
    check_token_ids(tokens, MAX_TOKEN_ID + 1, f"tokens for shard {path}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_writer(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def check_token_ids(tokens: np.ndarray, vocab_size: int, source: str | Path, *, position: int = 0) -> None:
    """Checks that every id of the integer vector `tokens` is one of a vocabulary of `vocab_size`.

    Args:
        source: what the tokens are from, such as a shard's path; named in the error.
        position: where in `source` the first of `tokens` stands.

    Raises:
        DataError: names the source, the first bad id and its position.
    """
    if tokens.size == 0 or (tokens.max() < vocab_size and tokens.min() >= 0):
        return
    first = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
    raise DataError(
        f"{source} has token id {int(tokens[first])} at position {position + first}; "
        f"a vocabulary of {vocab_size} (VOCAB_SIZE) has ids 0 to {vocab_size - 1}"
    )
