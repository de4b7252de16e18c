"""One directory per run: `runs/<RUN_ID>/`, its event log and its files."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from golfmodel.runtime.errors import StorageError


def new_run_id() -> str:
    """A name that sorts by time and does not repeat: `20261124-034336-9f3a`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunLog:
    """Appends events to `<directory>/log.jsonl`, one JSON object a line, flushed as they come.

    Ranks other than 0 pass `enabled=False`: nothing is made or written.

    Raises:
        StorageError: the directory exists and holds a run already, or cannot be written.
    """

    def __init__(self, directory: str | Path, *, enabled: bool = True) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "log.jsonl"
        self._file: TextIO | None = None
        self._started = time.time()
        if not enabled:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # A run that failed before its first event left an empty log, which its next try may take over.
            started = self.path.exists() and self.path.stat().st_size > 0
            self._file = None if started else self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"cannot write in the run directory {self.directory} (RUNS_DIR, RUN_ID): {error.strerror}"
            ) from error
        if started:
            raise StorageError(f"{self.directory} already holds a run: choose another RUN_ID or move it away")

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one event: its kind, the seconds since the log began, and `fields`."""
        if self._file is None:
            return
        line = json.dumps({"event": kind, "seconds": round(time.time() - self._started, 3), **fields})
        try:
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


def read_events(path: str | Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a log, all or those of one kind; a line that was cut off is passed over."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if kind is None or event.get("event") == kind:
                yield event
