"""A SentencePiece file taken apart and put together again, by an independent reader and writer of protobuf."""

from __future__ import annotations

from collections.abc import Callable

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# A field: its number, its wire type, and its value, an integer for VARINT.
Field = tuple[int, int, "int | bytes"]

PIECE, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # fields of a model
TEXT, SCORE, TYPE = 1, 2, 3  # fields of a piece
CHARSMAP = 2  # a field of a normalizer


def varint(value: int) -> bytes:
    rest = value >> 7
    return bytes([value & 127 | 128]) + varint(rest) if rest else bytes([value])


def fields_of(message: bytes) -> list[Field]:
    position = 0

    def integer() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    fields: list[Field] = []
    while position < len(message):
        number, wire = divmod(integer(), 8)
        if wire == VARINT:
            fields.append((number, wire, integer()))
            continue
        size = {FIXED64: 8, FIXED32: 4}[wire] if wire != BYTES else integer()
        fields.append((number, wire, message[position : position + size]))
        position += size
    return fields


def message_of(fields: list[Field]) -> bytes:
    parts = []
    for number, wire, value in fields:
        content = varint(value) if wire == VARINT else varint(len(value)) + value if wire == BYTES else value
        parts.append(varint(number << 3 | wire) + content)
    return b"".join(parts)


def piece_field(text: bytes, kind: int = 1) -> Field:
    """A piece with score 0; kind 1 is ordinary, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte."""
    return (PIECE, BYTES, message_of([(TEXT, BYTES, text), (SCORE, FIXED32, bytes(4)), (TYPE, VARINT, kind)]))


def with_charsmap(model: bytes, change: Callable[[bytes], bytes], place: int = NORMALIZER) -> bytes:
    """The model with its normalizer's charsmap changed, and that normalizer as field `place`."""
    changed: list[Field] = []
    for number, wire, value in fields_of(model):
        if number == NORMALIZER:
            inner = [(n, w, change(v) if n == CHARSMAP else v) for n, w, v in fields_of(value)]
            changed.append((place, wire, message_of(inner)))
        if number != NORMALIZER or place != NORMALIZER:
            changed.append((number, wire, value))
    return message_of(changed)
