"""The tokenizer: exact round trips, and byte counts equal to decoding and measuring."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_growth
from protobuf import BYTES, NORMALIZER, TRAINER, message_of, piece_field

from golfmodel.data.demo import read_standard_library, split_documents, standard_library
from golfmodel.data.tokenizer import MAX_MODEL_BYTES, Tokenizer
from golfmodel.runtime.errors import DataError
from golfmodel.runtime.versions import PROJECT_ROOT

HARD_TEXTS = [
    "",
    " ",
    "   leading, double  and trailing spaces   ",
    "\n\n\tdef f(x):\n\t\treturn x\r\n",
    "emoji 😀👩‍👩‍👧 and flags 🇳🇱",
    "日本語の文章、漢字かな交じり。",
    "control \x01\x02\x1b[0m \x7f \x85 \u2028 end",
    "\ufeffbyte order mark, \ufffd replacement, \U0010ffff last",
    "e\u0301 combining, ﬁ ligature, Ⅷ, ½",
]


def document_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Bytes of the tokens of one document, which begins with BOS."""
    tokens = np.array([tokenizer.bos_id, *ids])
    return int(tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum())


@pytest.fixture
def tiny(tiny_model, tmp_path) -> Tokenizer:
    (tmp_path / "tiny.model").write_bytes(tiny_model)
    return Tokenizer(tmp_path / "tiny.model")


def test_attributes(demo_tokenizer, demo_corpus):
    path = demo_corpus / "demo_1024_bpe.model"
    assert (demo_tokenizer.vocab_size, demo_tokenizer.bos_id, demo_tokenizer.path) == (1024, 1, path)
    assert demo_tokenizer.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_document_of_the_demo_corpus_round_trips_and_measures(demo_tokenizer):
    train, val = split_documents(read_standard_library(standard_library()))
    for document in train + val:
        ids = demo_tokenizer.encode(document.text)
        assert demo_tokenizer.bos_id not in ids
        assert demo_tokenizer.decode(ids) == document.text
        assert document_bytes(demo_tokenizer, ids) == len(document.text.encode())


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_round_trip_and_measure(demo_tokenizer, text):
    ids = demo_tokenizer.encode(text)
    assert demo_tokenizer.decode(np.array([demo_tokenizer.bos_id, *ids], dtype=np.uint16)) == text
    assert document_bytes(demo_tokenizer, ids) == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_round_trips_and_measures(demo_tokenizer, text):
    ids = demo_tokenizer.encode(text)
    assert demo_tokenizer.decode(ids) == text
    assert document_bytes(demo_tokenizer, ids) == len(text.encode())


def test_a_literal_block_becomes_a_space_and_counts_as_one(demo_tokenizer):
    ids = demo_tokenizer.encode("a▁b")
    assert demo_tokenizer.decode(ids) == "a b"
    assert document_bytes(demo_tokenizer, ids) == 3


def test_every_piece_counts_what_it_adds_to_a_text(demo_tokenizer):
    """Each piece alone, behind a letter: the text grows by as many bytes as are counted."""
    letter = demo_tokenizer.encode("a")[-1]
    before = len(demo_tokenizer.decode([letter]).encode())
    ids = np.arange(1024)
    counted = demo_tokenizer.target_bytes(np.full(1024, letter), ids)
    assert counted[:3].tolist() == [0, 0, 0]
    assert (counted[3:259] == 1).all()
    grown = [len(demo_tokenizer.decode([letter, token]).encode()) - before for token in range(259, 1024)]
    assert counted[259:].tolist() == grown


def test_a_model_that_normalises_counts_what_it_decodes(tiny):
    for text in ["the cat", "  the   cat  ", "a dog of the cat", "dog\t sat", "the"]:
        ids = tiny.encode(text)
        assert 3 not in ids  # an unknown piece decodes to a mark that is no part of the text
        assert document_bytes(tiny, ids) == len(tiny.decode(ids).encode())


def test_the_rule_piece_by_piece(tiny_model, tmp_path):
    path = tmp_path / "extended.model"
    path.write_bytes(tiny_model + message_of([piece_field("▁nope".encode(), 5), piece_field("▁é".encode())]))
    tokenizer = Tokenizer(path)
    unused, accented = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {piece: pieces.piece_to_id(piece) for piece in ("<mask>", "▁of▁the", "x▁▁y", "t", "▁the", "▁")}
    assert tokenizer.vocab_size == 42
    assert len(set(ids.values()) | {3}) == 7

    def count(previous: int, target: int) -> int:
        return int(tokenizer.target_bytes(np.array(previous), np.array(target)))

    ordinary = ids["t"]
    hiding = [0, 1, 2, 3, ids["<mask>"], unused]
    assert [count(ordinary, token) for token in hiding] == [0] * 6
    expected = {"▁of▁the": 7, "x▁▁y": 4, "t": 1, "▁the": 4, "▁": 1}
    for piece, size in expected.items():
        assert count(ordinary, ids[piece]) == size
        assert {count(previous, ids[piece]) for previous in hiding} == {size - piece.startswith("▁")}
    assert count(ordinary, accented) == 3
    assert count(unused, accented) == 2


