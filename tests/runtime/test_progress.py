from __future__ import annotations

import io
import re

import pytest

from golfmodel.runtime import progress
from golfmodel.runtime.progress import PLAIN_INTERVAL_SECONDS, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, as its only element."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_plain_lines_at_intervals_and_at_the_end(clock):
    stream = io.StringIO()
    with Progress("scoring", 10, unit="windows", stream=stream) as bar:
        for _ in range(10):
            clock[0] += 0.4 * PLAIN_INTERVAL_SECONDS
            bar.update(1, loss="1.5")
    # 4 seconds an update, at least 10 between two lines: after every third, and at the end.
    assert stream.getvalue().splitlines() == [
        "scoring: 3/10 windows in 12.0s loss:1.5",
        "scoring: 6/10 windows in 24.0s loss:1.5",
        "scoring: 9/10 windows in 36.0s loss:1.5",
        "scoring: 10/10 windows in 40.0s loss:1.5",
    ]


def test_latest_fields_are_kept(clock):
    stream = io.StringIO()
    with Progress("training", None, unit="steps", stream=stream) as bar:
        bar.update(1, loss="3.0", left="9s")
        bar.update(0, loss="2.0")
        clock[0] += 1.5
    assert stream.getvalue() == "training: 1 steps in 1.5s loss:2.0 left:9s\n"


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress("warm-up", 4, unit="steps", stream=stream) as bar:
        for _ in range(4):
            bar.update(1, loss="1.5")
        bar._bar.refresh()
    shown = stream.getvalue()
    assert "\r" in shown
    assert "warm-up: 100%" in shown
    assert "4/4" in shown
    assert "loss=1.5" in shown
    assert re.fullmatch(r"warm-up: 4/4 steps in \d+\.\ds loss:1\.5", shown.splitlines()[-1].split("\r")[-1])


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_other_ranks_show_nothing(kind, capsys):
    stream = kind()
    with Progress("scoring", 2, enabled=False, stream=stream) as bar:
        bar.update()
        bar.write("a line")
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_lines_between_go_to_stdout(kind, capsys):
    stream = kind()
    with Progress("training", 2, stream=stream) as bar:
        bar.write("step:1 train_loss:6.9")
    assert capsys.readouterr().out == "step:1 train_loss:6.9\n"
    assert "train_loss" not in stream.getvalue()


def test_a_step_that_fails_does_not_claim_to_have_ended():
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("scoring", 2, stream=stream) as bar:
        bar.update()
        raise ZeroDivisionError
    assert stream.getvalue() == ""


def test_stderr_is_the_default(capsys):
    with Progress("scoring", 1) as bar:
        bar.update()
    printed = capsys.readouterr()
    assert printed.err.startswith("scoring: 1/1 it in ")
    assert printed.out == ""
