"""Tokens of a paid prefix to bytes and back: little-endian uint16 through a general compressor."""

from __future__ import annotations

import lzma
import zlib

import numpy as np

from golfmodel.runtime.errors import ArtifactError

WRITING_CODECS = ("lzma", "xz", "zlib", "raw")
CODECS = (*WRITING_CODECS, "auto")
_TOKEN = np.dtype("<u2")
_LZMA_PRESET = 6
_LZMA_MEMORY_BYTES = 128 * 2**20
_XZ_MAGIC = b"\xfd7zXZ\x00"
_LZMA_ALONE_MAGIC = b"\x5d\x00\x00"
_ZLIB_MAGICS = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")


def encode_prefix(tokens: np.ndarray, codec: str = "lzma") -> bytes:
    """The tokens `[N]` as little-endian uint16 through a codec.

    `lzma` and `xz` are two names for an xz stream of preset 6; `zlib` is level 9; `raw` is the bytes themselves.

    Raises:
        ArtifactError: no tokens, a token that does not fit uint16, or a codec that cannot write.
    """
    if codec not in WRITING_CODECS:
        raise ArtifactError(f"prefix codec {codec!r} cannot write; use one of {', '.join(WRITING_CODECS)}")
    if tokens.size == 0:
        raise ArtifactError("a prefix needs at least one token")
    if tokens.min() < 0 or tokens.max() > 65535:
        raise ArtifactError(f"tokens run from {tokens.min()} to {tokens.max()}; a prefix holds 0 to 65535")
    raw = tokens.astype(_TOKEN).tobytes()
    if codec == "raw":
        return raw
    return zlib.compress(raw, 9) if codec == "zlib" else lzma.compress(raw, preset=_LZMA_PRESET)


def decode_prefix(blob: bytes, codec: str, max_tokens: int) -> np.ndarray:
    """The tokens uint16 `[N]` in `blob`, N at most `max_tokens`; hardly more than those is ever decompressed.

    `lzma` and `xz` read an xz stream or an older .lzma one. `auto` goes by the first bytes. Those of .lzma and
    zlib can also begin raw tokens, so what looks like one and does not decompress is taken as raw.

    Raises:
        ArtifactError: the blob is empty, damaged, cut short, followed by other bytes, too long, or of an odd
            number of bytes; or the codec is unknown.
    """
    if codec not in CODECS:
        raise ArtifactError(f"prefix codec {codec!r} is unknown; use one of {', '.join(CODECS)}")
    if not blob:
        raise ArtifactError("the prefix is empty")
    limit = max_tokens * _TOKEN.itemsize
    raw = _decompress_auto(blob, limit) if codec == "auto" else _decompress(blob, codec, limit)
    if len(raw) > limit:
        raise ArtifactError(f"the prefix holds more than the text's {max_tokens:,} targets")
    if not raw:
        raise ArtifactError("the prefix holds no tokens")
    if len(raw) % _TOKEN.itemsize:
        raise ArtifactError(f"the prefix holds {len(raw):,} bytes; tokens of two bytes make an even number")
    return np.frombuffer(raw, dtype=_TOKEN).astype(np.uint16)


def _decompress_auto(blob: bytes, limit: int) -> bytes:
    if blob.startswith(_XZ_MAGIC):
        return _decompress(blob, "xz", limit)
    codec = "lzma" if blob.startswith(_LZMA_ALONE_MAGIC) else "zlib" if blob.startswith(_ZLIB_MAGICS) else "raw"
    try:
        return _decompress(blob, codec, limit)
    except ArtifactError:
        return blob


def _decompress(blob: bytes, codec: str, limit: int) -> bytes:
    """The whole content of `blob`, or its first `limit + 1` bytes where it is longer than `limit`."""
    if codec == "raw":
        return blob
    stream = zlib.decompressobj() if codec == "zlib" else lzma.LZMADecompressor(memlimit=_LZMA_MEMORY_BYTES)
    try:
        raw = stream.decompress(blob, limit + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise ArtifactError(f"the prefix is not a sound {codec} stream: {error}") from error
    if len(raw) <= limit and not stream.eof:
        raise ArtifactError(f"the prefix is cut short: its {codec} stream does not end")
    if len(raw) <= limit and stream.unused_data:
        raise ArtifactError(f"{len(stream.unused_data):,} bytes follow the prefix's {codec} stream; expected none")
    return raw
