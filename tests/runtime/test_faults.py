from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from golfmodel.runtime import faults
from golfmodel.runtime.errors import ConfigError
from golfmodel.runtime.versions import PROJECT_ROOT


@pytest.fixture
def plan(monkeypatch):
    """Plans faults for this process."""

    def make(text: str, **environment: str) -> None:
        monkeypatch.setattr(faults, "_PLAN", faults.planned({"GOLF_FAULTS": text, **environment}))

    return make


def test_nothing_happens_without_a_plan():
    assert faults._PLAN == []
    assert faults.reach("step") is False


def test_an_error_comes_the_nth_time_and_once(plan):
    plan("full@write-model.golf:2,error@read")
    faults.reach("write-model.golf")
    faults.reach("write-other")
    with pytest.raises(OSError, match="No space left") as caught:
        faults.reach("write-model.golf")
    assert caught.value.errno == errno.ENOSPC
    faults.reach("write-model.golf")
    with pytest.raises(OSError, match="Input/output error"):
        faults.reach("read")


def test_a_pattern_and_every_time(plan):
    plan("nan@write-step-*:*")
    assert [faults.reach(point) for point in ("write-step-1", "write-steps", "write-step-2")] == [True, False, True]


def test_slow_takes_its_time(plan, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    plan("slow@read")
    assert not faults.reach("read")
    assert slept == [faults.SLOW_SECONDS]


def test_faults_are_of_one_rank_and_of_the_first_try(plan):
    plan("nan@gradient/1", RANK="0")
    assert not faults.reach("gradient")
    plan("nan@gradient/1", RANK="1")
    assert faults.reach("gradient")
    plan("nan@gradient/1", RANK="1", TORCHELASTIC_RESTART_COUNT="1")
    assert not faults.reach("gradient")


def test_all_ranks_know_what_is_planned_on_any(plan):
    for rank in ("0", "1"):
        plan("nan@grad*/1,kill@step/0", RANK=rank)
        assert [faults.are_planned(point) for point in ("gradient", "step", "read")] == [True, True, False]
    plan("nan@gradient/1", RANK="0", TORCHELASTIC_RESTART_COUNT="1")
    assert not faults.are_planned("gradient")


@pytest.mark.parametrize("text", ["kill", "kill@", "explode@step", "kill@step:x", "kill@step:1/x"])
def test_what_is_no_fault_is_refused(plan, text):
    with pytest.raises(ConfigError, match="GOLF_FAULTS has"):
        plan(text)


def test_a_process_plans_by_its_environment_and_dies_of_it():
    result = subprocess.run(
        [sys.executable, "-c", "from golfmodel.runtime import faults\nwhile True: faults.reach('step')"],
        env={**os.environ, "GOLF_FAULTS": "kill@step:3"},
        cwd=PROJECT_ROOT,
        timeout=60,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
