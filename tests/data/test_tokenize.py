"""Text and JSON lines to shards: documents, cuts, and errors with their line."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from golfmodel.data.__main__ import main
from golfmodel.data.demo import DEMO_TOKENIZER
from golfmodel.data.shards import find_shards, open_shard
from golfmodel.data.tokenize import Written, tokenize_files
from golfmodel.runtime.errors import ConfigError, DataError, StorageError


@pytest.fixture
def tokenize(demo_tokenizer, tmp_path):
    def call(*files: Path, **options) -> Written:
        settings = {"tokenizer": demo_tokenizer, "directory": tmp_path / "out", "split": "train", **options}
        return tokenize_files(files, **settings)

    return call


def read_back(directory: Path, tokenizer, split: str = "train") -> list[str]:
    tokens = np.concatenate([open_shard(path) for path in find_shards(directory, split)])
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part) for part in np.split(tokens, starts[1:])]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_json_lines(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def test_a_text_file_is_one_document(tokenize, demo_tokenizer, tmp_path):
    texts = ["first\r\n\n  line 😀\n", "no line end", "\ttab"]
    files = [write(tmp_path / f"{number}.txt", text) for number, text in enumerate(texts)]
    written = tokenize(*files)
    assert read_back(tmp_path / "out", demo_tokenizer) == texts
    assert [path.name for path in written.shards] == ["text_train_000000.bin"]
    assert written.documents == 3
    assert written.text_bytes == sum(len(text.encode()) for text in texts)
    assert written.tokens == len(open_shard(written.shards[0]))


def test_a_separator_ends_documents(tokenize, demo_tokenizer, tmp_path):
    text = "<|end|>\none\n<|end|>\ntwo <|end|>\nlines\n<|end|>\r\n<|end|>\nthree\n"
    tokenize(write(tmp_path / "a.txt", text), separator="<|end|>")
    assert read_back(tmp_path / "out", demo_tokenizer) == ["one\n", "two <|end|>\nlines\n", "three\n"]


def test_json_lines(tokenize, demo_tokenizer, tmp_path):
    first = write_json_lines(tmp_path / "a.jsonl", {"text": "one\nline", "id": 1}, {"text": ""}, {"text": "日本"})
    write(first, first.read_bytes() + b"\n   \n")
    second = write_json_lines(tmp_path / "b.ndjson", {"text": "three"})
    assert tokenize(first, second).documents == 3
    assert read_back(tmp_path / "out", demo_tokenizer) == ["one\nline", "日本", "three"]


def test_another_field(tokenize, demo_tokenizer, tmp_path):
    tokenize(write_json_lines(tmp_path / "a.jsonl", {"text": "no", "body": "yes"}), field="body")
    assert read_back(tmp_path / "out", demo_tokenizer) == ["yes"]


@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 10**6])
def test_shards_are_cut_at_one_length_and_lose_nothing(tokenize, demo_tokenizer, tmp_path, shard_tokens):
    texts = ["a few words", "x", "more words than those before, and so on, and on"] * 5
    file = write_json_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    written = tokenize(file, shard_tokens=shard_tokens, split="val", name="mine")
    lengths = [len(open_shard(path)) for path in written.shards]
    assert written.shards == find_shards(tmp_path / "out", "val")
    assert all(length == shard_tokens for length in lengths[:-1])
    assert 0 < lengths[-1] <= shard_tokens
    assert sum(lengths) == written.tokens == sum(1 + len(demo_tokenizer.encode(text)) for text in texts)
    assert read_back(tmp_path / "out", demo_tokenizer, "val") == texts


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", b"{not json}\n", r"a\.jsonl:3: not JSON: "),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:3: no text in field 'text' \(--field\); the line has no object"),
        ("a.jsonl", b'{"body": 1, "id": 2}\n', r"a\.jsonl:3: no text in field 'text' .* has fields 'body', 'id'"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:3: no text in field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:3: not UTF-8: invalid start byte at byte 10"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl:3: the text is not valid Unicode: surrogates not allowed"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:3: not JSON"),
        ("a.txt", b"ok\xc3\n", r"a\.txt:3: not UTF-8: invalid continuation byte at byte 2"),
    ],
)
def test_an_error_has_its_line_and_leaves_no_shard(tokenize, tmp_path, name, line, message):
    good = b'{"text": "fine and good"}\n' * 2
    with pytest.raises(DataError, match=message):
        tokenize(write(tmp_path / name, good + line + good), shard_tokens=4)
    assert list((tmp_path / "out").glob("*")) == []


def test_a_missing_file_leaves_no_shard(tokenize, tmp_path):
    good = write(tmp_path / "good.txt", "some text " * 20)
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        tokenize(good, tmp_path / "gone.txt", shard_tokens=5)
    assert list((tmp_path / "out").glob("*")) == []


def test_no_text_at_all(tokenize, tmp_path):
    with pytest.raises(DataError, match=r"there is no text in .*empty\.txt"):
        tokenize(write(tmp_path / "empty.txt", ""))


def test_shards_of_that_name_are_not_overwritten(tokenize, tmp_path):
    file = write(tmp_path / "a.txt", "text")
    tokenize(file)
    with pytest.raises(DataError, match=r"already holds 1 shards named text_train_\*\.bin"):
        tokenize(file)
    tokenize(file, name="more")
    tokenize(file, split="val")
    assert len(find_shards(tmp_path / "out", "train")) == 2


@pytest.mark.parametrize("name", ["a_val", "a_val_b", "val_val"])
def test_a_name_may_not_belong_to_the_other_split(tokenize, tmp_path, name):
    file = write(tmp_path / "a.txt", "text")
    with pytest.raises(ConfigError, match="would also be read as val shards"):
        tokenize(file, name=name)
    tokenize(file, name=name, split="val")
    with pytest.raises(ConfigError, match="would also be read as train shards"):
        tokenize(file, name="my_train", split="val")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a*", "-x"])
def test_a_name_that_is_no_file_name(tokenize, tmp_path, name):
    with pytest.raises(ConfigError, match="--name is"):
        tokenize(write(tmp_path / "a.txt", "text"), name=name)


@pytest.mark.parametrize("shard_tokens", [0, -1, 2**31])
def test_a_shard_length_out_of_range(tokenize, tmp_path, shard_tokens):
    with pytest.raises(ConfigError, match=f"--shard-tokens is {shard_tokens}; it may be 1 to 2147483647"):
        tokenize(write(tmp_path / "a.txt", "text"), shard_tokens=shard_tokens)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("vocab_size", 65537, "65537 pieces; .* up to 65536"), ("bos_id", -1, "no begin-of-document piece")],
)
def test_a_model_that_cannot_make_shards(tokenize, demo_tokenizer, tmp_path, monkeypatch, attribute, value, message):
    monkeypatch.setattr(demo_tokenizer, attribute, value)
    with pytest.raises(DataError, match=message):
        tokenize(write(tmp_path / "a.txt", "text"))


def test_a_directory_that_cannot_be_written(tokenize, tmp_path):
    file = write(tmp_path / "a.txt", "text")
    with pytest.raises(StorageError, match="cannot write"):
        tokenize(file, directory=file / "out")


def test_the_command(demo_corpus, demo_tokenizer, tmp_path, capsys):
    model = str(demo_corpus / DEMO_TOKENIZER)
    file = str(write(tmp_path / "a.txt", "one\n%%\ntwo\n"))
    options = ["--tokenizer", model, "--out", str(tmp_path / "out"), "--split", "val", "--document-separator", "%%"]
    assert main(["tokenize", *options, "--name", "own", "--shard-tokens", "3", file]) == 0
    assert "2 documents, 8 bytes" in capsys.readouterr().out
    assert read_back(tmp_path / "out", demo_tokenizer, "val") == ["one\n", "two\n"]
    assert main(["tokenize", *options, "--name", "own", file]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", ["demo", "download", "tokenize"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"python -m golfmodel.data {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fetch"], ["demo", "--what"], ["tokenize", "x.txt"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m golfmodel.data" in capsys.readouterr().err


def test_one_document_larger_than_several_shards_comes_first(tokenize, demo_tokenizer, tmp_path):
    words = " ".join(itertools.islice(itertools.cycle(["alpha", "beta", "gamma"]), 500))
    written = tokenize(write(tmp_path / "a.txt", words), shard_tokens=100)
    assert len(written.shards) > 3
    assert read_back(tmp_path / "out", demo_tokenizer) == [words]
