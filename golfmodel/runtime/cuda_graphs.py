"""CUDA graphs: of one piece of work, and of work that is asked for again and again on the same memory."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# Replays after which a recording was worth its while: that of the optimizers' step takes the host as long as some 150
# steps that are launched.
WORTH = 150
MOST_WASTED = 4


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that is captured on a device."""
    return torch.cuda.Stream(device)


def recorded(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
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


class Situation(NamedTuple):
    """All that launches depend on, apart from what is in the memory they read."""

    objects: Sequence[Any]  # has to be these very objects
    values: tuple[Any, ...]  # has to be equal

    def is_that_of(self, other: Situation | None) -> bool:
        """Whether the launches are the same."""
        return (
            other is not None
            and self.values == other.values
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )


class Repeated:
    """Does work; where it is asked for twice in a row in one situation, by replays of a CUDA graph from then on.

    A change of the situation gives the graph up. Where that happens again and again before it was worth its while,
    nothing is recorded in the end.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._situation: Situation | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._replays = self._wasted = 0

    @property
    def is_recorded(self) -> bool:
        """Whether the next time in this situation is a replay."""
        return self._graph is not None

    @property
    def has_given_up(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._graph is None and self._wasted >= MOST_WASTED

    def __call__(self, work: Callable[[], None], situation: Situation | None) -> bool:
        """Launches or replays `work`, which asks nothing of the device, and of the host nothing but the situation.

        Not to be called while a stream is captured.

        Args:
            situation: None where there is none in which the work can be repeated.

        Returns:
            Whether all that was done is a replay.
        """
        if situation is None or not situation.is_that_of(self._situation):
            self.forget()
            self._situation = situation
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
            self._graph = recorded(work, self._device)
        except BaseException as error:
            self._wasted = MOST_WASTED  # it would be so again
            if isinstance(error, torch.OutOfMemoryError):
                return False  # a graph cannot have what PyTorch keeps in its cache, launches can
            raise
        self._wasted += 1  # until it is worth its while
        return True

    def forget(self) -> None:
        """Drops the graph, whose memory PyTorch can then free; what is asked for next is launched."""
        if self._replays >= WORTH:
            self._wasted -= 1
        self._situation, self._graph, self._replays = None, None, 0
