"""Work that is launched again and again on the same memory, as one CUDA graph in place of its launches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# To record waits for the device, and its cost is that of hundreds of launches. Where the situation changes again and
# again, nothing is recorded in the end.
MOST_RECORDINGS = 4


class Situation(NamedTuple):
    """All that launches depend on."""

    objects: Sequence[Any]  # has to be these very objects: tensors in which no memory is exchanged, options
    values: tuple[Any, ...]  # has to be equal: addresses of what is exchanged

    def is_that_of(self, other: Situation | None) -> bool:
        """Whether the launches are the same."""
        return (
            other is not None
            and self.values == other.values
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )


class Repeated:
    """Does work; once it is asked for it in one situation twice in a row, by replays of a CUDA graph.

    A graph holds the memory that the work needs for its own for as long as there is the graph: until the situation
    changes.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._situation: Situation | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recordings = 0

    @property
    def is_recorded(self) -> bool:
        """Whether the next time in this situation is a replay."""
        return self._graph is not None

    def __call__(self, work: Callable[[], None], situation: Situation) -> bool:
        """Launches or replays `work`, which asks nothing of the device, and of the host nothing that changes.

        Not to be called while a stream is captured.

        Returns:
            Whether all that was done is a replay.
        """
        if not situation.is_that_of(self._situation):
            self._situation, self._graph = situation, None
        elif self._graph is not None:
            self._graph.replay()
            return True
        elif self._recordings < MOST_RECORDINGS:
            self._record(work)
            return False
        work()
        return False

    def _record(self, work: Callable[[], None]) -> None:
        self._recordings += 1
        graph = torch.cuda.CUDAGraph()
        # Meanwhile kernels upload tables, and other threads pin memory.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="relaxed"):
            work()
        graph.replay()
        self._graph = graph
