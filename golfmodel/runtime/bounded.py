"""Reading a file that may be anything, and quoting it."""

from __future__ import annotations

import stat
from pathlib import Path

from golfmodel.runtime.errors import GolfError


def read_bounded(path: str | Path, max_bytes: int, what: str, error: type[GolfError]) -> bytes:
    """All of a regular file's bytes.

    Args:
        path: the file.
        max_bytes: the most it may hold.
        what: what the file should be, for the messages; such as "an artifact".
        error: what is raised.

    Raises:
        GolfError: as `error`: missing, not a regular file (a pipe would block), unreadable, growing,
            or above `max_bytes`.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: not a file; expected {what}")
        if status.st_size > max_bytes:
            raise error(f"{path}: {status.st_size:,} bytes; {what} has at most {max_bytes:,}")
        with path.open("rb") as file:
            data = file.read(status.st_size + 1)  # not max_bytes: Python allocates what it is asked for
    except GolfError:
        raise
    except (OSError, ValueError) as cause:
        raise error(f"{path}: cannot read {what}: {getattr(cause, 'strerror', None) or cause}") from cause
    if len(data) > status.st_size:
        raise error(f"{path}: grew beyond {status.st_size:,} bytes while it was read; expected {what}")
    return data


def printable(error: Exception) -> str:
    """What a library says of a file, which may quote it, in one line of 200 characters at most."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(error))[:200]
