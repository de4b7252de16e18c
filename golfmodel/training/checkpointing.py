"""When a run writes checkpoints, where they lie, and which are kept."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from golfmodel.config import Config
from golfmodel.runtime.errors import GolfError
from golfmodel.runtime.runlog import RunLog
from golfmodel.training.background import BackgroundWriter
from golfmodel.training.checkpoint import RunState

DIRECTORY_NAME = "checkpoints"
_NAME = re.compile(r"step-(\d{8,10})\.safetensors")


def checkpoint_path(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_directory / DIRECTORY_NAME / f"step-{step:08d}.safetensors"


def checkpoints_in(run_directory: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    with suppress(OSError):
        found = {path: _NAME.fullmatch(path.name) for path in (run_directory / DIRECTORY_NAME).iterdir()}
        return sorted((path for path, match in found.items() if match), key=_step_of, reverse=True)
    return []


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


class Checkpoints:
    """Writes a run's checkpoints, on rank 0; one that cannot be written is a warning and an event of the log.

    As a context it waits for the last one at the end, whatever the end is.

    Args:
        config: `CHECKPOINT_SECONDS`, `CHECKPOINT_EVERY`, `CHECKPOINTS_KEPT`.
        log: of the run, in whose directory they lie.
        device: where the tensors are.
        start: where this process takes the run up, and what stays the same from there on.
    """

    def __init__(self, config: Config, log: RunLog, device: torch.device, start: RunState) -> None:
        self.start = start
        self._config, self._log = config, log
        self._writer = BackgroundWriter(device, self._finished)
        self._last_step, self._last_seconds = start.step, start.train_seconds
        self._started, self._held = 0.0, 0.0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    @property
    def wanted(self) -> bool:
        """Whether the run has any but at a signal."""
        return self._config.checkpoints

    def due(self, step: int, seconds: float) -> bool:
        """Whether one is to be written now, between two steps; never while another is being written."""
        if step <= self._last_step or self._writer.busy:
            return False
        every, interval = self._config.checkpoint_every, self._config.checkpoint_seconds
        by_steps = every > 0 and step // every > self._last_step // every
        return by_steps or 0 < interval <= seconds - self._last_seconds

    def write(self, state: RunState, tensors: dict[str, Tensor], *, held_seconds: float) -> None:
        """Starts to write a checkpoint.

        Args:
            state: of the step that the tensors are of.
            tensors: the writer's own, on the device.
            held_seconds: what it cost the training to make them; for the log.
        """
        self._writer.wait()  # what it says at its end is of its own times
        self._last_step, self._last_seconds = state.step, state.train_seconds
        self._started, self._held = time.perf_counter(), held_seconds
        self._writer.start(checkpoint_path(self._log.directory, state.step), state, tensors)

    def wait(self, *, insist: bool = False) -> None:
        """Until the last one is on disk or has failed.

        Raises:
            GolfError: it has failed, and the caller insists on it.
        """
        if insist:
            self._writer.wait_and_insist()
        else:
            self._writer.wait()

    def _finished(self, step: int, problem: GolfError | None) -> None:
        if problem is not None:
            print(f"warning: no checkpoint of step {step}: {problem}", file=sys.stderr, flush=True)
        else:
            self._keep_newest(step)
        with suppress(GolfError):  # on a full disk the log may fail as well
            self._log.event(
                "checkpoint",
                step=step,
                problem=None if problem is None else str(problem),
                held_seconds=self._held,
                written_seconds=time.perf_counter() - self._started,
            )

    def _keep_newest(self, step: int) -> None:
        """Of those up to `step`; later ones are of a way that the run did not take."""
        found = checkpoints_in(self._log.directory)
        kept = [path for path in found if _step_of(path) <= step][: self._config.checkpoints_kept]
        for path in found:
            if path not in kept:
                with suppress(OSError):
                    path.unlink()
