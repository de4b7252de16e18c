"""The checkpoint file: everything that a training run needs to go on, as one safetensors file.

The safetensors metadata holds the format's name and version, the `RunState` as JSON, and a SHA-256 digest over all of
it, the tensors' names, dtypes and shapes, and their bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from golfmodel.runtime.bounded import printable, read_bounded
from golfmodel.runtime.errors import CheckpointError
from golfmodel.runtime.files import atomic_path
from golfmodel.runtime.metadata import Format, checked_metadata, json_object

FORMAT = Format(
    what="a checkpoint",
    name="golfmodel-checkpoint",
    version="1",
    entries={"format", "version", "state", "digest"},
    max_header_bytes=16 * 2**20,
    error=CheckpointError,
)
MAX_STEP = 10**9


@dataclass(frozen=True)
class RunState:
    """The numbers and words of a checkpoint.

    Attributes:
        step: steps taken.
        train_seconds: training time used, over all processes that worked on the run.
        slowest_step: seconds of the slowest recent step, from which the clock forecasts the next.
        ended: whether training was over, so that averaging is next.
        last_logged: step and training time of the last logged step.
        averaged_copies: how many copies the weight average holds.
        batches: the loader's position.
        resumed_at: the steps at which the run was taken up again.
        world_size: how many ranks there were.
        config: every option by field name.
        inputs: digests of the files that the run reads, by what they are.
        code: digest of the project's sources.
    """

    step: int
    train_seconds: float
    slowest_step: float
    ended: bool
    last_logged: tuple[int, float]
    averaged_copies: int
    batches: dict[str, Any]
    resumed_at: tuple[int, ...]
    world_size: int
    config: dict[str, Any]
    inputs: dict[str, str]
    code: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the file holds: the state, and tensors by name, on the host."""

    state: RunState
    tensors: dict[str, Tensor]


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `path` atomically.

    Other threads run meanwhile: neither hashing nor writing holds Python's lock.

    Raises:
        StorageError: the file cannot be written; an earlier file stays whole.
    """
    metadata = {
        "format": FORMAT.name,
        "version": FORMAT.version,
        "state": json.dumps(dataclasses.asdict(checkpoint.state), sort_keys=True, allow_nan=False),
    }
    metadata["digest"] = _digest(metadata, checkpoint.tensors)
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(checkpoint.tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # how the library words an OSError
            raise OSError(str(error)) from error


def read_checkpoint_bytes(path: str | Path, max_bytes: int) -> bytes:
    """All of a checkpoint file's bytes, unread beyond `max_bytes`.

    Raises:
        CheckpointError: missing, not a regular file (a pipe would block), unreadable, or above `max_bytes`.
    """
    return read_bounded(path, max_bytes, "a checkpoint of this run", CheckpointError)


def decode_checkpoint(data: bytes, source: str) -> Checkpoint:
    """The checkpoint in `data`, every rule of the format checked; memory stays within a few times `data`.

    What the tensors must be is for their reader to check, against its model.

    Raises:
        CheckpointError: `data` is damaged, foreign or inconsistent; starts with `source`.
    """
    metadata = checked_metadata(data, FORMAT, source)
    try:
        tensors = safetensors.torch.load(data)
        digest = _digest(metadata, tensors)
    except Exception as error:
        raise CheckpointError(f"{source}: damaged safetensors content: {printable(error)}") from error
    if metadata["digest"] != digest:
        raise CheckpointError(f"{source}: damaged: its digest does not match its content")
    return Checkpoint(_checked_state(metadata["state"], source), tensors)


def _checked_state(text: str, source: str) -> RunState:
    values = json_object(text, "state", source, CheckpointError)
    expected = {each.name for each in dataclasses.fields(RunState)}
    if odd := values.keys() ^ expected:
        raise CheckpointError(f"{source}: state entries missing or unknown: {reprlib.repr(sorted(odd))}")
    rules = {
        "step": _is_step,
        "train_seconds": _is_seconds,
        "slowest_step": _is_seconds,
        "ended": lambda value: isinstance(value, bool),
        "last_logged": lambda v: isinstance(v, list) and len(v) == 2 and _is_step(v[0]) and _is_seconds(v[1]),
        "averaged_copies": _is_step,
        "batches": lambda value: isinstance(value, dict),
        "resumed_at": lambda value: isinstance(value, list) and all(map(_is_step, value)),
        "world_size": lambda value: _is_step(value) and value > 0,
        "config": lambda value: isinstance(value, dict),
        "inputs": lambda value: isinstance(value, dict) and all(map(_is_digest, value.values())),
        "code": _is_digest,
    }
    for name, rule in rules.items():
        if not rule(values[name]):
            raise CheckpointError(f"{source}: {name} is {reprlib.repr(values[name])}, which no checkpoint holds")
    step, seconds = values["last_logged"]
    if step > values["step"] or seconds > values["train_seconds"]:
        raise CheckpointError(f"{source}: last_logged is {[step, seconds]}, after the step that the checkpoint is of")
    values["last_logged"], values["resumed_at"] = tuple(values["last_logged"]), tuple(values["resumed_at"])
    return RunState(**values)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP


def _is_seconds(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a JSON text (the other metadata, dtypes and shapes), then of the tensors' bytes by name."""
    described = {
        "metadata": {key: value for key, value in metadata.items() if key != "digest"},
        "tensors": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()},
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
