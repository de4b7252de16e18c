"""One directory per run: `runs/<RUN_ID>/`, its event log and its files."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from golfmodel.runtime.errors import StorageError
from golfmodel.runtime.files import remove_temporaries

LOG_NAME = "log.jsonl"


def new_run_id() -> str:
    """A name that sorts by time and does not repeat: `20261124-034336-9f3a`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunLog:
    """Appends events to `<directory>/log.jsonl`, one JSON object a line, flushed as they come.

    Ranks other than 0 pass `enabled=False`: nothing is made or written. While the log is open no other process can
    open it (where the file system knows locks), and what a killed writer left half-written in the directory is gone.

    Args:
        directory: of the run.
        enabled: whether anything is written.
        resume: whether to go on with the log of a run that has begun.

    Raises:
        StorageError: the directory exists and holds a run already, or another process is at it, or it cannot be
            written.
    """

    def __init__(self, directory: str | Path, *, enabled: bool = True, resume: bool = False) -> None:
        self.directory = Path(directory)
        self.path = self.directory / LOG_NAME
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        self._started = time.time()
        if not enabled:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # A run that failed before its first event left an empty log, which its next try may take over.
            started = self.path.exists() and self.path.stat().st_size > 0
            self._file = None if started and not resume else self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"cannot write in the run directory {self.directory} (RUNS_DIR, RUN_ID): {error.strerror}"
            ) from error
        if self._file is None:
            raise StorageError(
                f"{self.directory} already holds a run: choose another RUN_ID, move it away or go on with it (--resume)"
            )
        if not _locked(self._file):
            self._file.close()
            raise StorageError(f"another process is at work on {self.directory}: wait for it, or choose another RUN_ID")
        if resume and _is_cut_off(self.path):
            self._file.write("\n")
        remove_temporaries(self.directory)

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one event: its kind, the seconds since the log was opened, and `fields`."""
        if self._file is None:
            return
        line = json.dumps({"event": kind, "seconds": round(time.time() - self._started, 3), **fields})
        try:
            with self._lock:  # the thread that writes checkpoints has events too
                self._file.write(line + "\n")
                self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Flushes the log to disk and closes it."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_at_work(directory: str | Path) -> bool:
    """Whether a process has the log of the run in `directory` open."""
    try:
        with (Path(directory) / LOG_NAME).open(encoding="utf-8") as file:
            return not _locked(file)
    except OSError:
        return False


def _locked(file: TextIO) -> bool:
    """Locks a log for as long as it is open, against everyone else; False where someone else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # not every file system has locks
        return True
    return True


def _is_cut_off(path: Path) -> bool:
    """Whether the last line has no end, as after a crash."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) not in (b"", b"\n")


def read_events(path: str | Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a log, all or those of one kind; what is no event, as a line that was cut off, is passed over."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and (kind is None or event.get("event") == kind):
                yield event
