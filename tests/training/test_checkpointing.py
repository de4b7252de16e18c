from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from states import a_state

from golfmodel.config import Config
from golfmodel.runtime.errors import StorageError
from golfmodel.runtime.runlog import RunLog, read_events
from golfmodel.training import background
from golfmodel.training.checkpointing import Checkpoints, checkpoint_path, checkpoints_in

BY_TIME = Config(checkpoint_seconds=10.0)
BY_STEPS = Config(checkpoint_seconds=0.0, checkpoint_every=5)


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path) as log:
        yield log


def checkpoints(config: Config, log: RunLog, **start) -> Checkpoints:
    return Checkpoints(config, log, torch.device("cpu"), a_state(config, **start))


def write(each: Checkpoints, step: int, seconds: float = 0.0, **changes) -> None:
    state = dataclasses.replace(each.start, step=step, train_seconds=seconds)
    each.write(state, {"weight": torch.full((2,), float(step))} | changes, held_seconds=0.0)
    each.wait()


def steps_in(directory) -> list[str]:
    return [path.name for path in checkpoints_in(directory)]


def test_due_by_training_time_since_the_last_or_the_start(log):
    each = checkpoints(BY_TIME, log, step=3, train_seconds=100.0)
    assert [each.due(4, seconds) for seconds in (100.0, 109.9, 110.0)] == [False, False, True]
    write(each, 4, 112.5)
    assert [each.due(5, seconds) for seconds in (122.4, 122.5)] == [False, True]


def test_due_by_steps_wherever_the_last_was(log):
    each = checkpoints(BY_STEPS, log, step=3)
    assert [step for step in range(3, 8) if each.due(step, 1e6)] == [5, 6, 7], (
        "5 may have been missed for a busy writer"
    )
    write(each, 6)
    assert [step for step in range(6, 12) if each.due(step, 1e6)] == [10, 11]


def test_none_by_either(log):
    each = checkpoints(Config(checkpoint_seconds=0.0), log)
    assert not each.wanted
    assert not each.due(10**6, 1e6)
    assert checkpoints(BY_TIME, log).wanted
    assert checkpoints(BY_STEPS, log).wanted


def test_not_while_another_is_written(log, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(background, "write_checkpoint", lambda *_: gate.wait(60))
    each = checkpoints(BY_STEPS, log)
    each.write(dataclasses.replace(each.start, step=5), {}, held_seconds=0.0)
    assert not each.due(10, 0.0)
    gate.set()
    each.wait()
    assert each.due(10, 0.0)


def test_the_newest_are_kept_and_the_newest_comes_first(log, tmp_path):
    each = checkpoints(dataclasses.replace(BY_STEPS, checkpoints_kept=2), log)
    for step in (5, 10, 123_456_789):
        write(each, step)
    assert steps_in(tmp_path) == ["step-123456789.safetensors", "step-00000010.safetensors"]


def test_older_ones_stay_while_the_new_one_is_not_there(log, tmp_path, monkeypatch, capsys):
    each = checkpoints(dataclasses.replace(BY_STEPS, checkpoints_kept=1), log)
    write(each, 5)

    def full(*_):
        raise StorageError("cannot write it: No space left on device")

    monkeypatch.setattr(background, "write_checkpoint", full)
    write(each, 10)
    assert steps_in(tmp_path) == ["step-00000005.safetensors"]
    assert "warning: no checkpoint of step 10: cannot write it: No space left" in capsys.readouterr().err
    with pytest.raises(StorageError):
        each.wait(insist=True)
    events = list(read_events(log.path, "checkpoint"))
    assert [(event["step"], event["problem"] is None) for event in events] == [(5, True), (10, False)]


def test_later_ones_of_another_way_go_when_the_new_one_is_there(log, tmp_path):
    each = checkpoints(BY_STEPS, log)
    for step in (5, 10, 15):
        write(each, step)
    again = checkpoints(BY_STEPS, log, step=10)
    write(again, 12)
    assert steps_in(tmp_path) == ["step-00000012.safetensors", "step-00000010.safetensors"]


def test_other_files_are_no_checkpoints(tmp_path):
    assert checkpoints_in(tmp_path) == []
    path = checkpoint_path(tmp_path, 3)
    path.parent.mkdir()
    for name in (path.name, ".step-00000004.safetensors.x.tmp", "step-5.safetensors", "notes.txt"):
        (path.parent / name).write_bytes(b"")
    assert checkpoints_in(tmp_path) == [path]
