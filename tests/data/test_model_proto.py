"""What a SentencePiece file may put in for a character or a token, and that only a protobuf message is read."""

import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from protobuf import BYTES, DENORMALIZER, NORMALIZER, TRAINER, Field, fields_of, message_of, varint, with_charsmap
from tiny_tokenizers import train

from golfmodel.data.model_proto import MAX_REPLACEMENT_BYTES, check_model
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.errors import DataError

UNKNOWN_SURFACE = 44


@pytest.fixture(scope="module")
def rule_model(tmp_path_factory) -> bytes:
    """Reads every q as bb."""
    rules = tmp_path_factory.mktemp("rules") / "rules.tsv"
    rules.write_text("71\t62 62\n")
    return train(normalization_rule_tsv=str(rules), vocab_size=30)


def replacing_with(text: bytes):
    """Changes a charsmap that puts bb in to one that puts `text` in."""
    return lambda charsmap: charsmap.removesuffix(b"bb\0") + text + b"\0"


@pytest.mark.parametrize("place", [NORMALIZER, DENORMALIZER])
def test_a_character_becomes_so_many_bytes_and_no_more(rule_model, place):
    assert with_charsmap(rule_model, replacing_with(b"bb")) == rule_model
    check_model(with_charsmap(rule_model, replacing_with(b"b" * MAX_REPLACEMENT_BYTES), place))
    with pytest.raises(ValueError, match="it puts 65 bytes in for one character or token; at most 64 are read"):
        check_model(with_charsmap(rule_model, replacing_with(b"b" * 65), place))


def test_the_library_would_have_put_them_in(rule_model, tmp_path):
    """A tokenizer of 100 KB that makes 10 MB of 100 letters."""
    explosive = with_charsmap(rule_model, replacing_with(b"b" * 100_000))
    processor = sentencepiece.SentencePieceProcessor(model_proto=explosive)
    assert len(processor.normalize("q" * 10)) > 10 * 100_000
    (tmp_path / "x.model").write_bytes(explosive)
    with pytest.raises(DataError, match=r"x\.model .*puts 100,000 bytes in for one character"):
        Tokenizer(tmp_path / "x.model")


def test_the_text_of_an_unknown_piece_is_bounded(rule_model):
    def model(surface: bytes) -> bytes:
        return rule_model + message_of([(TRAINER, BYTES, message_of([(UNKNOWN_SURFACE, BYTES, surface)]))])

    check_model(model(b"?" * 64))
    with pytest.raises(ValueError, match="it puts 65 bytes in"):
        check_model(model(b"?" * 65))


def test_the_usual_rules_are_read(tiny_model, byte_model, unigram_model):
    for model in (tiny_model, byte_model, unigram_model):
        check_model(model)


NUMBERS = st.integers(1, 50) | st.integers(1, 2**29 - 1)
FIELDS = st.lists(
    st.tuples(NUMBERS, st.just(0), st.integers(0, 2**64 - 1))
    | st.tuples(NUMBERS, st.just(1), st.binary(min_size=8, max_size=8))
    | st.tuples(NUMBERS.filter(lambda number: number not in (2, 3, 5)), st.just(2), st.binary(max_size=200))
    | st.tuples(NUMBERS, st.just(5), st.binary(min_size=4, max_size=4)),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(before=FIELDS, after=FIELDS)
def test_a_long_text_is_found_among_any_fields(before: list[Field], after: list[Field]):
    surface = (UNKNOWN_SURFACE, BYTES, b"?" * 65)
    trainer = (TRAINER, BYTES, message_of([*before, surface, *after]))
    assert fields_of(message_of([*before, *after])) == [*before, *after]
    check_model(message_of([*before, *after]))
    with pytest.raises(ValueError, match="it puts 65 bytes in"):
        check_model(message_of([*before, trainer, *after]))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"\x0a\x05abc", "its last field is cut short"),
        (b"\x0d123", "its last field is cut short"),
        (b"\x09" + bytes(7), "its last field is cut short"),
        (b"\x0a" + varint(2**63), "its last field is cut short"),
        (b"\x0a", "an integer does not end at byte 1"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "an integer does not end at byte 11"),
        (b"\x0b\x0c", "wire type 3 at byte 1"),
        (b"\x0f", "wire type 7 at byte 1"),
        # protobuf drops the bits above 32 and would take it for field 3
        (varint(2**32 + (NORMALIZER << 3 | BYTES)) + b"\x01x", "a field's key is 4294967322"),
    ],
)
def test_what_is_no_protobuf_message_is_refused(message, problem):
    with pytest.raises(ValueError, match=re.escape(f"no protobuf message: {problem}")):
        check_model(message)
