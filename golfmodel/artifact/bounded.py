"""Reading a file that may be anything."""

from __future__ import annotations

import stat
from pathlib import Path

from golfmodel.runtime.errors import ArtifactError


def read_bounded(path: str | Path, max_bytes: int, what: str) -> bytes:
    """All of a regular file's bytes.

    Args:
        path: the file.
        max_bytes: the most it may hold.
        what: what the file should be, for the messages; such as "an artifact".

    Raises:
        ArtifactError: missing, not a regular file (a pipe would block), unreadable, or above `max_bytes`.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path}: not a file; expected {what}")
        if status.st_size > max_bytes:
            raise ArtifactError(f"{path}: {status.st_size:,} bytes; {what} has at most {max_bytes:,}")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: cannot read {what}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > max_bytes:
        raise ArtifactError(f"{path}: grew beyond {max_bytes:,} bytes while it was read; expected {what}")
    return data
