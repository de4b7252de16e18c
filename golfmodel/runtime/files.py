"""Files that are either whole or absent: write to a temporary name, flush to disk, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from golfmodel.runtime import faults
from golfmodel.runtime.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"

# Asking for the mask sets it for a moment, so it is done once, before there are threads that make files.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `path` only once everything is on disk.

    On any failure (a full disk, an exception in the body) the temporary file is removed and
    whatever `path` held before stays as it was.

    Raises:
        StorageError: the file cannot be created, written or renamed; names the path and the cause.
    """
    with _whole_or_absent(Path(path)) as (handle, _), os.fdopen(handle, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields the name of an empty file to write to, which becomes `path` as `atomic_writer`'s does.

    For libraries that open their files themselves.

    Raises:
        StorageError: as `atomic_writer`'s.
    """
    with _whole_or_absent(Path(path)) as (handle, temporary):
        os.close(handle)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[tuple[int, Path]]:
    """Yields a temporary file, open and by name; it becomes `path` if the body does not fail and goes if it does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield handle, temporary
        faults.reach(f"write-{path.name}")
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files private; a result is not
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


def remove_temporaries(directory: str | Path) -> None:
    """Removes the temporary files that a killed writer left below `directory`; nobody may be writing there."""
    for path in Path(directory).rglob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):
            path.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` to `path` atomically as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable; not every file system can, and the data itself is already on disk."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
