"""The text in the header of our safetensors files, checked before the library looks at the rest."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from golfmodel.runtime.bounded import printable
from golfmodel.runtime.errors import GolfError


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        what: what it is called in messages, such as "an artifact".
        name: what the metadata call it.
        version: which one this program reads and writes.
        entries: the names of all metadata.
        max_header_bytes: the most that a header may take.
        error: what is raised.
    """

    what: str
    name: str
    version: str
    entries: Set[str]
    max_header_bytes: int
    error: type[GolfError]


def checked_metadata(data: bytes, kind: Format, source: str) -> dict[str, str]:
    """The metadata of the safetensors file `data`, every entry there and text.

    Raises:
        GolfError: as `kind.error`: cut short, foreign, of another version, or with other entries.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(kind.max_header_bytes, len(data) - 8):
        raise kind.error(f"{source}: not {kind.what}, or cut short: a header of {size:,} bytes in {len(data):,}")
    metadata = json_object(data[8 : 8 + size], "safetensors header", source, kind.error).get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise kind.error(f"{source}: not {kind.what}: the safetensors metadata is missing or not text")
    if metadata.get("format") != kind.name:
        raise kind.error(f"{source}: format {reprlib.repr(metadata.get('format'))}; expected {kind.name!r}")
    if metadata.get("version") != kind.version:
        version = reprlib.repr(metadata.get("version"))
        raise kind.error(f"{source}: format version {version}; this program reads {kind.version!r}")
    if odd := metadata.keys() ^ kind.entries:
        raise kind.error(
            f"{source}: metadata entries missing or unknown: {', '.join(map(reprlib.repr, sorted(odd)[:5]))}"
        )
    return metadata


def json_object(text: str | bytes, what: str, source: str, error: type[GolfError]) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        GolfError: as `error`: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{source}: the {what} is not JSON: {printable(cause)}") from cause
    if not isinstance(value, dict):
        raise error(f"{source}: the {what} is a JSON {type(value).__name__}; expected an object")
    return value
