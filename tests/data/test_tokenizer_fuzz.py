"""No tokenizer file, however it came about, crashes the process or counts other bytes than its pieces have."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import draws, mutants, mutate, refused_or_right
from protobuf import (
    BYTES,
    FIXED32,
    NORMALIZER,
    PIECE,
    SCORE,
    TEXT,
    TRAINER,
    TYPE,
    VARINT,
    Field,
    fields_of,
    message_of,
    with_charsmap,
)

from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.errors import DataError

TEXTS = ["the cat sat on the mat", "  a dogé x  y \n of the ﬁ Ⅷ 日本 \0 z▁ é", "t" * 50]
UNKNOWN, CONTROL, UNUSED, BYTE = 2, 3, 5, 6
SPACE = "▁".encode()

INTEGERS = (0, 1, 2, 3, 4, 5, 6, 127, 128, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e38, 1e-45)
STRINGS = (b"", b" ", SPACE, SPACE * 2, b"<0x00>", b"<unk>", b"<s>", b"\xff", b"\0", b"t", b"the", b"a" * 9000)
# Fields that the library reads when it loads a model or uses one, by wire type.
TRAINER_FIELDS = {3: VARINT, 4: VARINT, 24: VARINT, 26: VARINT, 35: VARINT, 40: VARINT, 41: VARINT}
TRAINER_FIELDS |= {30: BYTES, 31: BYTES, 36: BYTES, 44: BYTES, 45: BYTES, 46: BYTES, 47: BYTES, 48: BYTES}
NORMALIZER_FIELDS = {1: BYTES, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: BYTES}
PIECE_FIELDS = {TEXT: BYTES, SCORE: FIXED32, TYPE: VARINT}


@pytest.fixture
def reads_rightly(tmp_path: Path):
    """Whether a file is read as a tokenizer; it must then be the one that its pieces make."""
    path = tmp_path / "fuzzed.model"

    def read(model: bytes) -> bool:
        path.write_bytes(model)
        return refused_or_right(
            lambda: Tokenizer(path), lambda tokenizer: is_made_of(tokenizer, model), DataError, str(path)
        )

    return read


def is_made_of(tokenizer: Tokenizer, model: bytes) -> bool:
    """Whether ids and bytes are those of the pieces in the file; using the tokenizer may fail only with DataError."""
    pieces = [piece_of(content) for number, wire, content in fields_of(model) if (number, wire) == (PIECE, BYTES)]
    ids = np.arange(len(pieces))
    ordinary = next((i for i, (_, kind) in enumerate(pieces) if kind not in (UNKNOWN, CONTROL, UNUSED)), None)
    sound = tokenizer.vocab_size == len(pieces) and -1 <= tokenizer.bos_id < len(pieces)
    if ordinary is not None:
        counted = tokenizer.target_bytes(np.full(len(pieces), ordinary), ids)
        sound &= counted.tolist() == [bytes_of(*piece) for piece in pieces]
    for text in TEXTS:
        try:
            encoded = tokenizer.encode(text)
            sound &= all(0 <= token < len(pieces) for token in encoded)
            tokenizer.decode(encoded)
        except DataError as error:
            assert str(tokenizer.path) in str(error)
    return sound


def piece_of(content: bytes) -> tuple[bytes, int]:
    text, kind = b"", 1
    for number, wire, value in fields_of(content):
        if (number, wire) == (TEXT, BYTES):
            text = value
        elif (number, wire) == (TYPE, VARINT) and 1 <= value & 0xFFFFFFFF <= BYTE:
            kind = value & 0xFFFFFFFF  # an enumeration is 32 bits wide; unknown values count as absent
    return text, UNUSED if text == b"\0" else kind  # as the library has it since 0.2.3; before, it refuses the model


def bytes_of(text: bytes, kind: int) -> int:
    if kind in (UNKNOWN, CONTROL, UNUSED):
        return 0
    return 1 if kind == BYTE else len(text.replace(SPACE, b" "))


def test_no_mutation_of_the_file_crashes_or_miscounts(reads_rightly, tiny_model, byte_model, unigram_model):
    originals = (tiny_model, byte_model, unigram_model)
    assert all(map(reads_rightly, originals))
    accepted = sum(map(reads_rightly, mutants("tokenizer file", *originals)))
    assert accepted > 100


def test_no_mutation_of_the_fields_crashes_or_miscounts(reads_rightly, tiny_model, byte_model, unigram_model):
    """The file stays a protobuf message; its fields go, move, come twice, and take extreme values."""
    originals = [fields_of(model) for model in (tiny_model, byte_model, unigram_model)]
    accepted = 0
    for generator in draws("tokenizer fields"):
        fields = list(originals[int(generator.integers(len(originals)))])
        for _ in range(generator.integers(1, 4)):
            mutate_fields(fields, generator)
        accepted += reads_rightly(message_of(fields))
    assert accepted > 1000


def mutate_fields(fields: list[Field], generator: np.random.Generator) -> None:
    place, other = (int(index) for index in generator.integers(len(fields), size=2)) if fields else (0, 0)
    match generator.integers(6):
        case 0:
            del fields[place : place + int(generator.integers(1, 20))]
        case 1 if fields:
            fields.insert(other, fields[place])
        case 2 if fields:
            fields[place], fields[other] = fields[other], fields[place]
        case 3:
            extreme_value(fields, TRAINER, TRAINER_FIELDS, generator)
        case 4:
            extreme_value(fields, NORMALIZER, NORMALIZER_FIELDS, generator)
        case _:
            extreme_value(fields, PIECE, PIECE_FIELDS, generator)


def extreme_value(fields: list[Field], number: int, inner: dict[int, int], generator: np.random.Generator) -> None:
    """Gives one field of a message of this number an extreme value, or another one, added or in place."""
    name = list(inner)[int(generator.integers(len(inner)))]
    wire = inner[name]
    if wire == VARINT:
        value = INTEGERS[int(generator.integers(len(INTEGERS)))]
    elif wire == FIXED32:
        value = struct.pack("<f", FLOATS[int(generator.integers(len(FLOATS)))])
    else:
        value = STRINGS[int(generator.integers(len(STRINGS)))] if generator.integers(2) else generator.bytes(4)
    places = [place for place, field in enumerate(fields) if field[0] == number]
    if not places:
        fields.append((number, BYTES, message_of([(name, wire, value)])))
        return
    place = places[int(generator.integers(len(places)))]
    kept = [field for field in fields_of(fields[place][2]) if field[0] != name or generator.integers(2)]
    fields[place] = (number, BYTES, message_of([*kept, (name, wire, value)]))


def test_no_mutation_of_the_normalizers_table_crashes_or_miscounts(reads_rightly, tiny_model):
    """Its search tree says where to go on and which text to put in, by numbers that may point anywhere."""
    accepted = 0
    for generator in draws("tokenizer charsmap"):
        model = with_charsmap(tiny_model, lambda charsmap: mutate(charsmap, generator))  # noqa: B023
        accepted += reads_rightly(model)
    assert accepted > 5


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), end=st.booleans())
def test_arbitrary_bytes_alone_or_behind_a_model_crash_nothing(content, end, reads_rightly, byte_model):
    reads_rightly(byte_model + content if end else content)
