"""The paid prefix: the first validation targets, compressed. A research feature, never part of `val_bpb`.

A run that uses one is not eligible: the challenge's maintainers ruled it out, because it is made of validation
text. Target i of a text is its token i + 1; N counts targets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from golfmodel.artifact.prefix_codec import WRITING_CODECS, decode_prefix, encode_prefix
from golfmodel.data.shards import find_shards, open_shard
from golfmodel.runtime.bounded import read_bounded
from golfmodel.runtime.errors import ArtifactError, front_door
from golfmodel.runtime.files import write_bytes
from golfmodel.runtime.progress import Progress

NOT_ELIGIBLE = (
    "For research only: a prefix is made of validation text, so a run that uses it is not eligible, and its score "
    "is reported apart from val_bpb."
)


def load_prefix(path: str | Path, codec: str, targets_N: np.ndarray) -> np.ndarray:
    """The tokens uint16 of the prefix file, which must be the first targets of the text.

    Args:
        path: the prefix file.
        codec: one of `prefix_codec.CODECS`.
        targets_N: all targets of the validation text, any integer dtype.

    Raises:
        ArtifactError: the file is missing, damaged or longer than the text, or differs from it; names the first
            differing position and both tokens.
    """
    targets_N = np.asarray(targets_N)
    # A codec adds little to two bytes a token; a file far beyond that cannot be a prefix of this text.
    blob = read_bounded(path, 4 * len(targets_N) + 2**16, "a prefix of this text", ArtifactError)
    try:
        tokens = decode_prefix(blob, codec, len(targets_N))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    different = np.flatnonzero(tokens != targets_N[: len(tokens)])
    if different.size:
        first = int(different[0])
        raise ArtifactError(
            f"{path}: does not match the validation text: target {first:,} is token {int(targets_N[first])}, "
            f"the prefix says {int(tokens[first])} ({different.size:,} of {len(tokens):,} differ)"
        )
    return tokens


def longest_prefix(targets_N: np.ndarray, codec: str, budget_bytes: int) -> tuple[int, bytes]:
    """The number of tokens and the blob of the longest prefix within `budget_bytes`, found by bisection.

    One token more does not fit. A codec's size is not quite monotone, so a somewhat longer prefix still might.

    Raises:
        ArtifactError: not even one token fits.
    """
    count, blob, step, growing = 0, b"", 1, True
    with Progress("fitting the prefix", None, unit="trial") as progress:
        while step:
            longer = count + step
            trial = encode_prefix(targets_N[:longer], codec) if longer <= len(targets_N) else None
            if trial is not None and len(trial) <= budget_bytes:
                count, blob = longer, trial
            else:
                growing = False
            step = 2 * step if growing else step // 2
            progress.update(tokens=f"{count:,}", bytes=f"{len(blob):,}")
    if count == 0:
        raise ArtifactError(f"{budget_bytes:,} bytes do not hold even one token of a {codec} prefix")
    return count, blob


def build_prefix(
    directory: str | Path, output: str | Path, codec: str, *, num_tokens: int | None, budget_bytes: int | None
) -> str:
    """Writes the prefix of the validation text in `directory` and returns what it came to, in words.

    Args:
        directory: holds the validation shards.
        output: the file to write.
        codec: one of `prefix_codec.WRITING_CODECS`.
        num_tokens: how many targets to cover; None to fill the budget.
        budget_bytes: the most the file may take; None with `num_tokens`.

    Raises:
        DataError: the shards are missing or damaged.
        ArtifactError: `num_tokens` is not 1 to the number of targets, or not even one token fits the budget.
        StorageError: the file cannot be written.
    """
    targets_N = np.concatenate([open_shard(path) for path in find_shards(directory, "val")])[1:]
    if budget_bytes is not None:
        count, blob = longest_prefix(targets_N, codec, budget_bytes)
    elif num_tokens is not None and 1 <= num_tokens <= len(targets_N):
        count, blob = num_tokens, encode_prefix(targets_N[:num_tokens], codec)
    else:
        raise ArtifactError(f"--num-tokens is {num_tokens}; the text in {directory} has 1 to {len(targets_N):,}")
    write_bytes(output, blob)
    return f"{count:,} tokens, {count / len(targets_N):.2%} of {len(targets_N):,} targets, {len(blob):,} bytes"


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and builds the prefix; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m golfmodel.artifact.prefix",
        description="Paid prefix: the first targets of the validation text, compressed.",
        epilog=NOT_ELIGIBLE,
    )
    build = parser.add_subparsers(required=True, metavar="build").add_parser(
        "build", help="write a prefix file", description="Write a prefix file.", epilog=NOT_ELIGIBLE
    )
    build.add_argument("--val-dir", required=True, metavar="DIR", help="directory of the validation shards")
    build.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    build.add_argument(
        "--codec", choices=WRITING_CODECS, default="lzma", help="lzma and xz are the same (default: lzma)"
    )
    length = build.add_mutually_exclusive_group(required=True)
    length.add_argument("--num-tokens", type=int, metavar="N", help="how many targets to cover")
    length.add_argument("--budget-bytes", type=int, metavar="B", help="cover as many as B bytes hold")
    options = parser.parse_args(arguments)
    print(
        build_prefix(
            options.val_dir,
            options.output,
            options.codec,
            num_tokens=options.num_tokens,
            budget_bytes=options.budget_bytes,
        )
    )
    print(NOT_ELIGIBLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
