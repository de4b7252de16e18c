"""Damaged files for the tests of everything that reads one, and what a reader may make of them.

A new kind of file takes a line in `MUTANTS` and a loop:

    accepted = sum(refused_or_right(lambda: read(mutant), is_right, SomeError) for mutant in mutants("kind", original))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from golfmodel.runtime.errors import GolfError

# How many damaged files of each kind one run of the suite reads.
MUTANTS = {
    "artifact file": 10_000,
    "artifact blob": 10_000,
    "artifact header": 2_000,
    "artifact model": 1_000,
    "prefix": 5_000,
    "shard": 3_000,
    "shard in training": 2_000,
    "shard in validation": 2_000,
    "download manifest": 1_000,
    "checkpoint file": 3_000,
    "checkpoint state": 2_000,
    "tokenizer file": 4_000,
    "tokenizer fields": 6_000,
    "tokenizer charsmap": 1_000,
}

_EXTREMES = (0, 1, 2**7 - 1, 2**7, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1)

T = TypeVar("T")


def draws(kind: str) -> Iterator[np.random.Generator]:
    """As many times as there are mutants of a kind, a generator to make one with; the same draws in every run."""
    generator = np.random.default_rng(list(kind.encode()))
    for _ in range(MUTANTS[kind]):
        yield generator


def mutants(kind: str, *originals: bytes) -> Iterator[bytes]:
    """`MUTANTS[kind]` damaged copies, each of one of the originals."""
    for generator in draws(kind):
        yield mutate(originals[int(generator.integers(len(originals)))], generator)


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """One to three changes: cuts, flips, insertions, deletions, stretches copied or overwritten, extreme integers."""
    mutated = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        start, other = _place(len(mutated), generator), int(generator.integers(len(mutated) + 1))
        length = int(generator.integers(1, 40))
        kind = generator.integers(7)
        if kind == 0:
            del mutated[start:]
        elif kind == 1 and start < len(mutated):
            mutated[start] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            mutated[start:start] = generator.bytes(length)
        elif kind == 3:
            del mutated[start : start + length]
        elif kind == 4:
            mutated[start : start + length] = mutated[other : other + length]
        elif kind == 5:
            mutated[start : start + length] = bytes([int(generator.integers(256))]) * length
        else:
            width = 1 << int(generator.integers(4))
            extreme = _EXTREMES[int(generator.integers(len(_EXTREMES)))].to_bytes(8, "little")[:width]
            mutated[start : start + width] = extreme
    return bytes(mutated)


def refused_or_right(
    read: Callable[[], T], is_right: Callable[[T], bool], error: type[GolfError], named: str = ""
) -> bool:
    """Whether `read` gives a result, which must then be right; it may only fail with `error`, in one short line.

    Args:
        named: what the line must name, such as the file.
    """
    try:
        result = read()
    except error as refusal:
        assert named in str(refusal), refusal
        assert str(refusal).isprintable(), refusal
        assert len(str(refusal)) < 1000, refusal
        return False
    assert is_right(result)
    return True


def _place(length: int, generator: np.random.Generator) -> int:
    """Anywhere, or every other time within the first bytes, where files keep what the rest hangs on."""
    return int(generator.integers(min(length, 64) + 1 if generator.integers(2) else length + 1))
