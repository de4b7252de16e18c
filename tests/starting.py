"""Runs as users start them: processes of the front door, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from golfmodel.artifact.container import read_artifact
from golfmodel.runtime.versions import PROJECT_ROOT
from golfmodel.training.checkpoint import decode_checkpoint
from golfmodel.training.checkpointing import checkpoints_in

DEADLINE = 240


def flags(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them."""
    return [
        f"--{name.replace('_', '-')}={int(value) if isinstance(value, bool) else value}"
        for name, value in options.items()
    ]


@contextmanager
def started(
    options: dict[str, Any], *, ranks: int = 1, restarts: int = 0, faults: str = "", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`train.py` in a process of its own, under torchrun for several ranks; nothing of it is left afterwards."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [f"--max-restarts={restarts}"]
    process = subprocess.Popen(
        [*command, "train.py", *flags(options)],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GOLF_FAULTS": faults, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """How it ended, and what it said."""
    out, err = process.communicate(timeout=DEADLINE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(options: dict[str, Any], **how: Any) -> subprocess.CompletedProcess[str]:
    """Starts and waits."""
    with started(options, **how) as process:
        return ended(process)


def directory_of(options: dict[str, Any]) -> Path:
    return Path(str(options["runs_dir"])) / str(options["run_id"])


def result_of(options: dict[str, Any]) -> tuple[float, str]:
    """The score of a finished run and the digest of its artifact."""
    directory = directory_of(options)
    summary = json.loads((directory / "summary.json").read_text())
    return summary["val_bpb"], hashlib.sha256((directory / "model.golf").read_bytes()).hexdigest()


def last_tensors_of(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights, optimizer state, averages and random states at the end of training; empty without checkpoints."""
    for path in checkpoints_in(directory_of(options)):
        return decode_checkpoint(path.read_bytes(), str(path)).tensors
    return {}


def check_same(options: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """The run of `options` ended as the undisturbed one, to the bit."""
    assert result_of(options) == result_of(undisturbed)
    ours, theirs = last_tensors_of(options), last_tensors_of(undisturbed)
    assert not ours or ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def check_nothing_is_half_written(options: dict[str, Any]) -> None:
    """Every file that has its final name is whole."""
    for path in directory_of(options).rglob("[!.]*"):
        if path.suffix == ".safetensors":
            decode_checkpoint(path.read_bytes(), str(path))
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".golf":
            read_artifact(path)
