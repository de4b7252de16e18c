"""The validation text: its bytes are those of the documents, however it is cut into shards."""

import hashlib
import json

import numpy as np
import pytest

from golfmodel.data import text
from golfmodel.data.shards import open_shard, write_shard
from golfmodel.data.text import load_validation_text
from golfmodel.runtime.errors import DataError


def test_the_bytes_of_the_demo_corpus_are_those_of_its_files(demo_corpus, demo_tokenizer):
    validation = load_validation_text(demo_corpus, demo_tokenizer)
    summary = json.loads((demo_corpus / "corpus.json").read_text())["val"]
    assert validation.num_targets == summary["tokens"] - 1 == len(validation.tokens) - 1
    assert int(validation.target_bytes.sum()) == summary["bytes"]
    assert validation.tokens.dtype == np.uint16
    assert type(validation.tokens) is np.ndarray


def test_each_document_counts_what_it_decodes_to(demo_corpus, demo_tokenizer):
    validation = load_validation_text(demo_corpus, demo_tokenizer)
    starts = np.flatnonzero(validation.tokens == demo_tokenizer.bos_id)
    assert starts[0] == 0
    assert len(starts) > 10
    for start, end in zip(starts, [*starts[1:], len(validation.tokens)], strict=True):
        decoded = demo_tokenizer.decode(validation.tokens[start:end])
        assert int(validation.target_bytes[start : end - 1].sum()) == len(decoded.encode())


def test_byte_fallback_text_in_several_shards_and_chunks(demo_tokenizer, tmp_path, monkeypatch):
    documents = ["😀 日本語\n", "\x00\x01 tab\there", "", "plain", "漢字" * 20]
    tokens = np.array([i for text in documents for i in [1, *demo_tokenizer.encode(text)]])
    write_shard(tmp_path / "a_val_000000.bin", tokens)
    write_shard(tmp_path / "a_train_000000.bin", tokens[::-1])
    whole = load_validation_text(tmp_path, demo_tokenizer)
    assert int(whole.target_bytes.sum()) == sum(len(text.encode()) for text in documents)
    assert whole.digest == hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    monkeypatch.setattr(text, "_CHUNK", 7)
    for number, part in enumerate(np.split(tokens, [1, 40, 41])):
        write_shard(tmp_path / f"a_val_{number:06d}.bin", part)
    parts = load_validation_text(tmp_path, demo_tokenizer)
    np.testing.assert_array_equal(parts.tokens, tokens)
    np.testing.assert_array_equal(parts.target_bytes, whole.target_bytes)
    assert parts.digest == whole.digest


def test_a_bad_id_names_the_shard(demo_corpus, demo_tokenizer, tmp_path):
    tokens = open_shard(demo_corpus / "demo_val_000000.bin")[:100].copy()
    write_shard(tmp_path / "a_val_000000.bin", tokens)
    tokens[40] = 1024
    write_shard(tmp_path / "a_val_000001.bin", tokens)
    with pytest.raises(DataError, match=r"a_val_000001\.bin has token id 1024 at position 40"):
        load_validation_text(tmp_path, demo_tokenizer)


@pytest.mark.parametrize("length", [0, 1])
def test_no_target_at_all(demo_tokenizer, tmp_path, length):
    write_shard(tmp_path / "a_val_000000.bin", np.ones(length, dtype=np.uint16))
    with pytest.raises(DataError, match=f"hold {length} tokens; a target takes at least 2"):
        load_validation_text(tmp_path, demo_tokenizer)


def test_no_validation_shard(demo_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"holds no validation shard .* golfmodel\.data download"):
        load_validation_text(tmp_path, demo_tokenizer)
