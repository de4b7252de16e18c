"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from golfmodel.runtime import liveness

PLAIN_INTERVAL_SECONDS = 10.0


class Progress:
    """Shows how far a long step has come.

    On a terminal this is a `tqdm` bar. Elsewhere (a log file, a pipe) it is a line when the step ends and at most
    one every `PLAIN_INTERVAL_SECONDS` before. With `enabled=False` (ranks other than 0) it shows nothing.

    Args:
        label: what is being done, such as "scoring".
        total: how many units there are; None when that is not known.
        unit: what is counted, such as "window".
        enabled: whether this process shows anything.
        stream: where to; stderr by default.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        unit: str = "it",
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._done = 0
        self._fields: dict[str, str] = {}
        self._started = self._last_line = time.perf_counter()
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total, desc=label, unit=unit, file=self._stream, dynamic_ncols=True, leave=False)

    def update(self, count: int = 1, **fields: str) -> None:
        """Records `count` more units done and the latest `fields` to show beside them."""
        liveness.sign()
        self._done += count
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update(count)
        elif self._enabled and time.perf_counter() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._print_line()

    def expect(self, total: int) -> None:
        """Corrects how many units there will be."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def write(self, line: str) -> None:
        """Prints a line to stdout without tearing the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            tqdm.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._enabled and kind is None:
            self._print_line()

    def _print_line(self) -> None:
        now = self._last_line = time.perf_counter()
        total = "" if self._total is None else f"/{self._total}"
        fields = "".join(f" {name}:{value}" for name, value in self._fields.items())
        seconds = now - self._started
        print(
            f"{self._label}: {self._done}{total} {self._unit} in {seconds:.1f}s{fields}", file=self._stream, flush=True
        )
