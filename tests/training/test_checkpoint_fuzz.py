"""No bytes, however they came about, crash the reader of checkpoints or give it another run."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from mutations import mutants, refused_or_right
from states import a_state

from golfmodel.config import Config
from golfmodel.runtime.errors import CheckpointError
from golfmodel.training import checkpoint as module
from golfmodel.training.checkpoint import Checkpoint, decode_checkpoint, write_checkpoint

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
STATE = a_state(Config(), step=300, train_seconds=28.5, batches={"position": 12}, last_logged=(200, 19.25))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "step-00000300.safetensors"
    write_checkpoint(path, Checkpoint(STATE, TENSORS))
    return path.read_bytes()


def is_right(found: Checkpoint) -> bool:
    same = found.tensors.keys() == TENSORS.keys() and found.state == STATE
    return same and all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_damaged_file_is_refused_or_harmless(data: bytes) -> None:
    accepted = sum(
        refused_or_right(lambda mutant=mutant: decode_checkpoint(mutant, "it"), is_right, CheckpointError, "it")
        for mutant in mutants("checkpoint file", data)
    )
    assert accepted < 100


def test_a_signed_state_is_refused_or_possible(data: bytes) -> None:
    """The state damaged and the digest right: what is taken is a state that a run could have."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    del header["digest"]

    def is_possible(found: Checkpoint) -> bool:
        state = found.state
        return 0 <= state.step <= module.MAX_STEP and 0 <= state.train_seconds < float("inf") and state.world_size > 0

    accepted = 0
    for mutant in mutants("checkpoint state", header["state"].encode()):
        metadata = {**header, "state": mutant.decode(errors="replace")}
        metadata["digest"] = module._digest(metadata, TENSORS)
        forged = safetensors.torch.save(TENSORS, metadata)
        accepted += refused_or_right(
            lambda forged=forged: decode_checkpoint(forged, "it"), is_possible, CheckpointError, "it"
        )
    assert 0 < accepted < 1000
