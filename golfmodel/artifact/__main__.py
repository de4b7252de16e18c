"""Shows what an artifact holds: `python -m golfmodel.artifact PATH`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from golfmodel.artifact.container import Artifact, read_artifact
from golfmodel.artifact.parts import bytes_by_part, part_of, split_by_part
from golfmodel.artifact.stored import StoredTensor
from golfmodel.artifact.submission import LIMIT_BYTES
from golfmodel.runtime.errors import front_door


def describe(artifact: Artifact, file_bytes: int, *, show_progress: bool = False) -> dict[str, Any]:
    """Everything the command shows, as plain JSON values; all sizes in bytes."""
    tensors = artifact.tensors
    schemes: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        schemes.setdefault(tensor.storage.value, {})[name] = tensor
    estimates = bytes_by_part(artifact, show_progress=show_progress)
    return {
        "file_bytes": file_bytes,
        "limit_bytes": LIMIT_BYTES,
        **_totals(tensors),
        "tokenizer_digest": artifact.tokenizer_digest,
        "config": artifact.config,
        "schemes": {scheme: _totals(held) for scheme, held in sorted(schemes.items())},
        "parts": {
            part: {**_totals(held), "estimated_compressed_bytes": estimates[part]}
            for part, held in split_by_part(tensors).items()
        },
        "tensors": [
            {
                "name": name,
                "part": part_of(name),
                "scheme": tensors[name].storage.value,
                "shape": list(tensors[name].shape),
                "raw_bytes": tensors[name].raw_bytes,
            }
            for name in sorted(tensors, key=_natural_order)
        ],
    }


def render(description: Mapping[str, Any]) -> str:
    """The description as text for a terminal."""
    raw_bytes, file_bytes = description["raw_bytes"], description["file_bytes"]
    left = description["limit_bytes"] - file_bytes
    sections = [
        _table(
            ("tensor", "scheme", "shape", "raw bytes", "share"),
            [
                (t["name"], t["scheme"], _shape(t["shape"]), f"{t['raw_bytes']:,}", f"{t['raw_bytes'] / raw_bytes:.1%}")
                for t in description["tensors"]
            ],
        ),
        _table(
            ("scheme", "tensors", "values", "raw bytes", "share"),
            [(scheme, *_total_cells(total, raw_bytes)) for scheme, total in description["schemes"].items()],
        ),
        _table(
            ("part", "tensors", "values", "raw bytes", "share", "compressed (estimate)"),
            [
                (part, *_total_cells(total, raw_bytes), f"{total['estimated_compressed_bytes']:,}")
                for part, total in description["parts"].items()
            ],
        )
        + "\n(estimate: each part compressed alone; the file compresses all of them together)",
        f"config {json.dumps(description['config'], indent=2)}",
        f"tokenizer sha256 {description['tokenizer_digest']}",
        f"{description['values']:,} values, {raw_bytes:,} bytes raw, {file_bytes:,} bytes as written; "
        f"the limit for weights and code together is {description['limit_bytes']:,} "
        + (f"({left:,} left for code)" if left >= 0 else f"(over by {-left:,})"),
    ]
    return "\n\n".join(sections)


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and prints the description; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m golfmodel.artifact",
        description="Check an artifact and show its tensors, their schemes and sizes, and its config.",
    )
    parser.add_argument("path", type=Path, help="the artifact file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    description = describe(read_artifact(options.path), options.path.stat().st_size, show_progress=True)
    print(json.dumps(description, indent=2) if options.json else render(description))
    return 0


def _totals(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    return {
        "count": len(tensors),
        "values": sum(tensor.values.numel() for tensor in tensors.values()),
        "raw_bytes": sum(tensor.raw_bytes for tensor in tensors.values()),
    }


def _total_cells(total: Mapping[str, int], raw_bytes: int) -> tuple[str, ...]:
    share = total["raw_bytes"] / raw_bytes
    return f"{total['count']:,}", f"{total['values']:,}", f"{total['raw_bytes']:,}", f"{share:.1%}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value, block 2 before block 10: every second piece is a number."""
    pieces = re.split(r"([0-9]+)", name)
    return [(len(piece) if index % 2 else 0, piece) for index, piece in enumerate(pieces)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell; columns of numbers to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {"tensor", "scheme", "shape", "part"}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if title in left else cell.rjust(width)
            for title, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
