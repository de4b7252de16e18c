"""Training batches on a device, read ahead by a thread so that a step never waits for them."""

from __future__ import annotations

import queue
import reprlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from golfmodel.data.shards import find_shards
from golfmodel.data.streams import InOrderStream, ShuffledWindows, Stream
from golfmodel.runtime import faults
from golfmodel.runtime.errors import ConfigError, DataError

Order = Literal["in_order", "shuffled"]
PREFETCH_MICRO_BATCHES = 4
MAX_POSITION = 2**60  # leaves room in 64 bits for what is added to it


class Loader:
    """Iterates micro-batches `(inputs_BT, targets_BT)`, int64 on `device`, without end.

    A daemon thread reads ahead: into pinned memory for a CUDA device, so that the copy to it runs beside the
    computation. An error there is raised by the `next` that would have given the batch, and by every `next`
    after it.

    Args:
        stream: the order to read in, for this rank.
        device: where batches go.
        micro_batches_per_step: how many make up one optimizer step; kept for the trainer.
        prefetch: how many micro-batches to read ahead.
    """

    def __init__(
        self,
        stream: Stream,
        device: torch.device | str,
        *,
        micro_batches_per_step: int = 1,
        prefetch: int = PREFETCH_MICRO_BATCHES,
    ) -> None:
        self.micro_batches_per_step = micro_batches_per_step
        self._stream = stream
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            # The thread's current device is GPU 0 whatever this thread's is, so it is told by number.
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._prefetch = prefetch
        self._position = 0
        self._reader: _Reader | None = None
        self._closed = False

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._reader is None:
            self._reader = _Reader(self._stream, self._position, self._device, self._prefetch)
        batch_2BT = self._reader.take()
        self._position += self._stream.advance
        inputs_BT, targets_BT = batch_2BT.to(self._device, non_blocking=True)
        return inputs_BT, targets_BT

    def state_dict(self) -> dict[str, Any]:
        """The position of what `next` has given so far (not of what was read ahead), as JSON values."""
        return {**self._stream.identity(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the position of `state`; what was read ahead is dropped. The number of ranks may have changed.

        Raises:
            DataError: `state` is of another order, seed, row length or list of shards, or is not a loader's
                state.
        """
        for name, ours in self._stream.identity().items():
            theirs = state.get(name)
            if theirs != ours:
                raise DataError(f"the saved data position does not fit this run: {_difference(name, theirs, ours)}")
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= MAX_POSITION:
            raise DataError(
                f"the saved data position is {reprlib.repr(position)}; it must be an integer from 0 to {MAX_POSITION}"
            )
        self._stop_reader()
        self._position = position

    def close(self) -> None:
        """Stops the thread. The loader cannot be used afterwards, except for `state_dict`."""
        self._closed = True
        self._stop_reader()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None


class _Reader:
    """A thread that reads micro-batches from a position on into a bounded queue."""

    def __init__(self, stream: Stream, position: int, device: torch.device, depth: int) -> None:
        self._stream, self._position, self._device = stream, position, device
        self._queue: queue.Queue[torch.Tensor | BaseException] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def take(self) -> torch.Tensor:
        """The next micro-batch, int64 `[2, B, T]` on the host: inputs and targets."""
        if self._error is None:
            item = self._queue.get()
            if isinstance(item, torch.Tensor):
                return item
            self._error = item
        raise self._error

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stopping.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # makes room for the put that the thread may be waiting in
            except queue.Empty:
                self._thread.join(timeout=0.005)

    def _run(self) -> None:
        try:
            pin = self._device.type == "cuda"
            if pin:
                torch.cuda.set_device(self._device)  # else pinning opens a context on GPU 0 from every rank
            while not self._stopping.is_set():
                faults.reach("read")
                inputs_BT, targets_BT = self._stream.read(self._position)
                batch_2BT = torch.empty((2, *inputs_BT.shape), dtype=torch.int64, pin_memory=pin)
                host_2BT = batch_2BT.numpy()
                np.copyto(host_2BT[0], inputs_BT)
                np.copyto(host_2BT[1], targets_BT)
                self._queue.put(batch_2BT)
                self._position += self._stream.advance
        except OSError as error:
            self._queue.put(DataError(f"cannot read the training shards: {error.strerror or error}"))
        except BaseException as error:
            self._queue.put(error)


def make_loader(
    *,
    directory: str | Path,
    order: Order,
    seq_len: int,
    batch_tokens: int,
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
    seed: int,
    vocab_size: int,
    device: torch.device | str,
) -> Loader:
    """A loader of the training shards in `directory` for one rank.

    Args:
        directory: where the shards are; only those named `*_train_*.bin` are opened.
        order: "in_order" (the seed's) or "shuffled" (every window once an epoch).
        seq_len: targets in a row.
        batch_tokens: targets in one optimizer step, over all ranks.
        micro_batch_tokens: targets in one micro-batch of one rank.
        seed: of the shuffled order.
        vocab_size: ids must be below it.

    Raises:
        ConfigError: sizes that do not divide, or a value out of range.
        DataError: shards that are missing, damaged, or too small.
    """
    _check_sizes(seq_len, batch_tokens, micro_batch_tokens, rank, world_size)
    if seed < 0:
        raise ConfigError(f"SEED is {seed}; it must be >= 0")
    if order not in ("in_order", "shuffled"):
        raise ConfigError(f"the data order is {order!r}; it may be 'in_order' or 'shuffled'")
    paths = find_shards(directory, "train")
    sizes = {
        "seq_len": seq_len,
        "micro_batch_tokens": micro_batch_tokens,
        "rank": rank,
        "world_size": world_size,
        "vocab_size": vocab_size,
    }
    stream = InOrderStream(paths, **sizes) if order == "in_order" else ShuffledWindows(paths, **sizes, seed=seed)
    return Loader(stream, device, micro_batches_per_step=batch_tokens // (world_size * micro_batch_tokens))


def _check_sizes(seq_len: int, batch_tokens: int, micro_batch_tokens: int, rank: int, world_size: int) -> None:
    sizes = {
        "TRAIN_SEQ_LEN": seq_len,
        "TRAIN_BATCH_TOKENS": batch_tokens,
        "MICRO_BATCH_TOKENS": micro_batch_tokens,
        "WORLD_SIZE": world_size,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be >= 1")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank}; with WORLD_SIZE {world_size} it may be 0 to {world_size - 1}")
    if micro_batch_tokens % seq_len:
        raise ConfigError(
            f"MICRO_BATCH_TOKENS is {micro_batch_tokens}; it must be a multiple of TRAIN_SEQ_LEN {seq_len}"
        )
    if batch_tokens % (world_size * micro_batch_tokens):
        raise ConfigError(
            f"TRAIN_BATCH_TOKENS is {batch_tokens}; with {world_size} ranks of {micro_batch_tokens} tokens "
            f"(MICRO_BATCH_TOKENS) it must be a multiple of {world_size * micro_batch_tokens}"
        )


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """One line on how two values of an identity differ; of two lists, the first differing entry."""
    if not (isinstance(theirs, list) and isinstance(ours, list)):
        return f"its {name} is {theirs!r}, this run's is {ours!r}"
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} {name}, this run has {len(ours)}"
    place = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"number {place} of its {name} is {theirs[place]!r}, this run's is {ours[place]!r}"
