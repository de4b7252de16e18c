"""The checkpoint file: what comes back is what went in, and anything else is a `CheckpointError`."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch

from golfmodel.runtime.errors import CheckpointError, StorageError
from golfmodel.training.checkpoint import (
    Checkpoint,
    RunState,
    decode_checkpoint,
    read_checkpoint_bytes,
    write_checkpoint,
)

STATE = RunState(
    step=300,
    train_seconds=28.7,
    slowest_step=0.1,
    ended=False,
    last_logged=(200, 19.25),
    averaged_copies=2,
    batches={"order": "in_order", "position": 12},
    resumed_at=(100, 200),
    world_size=2,
    config={"num_layers": 8, "data_path": "ü"},
    inputs={"tokenizer": "a" * 64},
    code="0" * 64,
)
TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "random": torch.arange(256, dtype=torch.uint8),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step-00000300.safetensors"
    write_checkpoint(path, Checkpoint(STATE, TENSORS))
    return path


def forged(path, *, state=None, **metadata) -> bytes:
    """The file with another state or metadata, its digest as it was."""
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_size])["__metadata__"]
    changed = {**header, **metadata}
    if state is not None:
        changed["state"] = json.dumps({**json.loads(header["state"]), **state})
    return safetensors.torch.save(TENSORS, {key: value for key, value in changed.items() if value is not None})


def test_everything_comes_back(path):
    checkpoint = decode_checkpoint(path.read_bytes(), "it")
    assert checkpoint.state == STATE
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensors[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
        assert checkpoint.tensors[name].shape == tensor.shape
    assert [other for other in path.parent.iterdir() if other != path] == []


def test_cut_short_at_any_byte(path):
    data = path.read_bytes()
    for size in range(len(data)):
        with pytest.raises(CheckpointError, match=r"^it: "):
            decode_checkpoint(data[:size], "it")


def test_any_byte_changed_in_any_way_of_eight(path):
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    whole = decode_checkpoint(bytes(data), "it")
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        try:
            found = decode_checkpoint(bytes(data), "it")
            # Only where JSON means the same as before: spaces, or a letter of an escape.
            assert place < header
            assert found.state == whole.state
        except CheckpointError:
            pass
        data[place] ^= 1 << place % 8


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": True},
        {"step": 10**12},
        {"step": "300"},
        {"train_seconds": 1},
        {"train_seconds": -0.5},
        {"ended": 0},
        {"last_logged": [1]},
        {"last_logged": [301, 1.0]},
        {"last_logged": [300, 28.8]},
        {"averaged_copies": 1.0},
        {"batches": []},
        {"resumed_at": [None]},
        {"world_size": 0},
        {"config": None},
        {"inputs": {"tokenizer": "../../etc/passwd"}},
        {"code": ""},
        {"extra": 1},
    ],
)
def test_a_state_that_cannot_be(path, monkeypatch, change):
    monkeypatch.setattr("golfmodel.training.checkpoint._digest", lambda metadata, tensors: metadata.get("digest"))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        decode_checkpoint(forged(path, state=change), "it")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": "golfmodel-artifact"}, "format 'golfmodel-artifact'"),
        ({"version": "2"}, "version '2'"),
        ({"more": "x"}, "more"),
        ({"digest": None}, "digest"),
        ({"state": {"step": 301}}, "digest does not match"),
    ],
)
def test_another_format_and_a_state_that_was_touched(path, change, what):
    with pytest.raises(CheckpointError, match=what):
        decode_checkpoint(forged(path, **change), "it")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"golf",
        b"\xff" * 100,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (10_000).to_bytes(8, "little") + b"[" * 10_000,
        (4).to_bytes(8, "little") + b"NaN ",
    ],
)
def test_what_is_no_checkpoint_at_all(data):
    with pytest.raises(CheckpointError, match=r"^it: "):
        decode_checkpoint(data, "it")


def test_a_tensor_that_claims_gigabytes_takes_none(path):
    described = {"__metadata__": {"format": "golfmodel-checkpoint", "version": "1", "state": "{}", "digest": "0" * 64}}
    described["weight"] = {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}
    header = json.dumps(described).encode()
    with pytest.raises(CheckpointError, match="damaged safetensors content"):
        decode_checkpoint(len(header).to_bytes(8, "little") + header + b"few", "it")


def test_reading_stops_at_what_is_no_file_and_at_the_limit(path, tmp_path):
    assert read_checkpoint_bytes(path, 2**20) == path.read_bytes()
    with pytest.raises(CheckpointError, match="at most 100"):
        read_checkpoint_bytes(path, 100)
    with pytest.raises(CheckpointError, match="No such file"):
        read_checkpoint_bytes(tmp_path / "absent", 2**20)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="not a file"):
            read_checkpoint_bytes(other, 2**20)


def test_a_disk_that_fills_up_leaves_the_file_that_was_there(path):
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:

        def full(_tensors, name, _metadata):
            name.write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(StorageError, match="No space left"):
            write_checkpoint(path, Checkpoint(dataclasses.replace(STATE, step=301), TENSORS))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
