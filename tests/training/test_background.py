from __future__ import annotations

import threading

import pytest
import torch
from states import a_state

from golfmodel.config import Config
from golfmodel.runtime.errors import CheckpointError, StorageError
from golfmodel.training import background
from golfmodel.training.background import BackgroundWriter
from golfmodel.training.checkpoint import decode_checkpoint

STATE = a_state(Config(), step=7)
CPU = torch.device("cpu")


@pytest.fixture
def done() -> list:
    """What the writer reported: steps and problems."""
    return []


@pytest.fixture
def writer(done) -> BackgroundWriter:
    return BackgroundWriter(CPU, lambda step, problem: done.append((step, problem)))


def test_writes_what_it_was_given_and_says_so(writer, done, tmp_path):
    writer.start(tmp_path / "it", STATE, {"weight": torch.ones(3)})
    writer.wait_and_insist()
    assert not writer.busy
    assert done == [(7, None)]
    written = decode_checkpoint((tmp_path / "it").read_bytes(), "it")
    assert written.state == STATE
    assert written.tensors["weight"].tolist() == [1, 1, 1]


def test_who_starts_it_goes_on_while_it_writes(writer, done, tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(background, "write_checkpoint", lambda *_: gate.wait(60))
    writer.start(tmp_path / "it", STATE, {})
    assert writer.busy
    assert not done
    gate.set()
    writer.wait()
    assert not writer.busy
    assert len(done) == 1


def test_a_full_disk_is_reported_and_raised_only_where_it_matters(writer, done, tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("No space left on device")

    monkeypatch.setattr(background, "write_checkpoint", full)
    writer.start(tmp_path / "it", STATE, {})
    writer.wait()
    assert [(step, type(problem)) for step, problem in done] == [(7, StorageError)]
    with pytest.raises(StorageError):
        writer.wait_and_insist()
    monkeypatch.undo()
    writer.start(tmp_path / "it", STATE, {"weight": torch.ones(1)})
    writer.wait_and_insist()
    assert done[1] == (7, None)


def test_a_bug_does_not_stay_in_the_thread(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "write_checkpoint", lambda *_: 1 / 0)
    writer.start(tmp_path / "it", STATE, {})
    with pytest.raises(ZeroDivisionError):
        writer.wait()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_no_run_can_go_on_from_is_not_written(writer, done, tmp_path, bad):
    writer.start(
        tmp_path / "it", STATE, {"fine": torch.ones(2), "weight": torch.tensor([1, bad], dtype=torch.bfloat16)}
    )
    with pytest.raises(CheckpointError, match="weight is not finite"):
        writer.wait_and_insist()
    assert list(tmp_path.iterdir()) == []
    assert isinstance(done[0][1], CheckpointError)


@pytest.mark.gpu
def test_from_a_gpu_beside_its_work(writer, tmp_path):
    """The copies are taken as the device comes to them: later steps do not change them, and are not waited for."""
    device = torch.device("cuda")
    writer = BackgroundWriter(torch.device("cuda", torch.cuda.current_device()), lambda *_: None)
    weight = torch.zeros(2**20, device=device)
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(50):
        matrix = (matrix @ matrix).clamp(-1, 1)
    weight += 1
    copy = weight.clone()
    writer.start(tmp_path / "it", STATE, {"weight": copy, "host": torch.ones(2)})
    del copy
    for _ in range(50):
        weight += 1
        torch.empty(2**20, device=device).fill_(-1)  # would take the copy's memory if it were free too early
    writer.wait_and_insist()
    written = decode_checkpoint((tmp_path / "it").read_bytes(), "it").tensors
    assert written["weight"].unique().tolist() == [1.0]
    assert written["host"].tolist() == [1, 1]
