"""Processes that are asked to stop, each a few lines that say where they are and how they left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from golfmodel.runtime import stopping
from golfmodel.runtime.stopping import Stopped, StopRequest
from golfmodel.runtime.versions import PROJECT_ROOT

AT_STEP_ENDS = """
import time
from golfmodel.runtime.stopping import Stopped, StopRequest
with StopRequest() as stop:
    try:
        with stop.at_step_ends():
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
            raise Stopped("here")
    except Stopped as stopped:
        print("stopped", stopped, stop.requested)
"""

STUCK = """
import threading
from golfmodel.runtime import stopping
stopping.PATIENCE_SECONDS = {patience}
with stopping.StopRequest() as stop:
    stop.farewell = lambda: print("farewell") or 0
    with stop.at_step_ends():
        print("ready", flush=True)
        threading.Event().wait()
"""

ELSEWHERE = """
import threading
from golfmodel.runtime.stopping import StopRequest
with StopRequest() as stop:
    stop.farewell = lambda: print("farewell") or 7
    print("ready", flush=True)
    threading.Event().wait()
"""

FAILING = """
import time
from golfmodel.runtime import stopping
stopping.PATIENCE_SECONDS = 0.1
with stopping.StopRequest() as stop:
    try:
        with stop.at_step_ends():
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
            raise ValueError("a failure of its own")
    finally:
        time.sleep(60)
"""


@contextmanager
def started(program: str):
    """The program's process, once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_that_looks_leaves_by_itself(number):
    with started(AT_STEP_ENDS) as process:
        process.send_signal(number)
        status, out, err = ended(process)
    assert (status, out) == (0, f"stopped here {number.name}\n")
    assert err in ("", f"{number.name}: stopping\n"), "said by another thread, which may come too late"


def test_a_second_interrupt_ends_at_once():
    with started(STUCK.format(patience=1000)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "SIGINT: stopping\n"
        process.send_signal(signal.SIGINT)
        assert ended(process)[:2] == (130, "")


def test_a_second_sigterm_does_not():
    with started(STUCK.format(patience=0.5)) as process:
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        assert ended(process)[:2] == (0, "farewell\n")


def test_a_loop_that_does_not_come_round_is_left():
    with started(STUCK.format(patience=0.1)) as process:
        process.send_signal(signal.SIGTERM)
        assert ended(process)[:2] == (0, "farewell\n")


def test_elsewhere_the_process_leaves_at_once_with_the_status_of_its_farewell():
    with started(ELSEWHERE) as process:
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (7, "farewell\n", "SIGTERM: stopping\n")


def test_a_failure_stays_one_though_a_stop_was_asked_for():
    with started(FAILING) as process:
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 1


def test_everything_is_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest(announce=False):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_one_that_is_heard_and_granted_does_not_end_the_process_later(monkeypatch):
    ended: list[int] = []
    seen_to = threading.Event()
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(stopping, "_end", ended.append)
    stop = StopRequest(announce=False)
    see_to_it = stop._see_to_it
    monkeypatch.setattr(stop, "_see_to_it", lambda: (see_to_it(), seen_to.set()))
    with suppress(Stopped), stop, stop.at_step_ends():
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.requested:
            time.sleep(0.001)
        raise Stopped
    assert stop.requested == "SIGTERM"
    assert seen_to.wait(60)
    assert ended == []
