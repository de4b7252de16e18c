"""Matrices shared out over ranks: each rank has the gradients' means, the momentum and the update of its own.

W ranks, L numbers: the most that one rank's matrices hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from golfmodel.runtime.distributed import Ranks
from kernels.newton_schulz_plan import multiplications

ALIGNMENT = 8  # numbers: every matrix begins at a multiple of 16 bytes, in bfloat16 too


def owners(shapes: Sequence[tuple[int, int]], world_size: int, settled: Sequence[int] = ()) -> list[int]:
    """Which rank works on which matrix: the most expensive first, each to the rank with the least work so far.

    Depends on the arguments alone, so every rank comes to the same. The first ones stay with their `settled` owners.
    """
    load = [0] * world_size
    owner = [*settled, *[0] * (len(shapes) - len(settled))]
    for index, rank in enumerate(settled):
        load[rank] += multiplications(*shapes[index])
    fresh = range(len(settled), len(shapes))
    for index in sorted(fresh, key=lambda index: -multiplications(*shapes[index])):
        owner[index] = min(range(world_size), key=load.__getitem__)
        load[owner[index]] += multiplications(*shapes[index])
    return owner


class Shards:
    """Which of the parameters are whose, and the two ways in which they travel.

    Args:
        parameters: 2-D; the same, in the same order, on every rank.
        settled: the owners of the first of them, where they have some.
    """

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks, settled: Sequence[int] = ()) -> None:
        self._ranks = ranks
        # what travels in full precision
        wide = any(parameter.dtype == torch.float64 for parameter in parameters)
        self.dtype = torch.float64 if wide else torch.float32
        self._shapes = [tuple(parameter.shape) for parameter in parameters]
        self.owner = owners(self._shapes, ranks.world_size, settled)
        self.own = [index for index, rank in enumerate(self.owner) if rank == ranks.rank]
        self._starts, ends = [], [0] * ranks.world_size
        for (rows, columns), rank in zip(self._shapes, self.owner, strict=True):
            self._starts.append(ends[rank])
            ends[rank] += -(-rows * columns // ALIGNMENT) * ALIGNMENT
        self._length = max(ends)

    def start_reducing(self, gradients: Sequence[Tensor | None]) -> Callable[[], dict[int, Tensor]]:
        """Starts to average gradients over the ranks; what it returns waits for this rank's own, by index.

        A gradient that is None here is None on every rank.
        """
        rows_WL = torch.zeros(self._ranks.world_size, self._length, dtype=self.dtype, device=self._ranks.device)
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        places = [self._part(rows_WL[self.owner[index]], index) for index in present]
        if present:
            torch._foreach_copy_(places, [gradients[index] for index in present])
        wait = self._ranks.start_mean_of_rows(rows_WL)
        own = [index for index in self.own if gradients[index] is not None]

        def finish() -> dict[int, Tensor]:
            mean_L = wait()
            return {index: self._part(mean_L, index) for index in own}

        return finish

    def start_gathering(self, tensors: Mapping[int, Tensor], dtype: torch.dtype) -> Callable[[], dict[int, Tensor]]:
        """Starts to give every rank this rank's tensors, by index, in `dtype`; what it returns waits for everybody's.

        Where an owner has no tensor, there are zeros.
        """
        own_L = torch.zeros(self._length, dtype=dtype, device=self._ranks.device)
        if tensors:
            torch._foreach_copy_([self._part(own_L, index) for index in tensors], list(tensors.values()))
        wait = self._ranks.start_gathering_rows(own_L)

        def finish() -> dict[int, Tensor]:
            rows_WL = wait()
            return {index: self._part(rows_WL[rank], index) for index, rank in enumerate(self.owner)}

        return finish

    def known(self, tensors: Mapping[int, Tensor]) -> list[int]:
        """Which of the parameters have a tensor at their owner; waits for the device."""
        here = torch.zeros(len(self.owner), device=self._ranks.device)
        here[list(tensors)] = 1
        return self._ranks.reduce_sum(here).nonzero().flatten().tolist()

    def _part(self, row_L: Tensor, index: int) -> Tensor:
        rows, columns = self._shapes[index]
        return row_L[self._starts[index] :][: rows * columns].view(rows, columns)
