"""Writing checkpoints beside the training: one thread, at most one checkpoint at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from golfmodel.runtime.errors import CheckpointError, GolfError
from golfmodel.training.checkpoint import Checkpoint, RunState, write_checkpoint


class BackgroundWriter:
    """Takes copies on the device to the host and to disk, while the thread that made them goes on.

    Args:
        device: where the copies are.
        done: called by the writing thread with the step and what went wrong, None where nothing did.
    """

    def __init__(self, device: torch.device, done: Callable[[int, GolfError | None], None]) -> None:
        self._device, self._done = device, done
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, path: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
        """Starts to write; waits for the checkpoint before, which `busy` says is there."""
        self.wait()
        self._problem = None
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        self._thread = threading.Thread(
            target=self._write, args=(path, state, tensors, ready), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until what was started is on disk, or has failed.

        Raises:
            whatever `done` did not expect, such as a bug in here.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None and not isinstance(self._problem, GolfError):
            raise self._problem

    def wait_and_insist(self) -> None:
        """The same, where the checkpoint has to be there.

        Raises:
            GolfError: it could not be written.
        """
        self.wait()
        if self._problem is not None:
            raise self._problem

    def _write(self, path: Path, state: RunState, tensors: dict[str, Tensor], ready: torch.cuda.Event | None) -> None:
        try:
            host = tensors if ready is None else self._on_host(tensors, ready)
            broken = [name for name, tensor in host.items() if tensor.is_floating_point() and not _finite(tensor)]
            if broken:
                raise CheckpointError(f"{broken[0]} is not finite, and no run can go on from that")
            write_checkpoint(path, Checkpoint(state, host))
        except BaseException as error:
            self._problem = error
        self._done(state.step, self._problem if isinstance(self._problem, GolfError) else None)

    def _on_host(self, tensors: dict[str, Tensor], ready: torch.cuda.Event) -> dict[str, Tensor]:
        """Through pinned memory, on a stream of its own, beside whatever the device does."""
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            host = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                if tensor.is_cuda
                else tensor
                for name, tensor in tensors.items()
            }
        self._stream.synchronize()
        return host


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
