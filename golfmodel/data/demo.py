"""The demo corpus: the Python standard library's own sources, as shards with a tokenizer of their own.

Real text that every machine has, for trying the whole pipeline without a network. It is the same for the same
Python version: files are chosen and split by a hash of their path, and the tokenizer is trained on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from golfmodel.data.shards import write_shard
from golfmodel.data.tokenizer import SPACE, Tokenizer
from golfmodel.runtime.bounded import read_bounded
from golfmodel.runtime.errors import DataError
from golfmodel.runtime.files import write_bytes, write_json
from golfmodel.runtime.progress import Progress

DEMO_DIRECTORY = Path("data/demo")
DEMO_TOKENIZER = "demo_1024_bpe.model"
DEMO_SUMMARY = "corpus.json"
DEMO_VOCAB_SIZE = 1024
_MAX_SUMMARY_BYTES = 2**16
_TRAIN_SHARDS = ("demo_train_000000.bin", "demo_train_000001.bin")
_VALIDATION_SHARD = "demo_val_000000.bin"

# Raised whenever the same Python version would give another corpus; an older one on disk is then built again.
_RECIPE = 1

_MAX_TOTAL_BYTES = 6_000_000
_VALIDATION_BYTES = 240_000  # about 90,000 tokens
_MAX_VALIDATION_FILE_BYTES = 40_000  # so that validation is many files, not one large one
_MIN_TOTAL_BYTES = 1_000_000

# Tests, third-party packages, tables that are generated, and parts that some distributions leave out.
_SKIPPED_DIRECTORIES = frozenset(
    {"__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idle_test", "idlelib"}
    | {"lib-dynload", "lib2to3", "msilib", "pydoc_data", "site-packages", "test", "tests", "tkinter"}
    | {"turtledemo"}
)
_SKIPPED_FILES = frozenset(("html/entities.py", "locale.py", "sitecustomize.py", "turtle.py", "usercustomize.py"))
_MACHINE_SPECIFIC = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclass(frozen=True)
class Document:
    """One source file: its path in the standard library, with "/", and its text."""

    path: str
    text: str


def build_demo_corpus(directory: str | Path = DEMO_DIRECTORY, *, show_progress: bool = True) -> dict[str, Any]:
    """Builds the demo corpus in `directory`, unless it is there already, whole and from this Python version.

    Writes `demo_train_00000{0,1}.bin`, `demo_val_000000.bin`, `demo_1024_bpe.model` and, last, `corpus.json`.

    Returns:
        What `corpus.json` holds: `python` (its version), `vocab_size`, `sha256` of each file, and for `train`
        and `val` the number of `files`, `bytes` of text and `tokens`.

    Raises:
        DataError: this Python has no readable standard library sources.
        StorageError: the directory cannot be written.
    """
    directory = Path(directory)
    existing = _existing(directory)
    if existing is not None:
        return existing
    train, val = split_documents(read_standard_library(standard_library()))
    write_bytes(directory / DEMO_TOKENIZER, train_tokenizer([document.text for document in train]))
    _remove_older(directory)
    tokenizer = Tokenizer(directory / DEMO_TOKENIZER, DEMO_VOCAB_SIZE)
    with Progress("demo corpus", len(train) + len(val), unit="file", enabled=show_progress) as progress:
        train_ids = _encode(tokenizer, train, progress)
        val_ids = _encode(tokenizer, val, progress)
    for name, tokens in zip(_TRAIN_SHARDS, _evenly(train_ids, len(_TRAIN_SHARDS)), strict=True):
        write_shard(directory / name, tokens)
    write_shard(directory / _VALIDATION_SHARD, np.concatenate(val_ids))
    summary = {
        "recipe": _RECIPE,
        "python": platform.python_version(),
        "vocab_size": DEMO_VOCAB_SIZE,
        "train": _describe(train, train_ids),
        "val": _describe(val, val_ids),
        "sha256": _digests(directory),
    }
    write_json(directory / DEMO_SUMMARY, summary)
    return summary


def standard_library() -> Path:
    """Where this Python keeps the standard library's sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_standard_library(root: Path) -> list[Document]:
    """The documents of the library in `root`, sorted by path.

    Raises:
        DataError: there is too little text there.
    """
    documents: list[Document] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _is_skipped(relative):
            continue
        try:
            text = path.read_bytes().decode()  # not read_text, which would change line ends
        except (OSError, UnicodeDecodeError):
            continue
        if text and SPACE not in text and "\0" not in text:  # neither survives SentencePiece
            documents.append(Document(relative.as_posix(), text))
    total_bytes = sum(len(document.text.encode()) for document in documents)
    if total_bytes < _MIN_TOTAL_BYTES:
        raise DataError(
            f"the demo corpus is made of this Python's standard library, but {root} holds only {total_bytes} "
            f"bytes of readable sources (at least {_MIN_TOTAL_BYTES} are needed); use a Python installed "
            "with its .py files, or get other text with `python -m golfmodel.data download` or `tokenize`"
        )
    return sorted(documents, key=lambda document: document.path)


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Splits by file into training and validation documents, each sorted by path.

    Files are taken in the order of a hash of their path: small ones for validation until there is enough of it, all
    others for training until the corpus is full.
    """
    train: list[Document] = []
    val: list[Document] = []
    val_bytes = total_bytes = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.path.encode()).digest()):
        size = len(document.text.encode())
        if val_bytes < _VALIDATION_BYTES and size <= _MAX_VALIDATION_FILE_BYTES:
            val.append(document)
            val_bytes += size
        elif total_bytes + size <= _MAX_TOTAL_BYTES:
            train.append(document)
        else:
            continue
        total_bytes += size
    return sorted(train, key=lambda document: document.path), sorted(val, key=lambda document: document.path)


def train_tokenizer(texts: Sequence[str]) -> bytes:
    """Trains a SentencePiece BPE model that gives every text back exactly; returns the model file's bytes.

    1024 pieces: `<unk>` 0, `<s>` 1, `</s>` 2, 256 bytes, and merges, among them runs of spaces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=DEMO_VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        max_sentence_length=_MAX_TOTAL_BYTES,
        minloglevel=2,
    )
    return model.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m golfmodel.data demo`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=DEMO_DIRECTORY,
        metavar="DIR",
        help="directory for the shards and the tokenizer (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Builds the corpus and says what is there."""
    summary = build_demo_corpus(arguments.out)
    for split in ("train", "val"):
        part = summary[split]
        print(f"{split}: {part['files']} files, {part['bytes']:,} bytes, {part['tokens']:,} tokens")
    print(f"shards in {arguments.out}, tokenizer {arguments.out / DEMO_TOKENIZER}")
    return 0


def _is_skipped(relative: Path) -> bool:
    return (
        not _SKIPPED_DIRECTORIES.isdisjoint(relative.parts)
        or relative.as_posix() in _SKIPPED_FILES
        or any(part.startswith(_MACHINE_SPECIFIC) for part in relative.parts)
    )


def _encode(tokenizer: Tokenizer, documents: Sequence[Document], progress: Progress) -> list[np.ndarray]:
    encoded: list[np.ndarray] = []
    for document in documents:
        encoded.append(np.array([tokenizer.bos_id, *tokenizer.encode(document.text)], dtype=np.uint16))
        progress.update()
    return encoded


def _evenly(documents: Sequence[np.ndarray], parts: int) -> list[np.ndarray]:
    """The documents in order as `parts` texts of about equal length, each of whole documents."""
    ends = np.cumsum([len(document) for document in documents])
    inner = [int(np.searchsorted(ends, ends[-1] * part // parts)) for part in range(1, parts)]
    cuts = [0, *inner, len(documents)]
    return [np.concatenate(documents[start:end]) for start, end in pairwise(cuts)]


def _describe(documents: Sequence[Document], encoded: Sequence[np.ndarray]) -> dict[str, int]:
    return {
        "files": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "tokens": sum(len(tokens) for tokens in encoded),
    }


def _existing(directory: Path) -> dict[str, Any] | None:
    """The summary of the corpus in `directory`, if it is whole and what this program would build."""
    try:
        summary = json.loads(read_bounded(directory / DEMO_SUMMARY, _MAX_SUMMARY_BYTES, "a summary", DataError))
        same = (summary["recipe"], summary["python"]) == (_RECIPE, platform.python_version())
        counts = [summary[split][what] for split in ("train", "val") for what in ("files", "bytes", "tokens")]
        whole = all(type(count) is int for count in counts) and summary["sha256"] == _digests(directory)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return summary if same and whole else None


def _remove_older(directory: Path) -> None:
    """Removes an older demo corpus, so that none of its shards is read together with the new ones."""
    for pattern in (DEMO_SUMMARY, "demo_train_*.bin", "demo_val_*.bin"):
        for path in directory.glob(pattern):
            path.unlink()


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of the corpus but the summary, in hexadecimal, by name."""
    names = (DEMO_TOKENIZER, *_TRAIN_SHARDS, _VALIDATION_SHARD)
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
