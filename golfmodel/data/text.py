"""The validation text: its tokens and how many bytes each target stands for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golfmodel.data.shards import check_token_ids, find_shards, open_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.errors import DataError

_CHUNK = 1 << 22  # targets measured at a time, which bounds the temporaries


@dataclass(frozen=True)
class ValidationText:
    """All validation shards as one text of N + 1 tokens, which makes N targets.

    Attributes:
        tokens: uint16 `[N + 1]`.
        target_bytes: int32 `[N]`; bytes of target i, which is `tokens[i + 1]`, given `tokens[i]`.
        digest: SHA-256 of the tokens as little-endian uint16, in hexadecimal.
    """

    tokens: np.ndarray
    target_bytes: np.ndarray
    digest: str

    @property
    def num_targets(self) -> int:
        """How many targets there are, N."""
        return len(self.target_bytes)


def load_validation_text(directory: str | Path, tokenizer: Tokenizer) -> ValidationText:
    """Reads every validation shard in `directory`, in the order of their names.

    Raises:
        DataError: shards are missing or damaged, have an id outside the tokenizer's vocabulary, or hold fewer
            than two tokens together.
    """
    parts: list[np.ndarray] = []
    for path in find_shards(directory, "val"):
        part = open_shard(path)
        check_token_ids(part, tokenizer.vocab_size, f"shard {path}")
        parts.append(part)
    tokens = np.concatenate(parts)
    if len(tokens) < 2:
        raise DataError(f"the validation shards in {directory} hold {len(tokens)} tokens; a target takes at least 2")
    target_bytes = np.empty(len(tokens) - 1, dtype=np.int32)
    for start in range(0, len(target_bytes), _CHUNK):
        window = tokens[start : start + _CHUNK + 1]
        target_bytes[start : start + _CHUNK] = tokenizer.target_bytes(window[:-1], window[1:])
    digest = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2").data).hexdigest()
    return ValidationText(tokens=tokens, target_bytes=target_bytes, digest=digest)
