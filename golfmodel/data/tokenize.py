"""Text and JSON-lines files to shards, with any SentencePiece model."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golfmodel.data.shards import MAX_SHARD_TOKENS, MAX_TOKEN_ID, Split, split_marker, write_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.errors import ConfigError, DataError
from golfmodel.runtime.progress import Progress

DEFAULT_SHARD_TOKENS = 100_000_000
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """A text and where it is from, such as "notes.jsonl:12"."""

    text: str
    source: str


@dataclass(frozen=True)
class Written:
    """What `tokenize_files` has written."""

    shards: list[Path]
    documents: int
    tokens: int
    text_bytes: int


def tokenize_files(
    files: Sequence[str | Path],
    *,
    tokenizer: Tokenizer,
    directory: str | Path,
    split: Split,
    name: str = "text",
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    field: str = "text",
    separator: str | None = None,
) -> Written:
    """Writes the documents of `files` as shards `NAME_SPLIT_000000.bin`, ... in `directory`.

    Each document begins with BOS; every shard but the last holds `shard_tokens` tokens. Memory holds one shard and
    one document at a time. If anything fails, the shards written so far are removed.

    Args:
        files: JSON lines if so named (.jsonl, .ndjson), plain text otherwise.
        field: where a JSON line has its text.
        separator: the line that ends a document of a plain text; None makes each plain text one document.

    Raises:
        ConfigError: a name that belongs to another split, or a number of tokens out of range.
        DataError: a model without BOS or with too many pieces; shards of that name already there; a file that is
            missing, not UTF-8 or not JSON lines with that field (with the line's number); no text at all.
        StorageError: the directory cannot be written.
    """
    _check_options(tokenizer, split, name, shard_tokens)
    directory = Path(directory)
    older = sorted(directory.glob(f"{name}_{split}_*.bin"))
    if older:
        raise DataError(
            f"{directory} already holds {len(older)} shards named {name}{split_marker(split)}*.bin; remove them, or "
            "choose another --name or --out"
        )
    shards = _ShardWriter(directory, f"{name}_{split}", shard_tokens)
    documents = text_bytes = 0
    try:
        with Progress("tokenize", None, unit="document") as progress:
            for document in read_documents(files, field=field, separator=separator):
                try:
                    text_bytes += len(document.text.encode())
                except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
                    raise DataError(f"{document.source}: the text is not valid Unicode: {error.reason}") from error
                shards.add([tokenizer.bos_id, *tokenizer.encode(document.text)])
                documents += 1
                progress.update()
        shards.close()
        if documents == 0:
            raise DataError(f"there is no text in {', '.join(map(str, files))}; a shard needs at least one document")
    except BaseException:
        shards.discard()
        raise
    return Written(shards.paths, documents, shards.tokens, text_bytes)


def read_documents(files: Sequence[str | Path], *, field: str, separator: str | None) -> Iterator[Document]:
    """The documents of `files` in order, without empty ones; see `tokenize_files`."""
    for path in map(Path, files):
        if path.suffix in JSON_LINES_SUFFIXES:
            documents = _json_documents(path, field)
        else:
            documents = _text_documents(path, separator)
        yield from (document for document in documents if document.text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m golfmodel.data tokenize`."""
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL", help="SentencePiece model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the shards")
    parser.add_argument("--split", choices=("train", "val"), required=True, help="which split the text is")
    parser.add_argument("--name", default="text", help="first part of the shards' names (default: %(default)s)")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="tokens in a shard (default: %(default)s)",
    )
    parser.add_argument("--field", default="text", help="field of a JSON line with its text (default: %(default)s)")
    parser.add_argument(
        "--document-separator",
        metavar="LINE",
        help="line that ends a document in plain text files (default: each file is one document)",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="plain text, or JSON lines if named .jsonl or .ndjson"
    )


def run(arguments: argparse.Namespace) -> int:
    """Tokenizes and says what was written."""
    written = tokenize_files(
        arguments.files,
        tokenizer=Tokenizer(arguments.tokenizer),
        directory=arguments.out,
        split=arguments.split,
        name=arguments.name,
        shard_tokens=arguments.shard_tokens,
        field=arguments.field,
        separator=arguments.document_separator,
    )
    print(
        f"{len(written.shards)} shards in {arguments.out}: {written.documents:,} documents, "
        f"{written.text_bytes:,} bytes, {written.tokens:,} tokens"
    )
    return 0


class _ShardWriter:
    """Cuts an endless sequence of ids into shards of one length."""

    def __init__(self, directory: Path, prefix: str, shard_tokens: int) -> None:
        self._directory, self._prefix, self._shard_tokens = directory, prefix, shard_tokens
        self._parts: list[np.ndarray] = []
        self._pending = 0
        self.paths: list[Path] = []
        self.tokens = 0

    def add(self, ids: list[int]) -> None:
        """Appends the ids of a document, writing each shard that becomes full."""
        tokens = np.array(ids, dtype=np.uint16)
        self.tokens += len(tokens)
        while len(tokens) > 0:
            part = tokens[: self._shard_tokens - self._pending]
            self._parts.append(part)
            self._pending += len(part)
            tokens = tokens[len(part) :]
            if self._pending == self._shard_tokens:
                self._write()

    def close(self) -> None:
        """Writes what is left as the last shard."""
        if self._pending:
            self._write()

    def discard(self) -> None:
        """Removes the shards written so far."""
        for path in self.paths:
            path.unlink(missing_ok=True)

    def _write(self) -> None:
        path = self._directory / f"{self._prefix}_{len(self.paths):06d}.bin"
        write_shard(path, np.concatenate(self._parts))
        self.paths.append(path)
        self._parts, self._pending = [], 0


def _check_options(tokenizer: Tokenizer, split: Split, name: str, shard_tokens: int) -> None:
    other = "val" if split == "train" else "train"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name is {name!r}; it may have letters, digits, '.', '_' and '-', and begin with no sign")
    if split_marker(other) in f"{name}_{split}_":
        raise ConfigError(
            f"--name is {name!r}: {name}{split_marker(split)}*.bin would also be read as {other} shards; the name may "
            f"not have {split_marker(other)} in it or end with _{other}"
        )
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise ConfigError(f"--shard-tokens is {shard_tokens}; it may be 1 to {MAX_SHARD_TOKENS}")
    if tokenizer.vocab_size > MAX_TOKEN_ID + 1:
        raise DataError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces; shards hold ids of uint16, "
            f"so it may have up to {MAX_TOKEN_ID + 1}"
        )
    if tokenizer.bos_id < 0:
        raise DataError(f"the tokenizer {tokenizer.path} has no begin-of-document piece; train it with a bos_id")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file, each with its line end."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _text_documents(path: Path, separator: str | None) -> Iterator[Document]:
    lines: list[str] = []
    first = 1
    for number, line in _lines(path):
        if separator is not None and line.rstrip("\r\n") == separator:
            yield Document("".join(lines), f"{path}:{first}")
            lines, first = [], number + 1
        else:
            lines.append(line)
    yield Document("".join(lines), f"{path}:{first}")


def _json_documents(path: Path, field: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: not JSON: {error}") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = f"fields {', '.join(map(repr, record)) or 'none'}" if isinstance(record, dict) else "no object"
            raise DataError(f"{source}: no text in field {field!r} (--field); the line has {found}")
        yield Document(text, source)
