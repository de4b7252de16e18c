"""SIGTERM and SIGINT as a wish to stop that is granted in good time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

PATIENCE_SECONDS = 20.0  # launchers kill after 30
INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Training was stopped by request, with everything saved; no error."""


class StopRequest:
    """Whether someone asked this process to stop, and what follows.

    A thread of its own hears the signals, so that one that arrives while the main thread waits for a GPU or another
    rank is heard too. What follows depends on where the main thread is:

    - within `at_step_ends`: it looks at `requested` after each step and leaves by itself. Should it not get there
      within `PATIENCE_SECONDS`, the process leaves all the same.
    - elsewhere: the process leaves at once, since what there was to save is saved.

    To leave is to call `farewell`, which may tell the other ranks and the user, and to end with the status that it
    gives. A second SIGINT ends the process at once, with status 130.

    Args:
        announce: whether this process says on stderr that it heard.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.requested = ""  # by what
        self.farewell: Callable[[], int] = lambda: 0
        self._announce = announce
        self._heard = False
        self._interrupts = 0
        self._state = threading.Condition()
        self._at_step_ends = False
        self._leaving = False  # the main thread is on its way out,
        self._failed = False  # for a reason of its own
        self._over = False
        self._before: list = []
        self._ears: tuple[socket.socket, socket.socket] | None = None

    def request(self, by: str) -> None:
        """Asks for a stop; `by` says who does, such as a signal's name."""
        with self._state:
            self.requested = self.requested or by
            if self._heard:
                return
            self._heard = True
        if self._announce:
            print(f"{self.requested}: stopping", file=sys.stderr, flush=True)
        threading.Thread(target=self._see_to_it, name="stop", daemon=True).start()

    @contextmanager
    def at_step_ends(self) -> Iterator[None]:
        """While the main thread looks at `requested` itself, and leaves by an exception when it is set."""
        with self._state:
            self._at_step_ends = True
        try:
            yield
        except BaseException as error:
            with self._state:
                self._leaving, self._failed = True, not isinstance(error, Stopped)
            raise
        finally:
            with self._state:
                self._at_step_ends = False
                self._state.notify_all()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            receiver, sender = self._ears = socket.socketpair()
            sender.setblocking(False)
            self._before = [signal.signal(number, self._note) for number in SIGNALS]
            self._before.append(signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
            threading.Thread(target=self._listen, args=(receiver,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._state:
            self._over = True
            self._state.notify_all()
        if self._ears is not None:
            signal.set_wakeup_fd(self._before.pop())
            for number, handler in zip(SIGNALS, self._before, strict=True):
                signal.signal(number, handler)
            self._ears[1].close()

    def _note(self, number: int, _: object) -> None:
        """In the main thread, between two of its operations: the step that it is in is its last. The rest is for the
        thread that listens."""
        self.requested = self.requested or signal.Signals(number).name

    def _listen(self, receiver: socket.socket) -> None:
        with receiver:
            while heard := receiver.recv(1):
                if heard[0] == signal.SIGINT:
                    self._interrupts += 1
                    if self._interrupts > 1:
                        _end(INTERRUPTED)
                if heard[0] in SIGNALS:
                    self.request(signal.Signals(heard[0]).name)

    def _see_to_it(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._state:
            while (self._at_step_ends or self._leaving) and not self._over:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._state.wait(left)
            if self._over:
                return
        status = self.farewell()
        _end(1 if self._failed else status)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
