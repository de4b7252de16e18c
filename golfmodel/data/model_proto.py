"""A SentencePiece file before the library reads it: what it could make out of a short text is bounded.

The library checks what would crash it, but lets one character become any number of bytes, each of which takes about 54
of memory when a text is encoded. The file is a protobuf `ModelProto`; its normalizer is field 3, its denormalizer field
5, each with a `precompiled_charsmap` (2); the text that decoding puts in for an unknown piece is `unk_surface` (44) of
the trainer's specification, field 2.
"""

from __future__ import annotations

from collections.abc import Iterator

# The longest that the usual rules (NFKC) put in for a character takes 33 bytes.
MAX_REPLACEMENT_BYTES = 64

_TRAINER, _NORMALIZERS = 2, (3, 5)
_UNKNOWN_SURFACE, _CHARSMAP = 44, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_model(serialized: bytes) -> None:
    """Checks that a serialized model never puts more than `MAX_REPLACEMENT_BYTES` in for a character or a token.

    Pieces are left to the library, which bounds them.

    Raises:
        ValueError: it might, or the bytes are no protobuf message.
    """
    for number, message in _byte_fields(serialized):
        if number == _TRAINER:
            replacements = [content for inner, content in _byte_fields(message) if inner == _UNKNOWN_SURFACE]
        elif number in _NORMALIZERS:
            charsmaps = [content for inner, content in _byte_fields(message) if inner == _CHARSMAP]
            replacements = [text for charsmap in charsmaps for text in _replacements(charsmap)]
        else:
            continue
        longest = max(map(len, replacements), default=0)
        if longest > MAX_REPLACEMENT_BYTES:
            raise ValueError(
                f"it puts {longest:,} bytes in for one character or token; at most {MAX_REPLACEMENT_BYTES} are read"
            )


def _replacements(charsmap: bytes) -> list[bytes]:
    """What a charsmap may put in: the texts, each ended by a zero byte, behind its search tree and that one's size."""
    tree_bytes = int.from_bytes(charsmap[:4], "little")
    return charsmap[4 + tree_bytes :].split(b"\0")


def _byte_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The number and the content of every length-delimited field of a protobuf message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key >= 2**32:
            raise ValueError(f"no protobuf message: a field's key is {key}")
        wire_type = key & 7
        if wire_type == _VARINT:
            _, position = _varint(message, position)
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        elif wire_type == _BYTES:
            size, position = _varint(message, position)
            yield key >> 3, message[position : position + size]
            position += size
        else:
            raise ValueError(f"no protobuf message: wire type {wire_type} at byte {position}")
    if position > len(message):
        raise ValueError("no protobuf message: its last field is cut short")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The integer at `position`, seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"no protobuf message: an integer does not end at byte {position}")
