"""The damage itself: enough of it, the same in every run, and of every kind of file that is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutations import MUTANTS, mutants, refused_or_right

from golfmodel.runtime.errors import ArtifactError, DataError

TESTS = Path(__file__).resolve().parent


def test_a_run_of_the_suite_reads_at_least_20_000_of_them() -> None:
    assert sum(MUTANTS.values()) >= 20_000
    used = [
        kind
        for path in TESTS.rglob("test_*.py")
        if path.name != Path(__file__).name
        for kind in re.findall(r"(?:mutants|draws)\(\s*\"([^\"]+)\"", path.read_text(encoding="utf-8"))
    ]
    assert sorted(used) == sorted(MUTANTS), "each kind is read by one test"


def test_mutants_are_as_many_as_promised_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MUTANTS, "some", 500)
    original = bytes(range(200))
    found = list(mutants("some", original))
    assert len(found) == 500
    assert found == list(mutants("some", original))
    assert len({*found} - {original}) > 450
    assert list(mutants("some", b"")), "an empty file has mutants, too"


def test_only_the_named_error_in_one_line_or_the_right_result_passes() -> None:
    def fail(error: Exception) -> int:
        raise error

    def outcome(read: object) -> bool:
        return refused_or_right(read, lambda result: result == 3, DataError, "file")

    assert outcome(lambda: 3)
    assert not outcome(lambda: fail(DataError("file: damaged")))
    for message in ("who?", "file:\ntwo lines", "file: \x1b[2J", "file" * 1000):
        with pytest.raises(AssertionError):
            outcome(lambda message=message: fail(DataError(message)))
    with pytest.raises(AssertionError):
        outcome(lambda: 4)
    for error in (ArtifactError("file"), ValueError("file"), MemoryError()):
        with pytest.raises(type(error)):
            outcome(lambda error=error: fail(error))
