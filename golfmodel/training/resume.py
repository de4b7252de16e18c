"""Which run a start goes on with, and from which of its checkpoints."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.runtime.bounded import read_bounded
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import CheckpointError, ConfigError
from golfmodel.runtime.metadata import json_object
from golfmodel.runtime.runlog import LOG_NAME, is_at_work, new_run_id, read_events
from golfmodel.runtime.versions import code_digest
from golfmodel.training.checkpoint import Checkpoint, RunState, decode_checkpoint, read_checkpoint_bytes
from golfmodel.training.checkpointing import DIRECTORY_NAME, checkpoints_in
from golfmodel.training.snapshot import Expected

CONFIG_NAME, SUMMARY_NAME = "config.json", "summary.json"
AUTO = "auto"
_MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Start:
    """Where a process begins.

    Attributes:
        directory: of the run.
        resumes: whether the run has begun before.
        path: the checkpoint to go on from; None where the run begins with its first step.
        data: that file's bytes, for the other ranks.
        checkpoint: what they hold.
    """

    directory: Path
    resumes: bool = False
    path: Path | None = None
    data: bytes = b""
    checkpoint: Checkpoint | None = None

    def shared(self, ranks: Ranks) -> Checkpoint | None:
        """Rank 0's checkpoint, on every rank; files are on its host alone."""
        data = ranks.broadcast_bytes(self.data if ranks.is_main else None)
        if ranks.is_main or not data:
            return self.checkpoint
        return decode_checkpoint(data, "the checkpoint that rank 0 read")


def launcher_of(environment: Mapping[str, str]) -> str:
    """What stays the same over torchrun's restarts of one job, and is another for another job; empty without it."""
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    if name in ("", "none"):  # a job that was given no name: known by the process that started this one
        return f"{socket.gethostname()}:{os.getppid()}" if name else ""
    return name


def was_restarted(environment: Mapping[str, str]) -> bool:
    """Whether torchrun has started this process in place of one that failed."""
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def directory_of(config: Config) -> Path:
    """Of a run that begins."""
    return Path(config.runs_dir) / (config.run_id or new_run_id())


def choose_start(config: Config, environment: Mapping[str, str], inputs: Mapping[str, str]) -> Start:
    """What `RESUME`, `RUN_ID` and torchrun ask for; rank 0's choice is everyone's. Says on stdout what it chose.

    Args:
        inputs: digests of the files that this run reads, by what they are.

    Raises:
        ConfigError: `RESUME` names no run, one that is finished, or one of another model, recipe or text.
        CheckpointError: the run has checkpoints, and none can be read.
    """
    only: Path | None = None
    directory = None
    if config.resume not in ("", AUTO):
        directory, only = _named(Path(config.resume))
        if was_restarted(environment):
            only = None  # by now there are newer ones
    elif config.resume == AUTO or was_restarted(environment):
        directory = _found(config, environment)
    if directory is None:
        fresh = directory_of(config)
        if config.resume == AUTO:
            print(f"no unfinished run of this config in {config.runs_dir}: starting {fresh}", flush=True)
        return Start(fresh)
    if (directory / SUMMARY_NAME).exists():
        raise ConfigError(f"the run {directory} is finished: there is nothing to go on with; choose another RUN_ID")
    _refuse(directory, config.differences(_config_of(directory) or config.to_dict()))
    start = Start(directory, resumes=True)
    with torch.device("meta"):
        expected = Expected(GPT(config))
    paths = [only] if only is not None else checkpoints_in(directory)
    for path in paths:
        try:
            data = read_checkpoint_bytes(path, expected.max_bytes)
            checkpoint = decode_checkpoint(data, str(path))
            _refuse(directory, config.differences(checkpoint.state.config) + _other_inputs(checkpoint, inputs))
            expected.check(checkpoint, str(path))
        except CheckpointError as error:
            if path == paths[-1]:
                raise
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr, flush=True)
            continue
        start = Start(directory, True, path, data, checkpoint)
        break
    _say(start)
    return start


def first_state(
    checkpoint: Checkpoint | None,
    *,
    config: Config,
    inputs: Mapping[str, str],
    world_size: int,
    batches: dict[str, Any],
) -> RunState:
    """Where this process takes a run up: after a checkpoint, or at its beginning, with the loader at `batches`."""
    here = {"world_size": world_size, "config": config.to_dict(), "inputs": dict(inputs), "code": code_digest()}
    if checkpoint is not None:
        resumed_at = (*checkpoint.state.resumed_at, checkpoint.state.step)
        return replace(checkpoint.state, resumed_at=resumed_at, **here)
    return RunState(
        step=0,
        train_seconds=0.0,
        slowest_step=0.0,
        ended=False,
        last_logged=(0, 0.0),
        averaged_copies=0,
        batches=batches,
        resumed_at=(),
        **here,
    )


def _named(path: Path) -> tuple[Path, Path | None]:
    """The run's directory, and the checkpoint, that `RESUME` names."""
    if path.is_file() and path.parent.name == DIRECTORY_NAME:
        return path.parent.parent, path
    if (path / LOG_NAME).is_file():
        return path, None
    raise ConfigError(
        f"RESUME (--resume) is {str(path)!r}: must be {AUTO}, the directory of a run, or a checkpoint in a run's "
        f"{DIRECTORY_NAME}/"
    )


def _found(config: Config, environment: Mapping[str, str]) -> Path | None:
    """The run of `RUN_ID`, the one that this job's launcher began, or the newest that is unfinished and alike."""
    if config.run_id:
        directory = Path(config.runs_dir) / config.run_id
        return directory if _has_begun(directory) else None
    runs = []
    with suppress(OSError):
        runs = [path for path in Path(config.runs_dir).iterdir() if _has_begun(path)]
    runs.sort(key=lambda run: (run / LOG_NAME).stat().st_mtime, reverse=True)
    open_runs = [run for run in runs if not (run / SUMMARY_NAME).exists() and not is_at_work(run)]
    if was_restarted(environment):
        launcher = launcher_of(environment)
        for run in open_runs:
            if any(event.get("launcher") == launcher for event in read_events(run / LOG_NAME)):
                return run
    if config.resume == AUTO:
        for run in open_runs:
            values = _config_of(run)
            if values is not None and not config.differences(values):
                return run
    return None


def _has_begun(directory: Path) -> bool:
    try:
        return (directory / LOG_NAME).stat().st_size > 0
    except OSError:
        return False


def _config_of(directory: Path) -> dict[str, Any] | None:
    """The options that a run was started with; None where they cannot be read."""
    path = directory / CONFIG_NAME
    try:
        return json_object(
            read_bounded(path, _MAX_CONFIG_BYTES, "a config", ConfigError), "config", str(path), ConfigError
        )
    except ConfigError:
        return None


def _refuse(directory: Path, differences: list[str]) -> None:
    if differences:
        raise ConfigError(f"cannot go on with {directory}, another run than this: {'; '.join(differences)}")


def _other_inputs(checkpoint: Checkpoint, inputs: Mapping[str, str]) -> list[str]:
    saved = checkpoint.state.inputs
    return [
        f"{name}: checkpoint {str(saved.get(name))[:12]}, this run {digest[:12]} (SHA-256)"
        for name, digest in inputs.items()
        if saved.get(name) != digest
    ]


def _say(start: Start) -> None:
    if start.checkpoint is None:
        print(f"going on with {start.directory} from its first step: it has no checkpoint", flush=True)
        return
    state = start.checkpoint.state
    print(f"going on with {start.directory} after step {state.step}, {state.train_seconds:.1f} s", flush=True)