def test_target_bytes_keeps_shape_and_takes_any_integer_type(demo_tokenizer):
    tokens = np.random.default_rng(0).integers(0, 1024, (3, 7))
    expected = demo_tokenizer.target_bytes(tokens[:, :-1], tokens[:, 1:])
    assert expected.shape == (3, 6)
    assert expected.dtype == np.int64
    narrow = tokens.astype(np.uint16)
    np.testing.assert_array_equal(demo_tokenizer.target_bytes(narrow[:, :-1], narrow[:, 1:]), expected)
    assert demo_tokenizer.target_bytes(tokens[0, :0], tokens[0, :0]).shape == (0,)


def test_another_vocabulary_names_both_options(demo_corpus):
    with pytest.raises(DataError, match=r"TOKENIZER_PATH\) has a vocabulary of 1024, but VOCAB_SIZE is 2048") as caught:
        Tokenizer(demo_corpus / "demo_1024_bpe.model", 2048)
    assert "demo_1024_bpe.model" in str(caught.value)


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"gone\.model: cannot read a tokenizer: No such file.*; TOKENIZER_PATH names"):
        Tokenizer(tmp_path / "gone.model")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_tokenizer_that_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "x.model")
    with pytest.raises(DataError, match=r"x\.model: not a file; expected a tokenizer"):
        Tokenizer(tmp_path / "x.model")


def test_an_enormous_tokenizer_is_not_read(tmp_path):
    with (tmp_path / "x.model").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"x\.model: 1,099,511,627,776 bytes; a tokenizer has at most 8,388,608"):
        Tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize("content", [b"", bytes(64), b"not a model at all\n" * 50, b"\x0a\x05hello"])
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.model \(TOKENIZER_PATH\) is not a SentencePiece model"):
        Tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize(
    "unit",
    [b"\x0a\x00", b"\x12\x00", b"\x08\x00", b"\x22\x02\x0a\x00"],
    ids=["pieces", "specifications", "integers", "self-tests"],
)
def test_the_largest_tokenizer_takes_bounded_memory(byte_model, tmp_path, unit):
    """Made of the smallest fields there are, empty ones."""
    path = tmp_path / "x.model"
    path.write_bytes(byte_model + unit * ((MAX_MODEL_BYTES - len(byte_model)) // len(unit)))
    growth, said = peak_growth("from golfmodel.data.tokenizer import Tokenizer", "Tokenizer(sys.argv[1])", path)
    assert said == "no error" or "piece must not be empty" in said
    assert growth < 50 * MAX_MODEL_BYTES


READ_TOKENIZER = """
import sys
from golfmodel.data.tokenizer import Tokenizer
tokenizer = Tokenizer(sys.argv[1])
assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
"""


def test_paths_in_a_tokenizer_are_never_opened(byte_model, tmp_path):
    """Its specifications name files. Whoever opens the pipe that they name here waits for ever."""
    os.mkfifo(tmp_path / "escaped")
    for place in (b"../escaped", bytes(tmp_path / "escaped")):
        trainer = message_of([(number, BYTES, place) for number in (1, 2, 5, 7, 36, 53, 54)])
        normalizer = message_of([(1, BYTES, place), (6, BYTES, place)])
        model = byte_model + message_of([(TRAINER, BYTES, trainer), (NORMALIZER, BYTES, normalizer)])
        path = tmp_path / "run" / "x.model"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model)
        subprocess.run(
            [sys.executable, "-c", READ_TOKENIZER, str(path)],
            env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
            cwd=path.parent,
            timeout=60,
            check=True,
        )
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["escaped", "run", "x.model"]


def test_a_text_or_ids_that_a_model_cannot_take_are_an_error(demo_tokenizer, byte_model, tmp_path):
    with pytest.raises(DataError, match=r"demo_1024_bpe\.model \(TOKENIZER_PATH\) cannot encode a text: "):
        demo_tokenizer.encode("half a pair \ud800")
    surface = message_of([(44, BYTES, b"\xff")])
    (tmp_path / "x.model").write_bytes(byte_model + message_of([(TRAINER, BYTES, surface)]))
    with pytest.raises(DataError, match=r"x\.model \(TOKENIZER_PATH\) makes no text of ids: .*utf-8"):
        Tokenizer(tmp_path / "x.model").decode([0])


def test_what_a_damaged_model_says_stays_in_one_line(byte_model, tmp_path):
    noise = b"\n\x1b[2J" + b"x" * 5000
    (tmp_path / "x.model").write_bytes(byte_model + message_of([piece_field(noise, 6)]))
    with pytest.raises(DataError, match="is damaged: INTERNAL: byte piece ") as caught:
        Tokenizer(tmp_path / "x.model")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_library_that_damaged_models_crash_is_refused(demo_corpus, monkeypatch):
    for version in ("0.2.2", "0.2.10", "0.3.0", "1.0"):
        monkeypatch.setattr(sentencepiece, "__version__", version)
        Tokenizer(demo_corpus / "demo_1024_bpe.model")
    for version in ("0.1.99", "0.2.1"):
        monkeypatch.setattr(sentencepiece, "__version__", version)
        with pytest.raises(DataError, match=rf"sentencepiece {version} is .*pip install 'sentencepiece>=0\.2\.2'"):
            Tokenizer(demo_corpus / "demo_1024_bpe.model")
