"""A SentencePiece model: text to token ids and back, and how many bytes of text each token stands for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from golfmodel.data.model_proto import check_model
from golfmodel.runtime.bounded import printable, read_bounded
from golfmodel.runtime.errors import DataError

SPACE = "▁"  # how SentencePiece writes a space inside a piece

# Shards hold at most 65,536 ids, which a vocabulary of 256,000 pieces (4.2 MB) exceeds fourfold. SentencePiece takes up
# to 50 bytes of memory for each of the file's.
MAX_MODEL_BYTES = 8 * 2**20

# Older ones end the process on a piece that is empty or long, and on a normalizer's table that points outside itself.
_OLDEST_SOUND_LIBRARY = (0, 2, 2)


class Tokenizer:
    """A SentencePiece model read from a file.

    Attributes:
        path: the file.
        vocab_size: the number of pieces; ids are 0 to vocab_size - 1.
        bos_id: the id that begins a document; -1 if the model has none.
        digest: SHA-256 of the file, in hexadecimal.

    Args:
        path: a SentencePiece `.model` file.
        vocab_size: the vocabulary the model must have; None for any.

    Raises:
        DataError: the file is missing, too large or damaged, is not a SentencePiece model, or has another
            vocabulary size; or the installed SentencePiece is one that damaged models crash.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        self.path = Path(path)
        try:
            serialized = read_bounded(path, MAX_MODEL_BYTES, "a tokenizer", DataError)
        except DataError as error:
            raise DataError(
                f"{error}; TOKENIZER_PATH names a SentencePiece model, such as `python -m golfmodel.data demo` or "
                "`download` makes"
            ) from error
        self.digest = hashlib.sha256(serialized).hexdigest()
        _require_sound_library()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            check_model(serialized)
            self._processor.LoadFromSerializedProto(serialized)
            self.vocab_size = int(self._processor.vocab_size())
            self.bos_id = int(self._processor.bos_id())
            self._bytes_V, self._leading_space_V, self._hides_space_V = self._tables()
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise DataError(
                f"{path} (TOKENIZER_PATH) is not a SentencePiece model, or is damaged: {printable(error)}"
            ) from error
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise DataError(
                f"the tokenizer {path} (TOKENIZER_PATH) has a vocabulary of {self.vocab_size}, but VOCAB_SIZE "
                f"is {vocab_size}; set VOCAB_SIZE={self.vocab_size} or name another tokenizer"
            )

    def require(self, digest: str, made: str) -> None:
        """Refuses to go on with another tokenizer than the one of SHA-256 `digest`, with which `made` was made.

        Raises:
            DataError: this is another one.
        """
        if self.digest != digest:
            raise DataError(
                f"the tokenizer {self.path} (TOKENIZER_PATH) has SHA-256 {self.digest}, "
                f"but {made} was made with {digest}"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without a begin-of-document id.

        Raises:
            DataError: the model has no ids for it, or it is not valid Unicode.
        """
        try:
            return self._processor.encode(text)
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"the tokenizer {self.path} (TOKENIZER_PATH) cannot encode a text: {printable(error)}"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control pieces vanish, and so does the space SentencePiece puts before a text.

        Raises:
            DataError: the model makes something of them that is not UTF-8.
        """
        try:
            return self._processor.decode([int(token) for token in ids])
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"the tokenizer {self.path} (TOKENIZER_PATH) makes no text of ids: {printable(error)}"
            ) from error

    def target_bytes(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """How many bytes of text each target token stands for, given the token before it.

        A piece counts its UTF-8 bytes, a space (written "▁") as one; a byte piece counts 1; control, unknown
        and unused pieces count 0. A leading space is not counted after a control, unknown or unused piece:
        there it is the one SentencePiece puts before a text.

        Args:
            previous: integer ids, any shape.
            target: integer ids, the same shape.

        Returns:
            int64 byte counts, the same shape.
        """
        leading_space = self._leading_space_V[target] & ~self._hides_space_V[previous]
        return self._bytes_V[target] + leading_space

    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per id: bytes without a leading space, whether it has one, whether it hides the next token's."""
        processor = self._processor
        bytes_V = np.zeros(self.vocab_size, dtype=np.int64)
        leading_space_V = np.zeros(self.vocab_size, dtype=bool)
        hides_space_V = np.zeros(self.vocab_size, dtype=bool)
        for token in range(self.vocab_size):
            piece = processor.id_to_piece(token)
            if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
                hides_space_V[token] = True
            elif processor.is_byte(token):
                bytes_V[token] = 1
            else:
                leading_space_V[token] = piece.startswith(SPACE)
                bytes_V[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        return bytes_V, leading_space_V, hides_space_V


def _require_sound_library() -> None:
    version = sentencepiece.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _OLDEST_SOUND_LIBRARY:
        oldest = ".".join(map(str, _OLDEST_SOUND_LIBRARY))
        raise DataError(
            f"sentencepiece {version} is installed, which a damaged tokenizer crashes; it must be {oldest} or newer: "
            f"pip install 'sentencepiece>={oldest}'"
        )
