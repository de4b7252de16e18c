"""A zstd frame with a checksum and a declared size, written at level 22 and read within bounds."""

from __future__ import annotations

import zstandard

from golfmodel.runtime.errors import ArtifactError
from golfmodel.runtime.progress import Progress

LEVEL = 22
MAX_CONTENT_BYTES = 128 * 2**20
# What a small file may hold: weights compress two- or threefold, all-zero ones 20,000-fold.
SMALL_CONTENT_BYTES, MAX_RATIO = 2**20, 256
_MAGIC = b"\x28\xb5\x2f\xfd"
_COMPRESS_STEP = 2**18
# zstd makes at most 128 KiB of every 4 bytes, so that one step makes at most 32 MiB.
_DECOMPRESS_STEP = 2**10


def compress(content: bytes, *, show_progress: bool = False) -> bytes:
    """One zstd frame around `content`; the same content gives the same bytes.

    Args:
        content: at most `MAX_CONTENT_BYTES`.
        show_progress: whether this process shows how far it has come; level 22 takes about a second for 2 MB.

    Raises:
        ArtifactError: `content` is larger than a reader would accept.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise ArtifactError(f"{len(content):,} bytes to compress, above the limit of {MAX_CONTENT_BYTES:,}")
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    stream = compressor.compressobj(size=len(content))
    pieces = []
    with Progress("compressing", len(content), unit="byte", enabled=show_progress) as progress:
        for start in range(0, len(content), _COMPRESS_STEP):
            step = content[start : start + _COMPRESS_STEP]
            pieces.append(stream.compress(step))
            progress.update(len(step))
        pieces.append(stream.flush())
    return b"".join(pieces)


def content_limit(frame_bytes: int) -> int:
    """How many bytes of content a frame of so many bytes may hold, so that memory grows with the file."""
    return min(SMALL_CONTENT_BYTES + MAX_RATIO * frame_bytes, MAX_CONTENT_BYTES)


def decompress(frame: bytes, source: str) -> bytes:
    """The content of `frame`, which must be one whole frame as `compress` writes it and nothing else.

    Memory grows with the output made, not with the size declared, to a few times `content_limit` at most.

    Raises:
        ArtifactError: not a zstd frame, no declared size or checksum, too large, damaged, cut short, or
            followed by more bytes; starts with `source`.
    """
    declared = _declared_size(frame, source)
    stream = zstandard.ZstdDecompressor(max_window_size=MAX_CONTENT_BYTES).decompressobj()
    content = bytearray()
    position = 0
    while position < len(frame) and not stream.eof:
        try:
            content += stream.decompress(frame[position : position + _DECOMPRESS_STEP])
        except zstandard.ZstdError as error:
            raise ArtifactError(f"{source}: damaged zstd frame near byte {position:,}: {error}") from error
        position = min(position + _DECOMPRESS_STEP, len(frame))
        if len(content) > declared:
            raise ArtifactError(f"{source}: the zstd frame holds more than the {declared:,} bytes it declares")
    if not stream.eof:
        raise ArtifactError(
            f"{source}: cut short: the zstd frame does not end within the file's {len(frame):,} bytes "
            f"({len(content):,} of {declared:,} bytes decompressed)"
        )
    if trailing := len(stream.unused_data) + len(frame) - position:
        raise ArtifactError(f"{source}: {trailing:,} bytes follow the zstd frame; expected none")
    return bytes(content)


def _declared_size(frame: bytes, source: str) -> int:
    if not frame.startswith(_MAGIC):
        raise ArtifactError(f"{source}: not an artifact: starts with {frame[:4].hex() or 'nothing'}, not a zstd frame")
    try:
        header = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{source}: damaged zstd frame header: {error}") from error
    if header.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise ArtifactError(f"{source}: the zstd frame does not declare its content's size, which an artifact does")
    if not header.has_checksum:
        raise ArtifactError(f"{source}: the zstd frame has no checksum, which an artifact has")
    if max(header.content_size, header.window_size) > MAX_CONTENT_BYTES:
        raise ArtifactError(
            f"{source}: the zstd frame declares {header.content_size:,} bytes of content and a window of "
            f"{header.window_size:,}; the limit of either is {MAX_CONTENT_BYTES:,}"
        )
    if header.content_size > content_limit(len(frame)):
        raise ArtifactError(
            f"{source}: the zstd frame declares {header.content_size:,} bytes of content, more than a file of "
            f"{len(frame):,} bytes may hold: {content_limit(len(frame)):,}"
        )
    return header.content_size
