"""The demo corpus: what is in it, that it is always the same, and that it is built once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from golfmodel.data import demo
from golfmodel.data.demo import build_demo_corpus, read_standard_library, split_documents, standard_library
from golfmodel.data.shards import find_shards, open_shard
from golfmodel.runtime.errors import DataError, StorageError

FILES = [
    "corpus.json",
    "demo_1024_bpe.model",
    "demo_train_000000.bin",
    "demo_train_000001.bin",
    "demo_val_000000.bin",
]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def small_library(tmp_path_factory) -> Path:
    """A part of the standard library, which makes a corpus in a fraction of a second."""
    root = tmp_path_factory.mktemp("library")
    for package in ("asyncio", "email", "json", "unittest"):
        shutil.copytree(standard_library() / package, root / package)
    return root


@pytest.fixture
def small(small_library, monkeypatch):
    monkeypatch.setattr(demo, "standard_library", lambda: small_library)


def documents_of(tokens: np.ndarray, tokenizer) -> list[str]:
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part) for part in np.split(tokens, starts[1:])]


def test_the_shards_hold_the_split_file_by_file(demo_corpus, demo_tokenizer):
    assert sorted(contents(demo_corpus)) == FILES
    train, val = split_documents(read_standard_library(standard_library()))
    summary = json.loads((demo_corpus / "corpus.json").read_text())
    for split, documents in (("train", train), ("val", val)):
        shards = [open_shard(path) for path in find_shards(demo_corpus, split)]
        decoded = [text for tokens in shards for text in documents_of(tokens, demo_tokenizer)]
        assert decoded == [document.text for document in documents]
        assert summary[split] == {
            "files": len(documents),
            "bytes": sum(len(document.text.encode()) for document in documents),
            "tokens": sum(map(len, shards)),
        }
    assert not {document.path for document in train} & {document.path for document in val}


def test_sizes(demo_corpus):
    summary = json.loads((demo_corpus / "corpus.json").read_text())
    train = [len(open_shard(path)) for path in find_shards(demo_corpus, "train")]
    assert len(train) == 2
    assert min(train) > 0.4 * sum(train)
    assert 60_000 <= summary["val"]["tokens"] <= 120_000
    assert 5_000_000 <= summary["train"]["bytes"] + summary["val"]["bytes"] <= 6_000_000
    assert summary["python"] == ".".join(map(str, sys.version_info[:3]))


def test_another_process_builds_the_same_bytes(demo_corpus, tmp_path):
    command = [sys.executable, "-m", "golfmodel.data", "demo", "--out", str(tmp_path / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    root = Path(demo.__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((demo_corpus / "corpus.json").read_text())
    assert f"{summary['val']['tokens']:,} tokens" in done.stdout
    assert contents(tmp_path / "again") == contents(demo_corpus)


def test_a_whole_corpus_is_not_built_again(demo_corpus, monkeypatch):
    def never(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(demo, "train_tokenizer", never)
    assert build_demo_corpus(demo_corpus) == json.loads((demo_corpus / "corpus.json").read_text())


def test_a_damaged_or_foreign_corpus_is_built_again(small, tmp_path, capsys):
    first = build_demo_corpus(tmp_path, show_progress=False)
    good = contents(tmp_path)

    def shorten(name: str) -> None:
        (tmp_path / name).write_bytes(good[name][:-2])

    def change_summary(**fields: object) -> None:
        (tmp_path / "corpus.json").write_text(json.dumps({**first, **fields}))

    damages = [
        lambda: shorten("demo_val_000000.bin"),
        lambda: shorten("demo_1024_bpe.model"),
        (tmp_path / "demo_train_000001.bin").unlink,
        (tmp_path / "corpus.json").unlink,
        lambda: (tmp_path / "corpus.json").write_text("[1, 2"),
        lambda: (tmp_path / "corpus.json").write_text("[1, 2]"),
        lambda: change_summary(python="3.9.0"),
        lambda: change_summary(recipe=0),
        lambda: change_summary(sha256={}),
        lambda: change_summary(train=None),
        lambda: change_summary(val={**first["val"], "tokens": "many"}),
        lambda: (tmp_path / "corpus.json").write_text("[" * 60_000),
        lambda: (tmp_path / "corpus.json").write_text(json.dumps(first) + " " * 2**16),
    ]
    for damage in damages:
        damage()
        assert build_demo_corpus(tmp_path, show_progress=False) == first
        assert contents(tmp_path) == good
    assert capsys.readouterr().err == ""


def test_older_shards_go_and_other_files_stay(small, tmp_path):
    for name in ("demo_train_000007.bin", "demo_val_000001.bin", "mine_train_000000.bin", "notes.txt"):
        (tmp_path / name).write_text("x")
    build_demo_corpus(tmp_path, show_progress=False)
    assert sorted(contents(tmp_path)) == sorted([*FILES, "mine_train_000000.bin", "notes.txt"])


def test_progress_goes_to_stderr(small, tmp_path, capsys):
    summary = build_demo_corpus(tmp_path)
    files = summary["train"]["files"] + summary["val"]["files"]
    assert f"demo corpus: {files}/{files} file" in capsys.readouterr().err


def test_what_is_left_out(tmp_path):
    filler = "x = 1  # a line like any other\n" * 20_000
    kept = {"zebra.py": filler, "pkg/mod.py": filler + "\tend\r\n"}
    skipped = {
        "site-packages/a.py": b"x",
        "unittest/test/b.py": b"x",
        "pkg/__pycache__/c.py": b"x",
        "encodings/cp037.py": b"x",
        "pydoc_data/topics.py": b"x",
        "config-3.11-x86_64-linux-gnu/python-config.py": b"x",
        "_sysconfigdata__linux_.py": b"x",
        "turtle.py": b"x",
        "empty.py": b"",
        "latin.py": "# é".encode("latin-1"),
        "block.py": "# ▁".encode(),
        "null.py": b"\0",
        "data.txt": b"x",
    }
    for name, content in {**{name: text.encode() for name, text in kept.items()}, **skipped}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    documents = read_standard_library(tmp_path)
    assert [(document.path, document.text) for document in documents] == sorted(kept.items())


def test_a_python_without_sources(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("x = 1\n")
    monkeypatch.setattr(demo, "standard_library", lambda: tmp_path)
    with pytest.raises(DataError, match=r"holds only 6 bytes of readable sources") as caught:
        build_demo_corpus(tmp_path / "out")
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        build_demo_corpus(tmp_path / "file" / "demo", show_progress=False)
