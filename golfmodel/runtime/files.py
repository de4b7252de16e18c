"""Files that are either whole or absent: write to a temporary name, flush to disk, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from golfmodel.runtime.errors import StorageError


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `path` only once everything is on disk.

    On any failure (a full disk, an exception in the body) the temporary file is removed and
    whatever `path` held before stays as it was.

    Raises:
        StorageError: the file cannot be created, written or renamed; names the path and the cause.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private; a result is not
        temporary.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}; the file it would replace is unchanged"
            ) from error
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` to `path` atomically as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable; not every file system can, and the data itself is already on disk."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
