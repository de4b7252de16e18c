"""CUDA graphs: of one piece of work, and of calls that do the same on the same memory again and again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# A graph of fewer replays is wasted: to record the optimizers' step takes the host as long as to launch it 150 times.
WORTHWHILE_REPLAYS = 150
MOST_WASTED_GRAPHS = 4


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that is captured on a device."""
    return torch.cuda.Stream(device)


def captured(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `work` launches on the device; none of it runs, and what the device still does goes on.

    What `work` allocates is the graph's for as long as there is one. PyTorch's cache of memory is not emptied, as it is
    by `torch.cuda.graph`, so that what is allocated between two steps goes on to lie where it lay.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        # Meanwhile kernels upload tables, and other threads pin memory and ask NCCL how far it is.
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            work()
        finally:
            graph.capture_end()
    return graph


class GraphKey(NamedTuple):
    """What tells whether a call's launches are those of another."""

    objects: Sequence[Any]  # has to be these very objects
    values: tuple[Any, ...]  # has to be equal

    def matches(self, other: GraphKey | None) -> bool:
        """Whether they are."""
        return (
            other is not None
            and self.values == other.values
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )


class GraphedCall:
    """Calls that launch work; once two in a row have one key, the work is recorded, and replayed while the key stays.

    Another key drops the graph. Where that happens again and again before it was worth its while, nothing is recorded
    in the end.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: GraphKey | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._replays = self._wasted = 0

    @property
    def is_recorded(self) -> bool:
        """Whether the next call of the same key is a replay."""
        return self._graph is not None

    @property
    def has_given_up(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._graph is None and self._wasted >= MOST_WASTED_GRAPHS

    def __call__(self, work: Callable[[], None], key: GraphKey | None) -> bool:
        """Launches or replays `work`, which asks nothing of the device, and of the host nothing but what is in the key.

        Not to be called while a stream is captured.

        Args:
            key: None where this call is not to be recorded.

        Returns:
            Whether all that was done is a replay.
        """
        if key is None or not key.matches(self._key):
            self.forget()
            self._key = key
        elif self._graph is not None:
            self._replays += 1
            self._graph.replay()
            return True
        elif not self.has_given_up and self._record(work):
            self._graph.replay()
            return False
        work()
        return False

    def _record(self, work: Callable[[], None]) -> bool:
        """Whether there was memory for it."""
        try:
            self._graph = captured(work, self._device)
        except BaseException as error:
            self._wasted = MOST_WASTED_GRAPHS  # it would be so again
            if isinstance(error, torch.OutOfMemoryError):
                return False  # a graph cannot have what PyTorch keeps in its cache, launches can
            raise
        self._wasted += 1  # until it is worth its while
        return True

    def forget(self) -> None:
        """Drops the graph, whose memory PyTorch can then free; the next call launches."""
        if self._replays >= WORTHWHILE_REPLAYS:
            self._wasted -= 1
        self._key, self._graph, self._replays = None, None, 0
