"""Matrices shared out over ranks: each rank has the gradients' means, the momentum and the update of its own.

W ranks, L numbers: the most that one rank has of what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from golfmodel.model.parameters import backward_parts
from golfmodel.runtime.distributed import Ranks
from kernels.newton_schulz_plan import multiplications

ALIGNMENT = 8  # numbers: every matrix begins at a multiple of 16 bytes, in bfloat16 too


def buckets(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The matrices of each part of backward, in the order in which the parts are sent."""
    parts = backward_parts([rows * columns for rows, columns in shapes])
    return [[index for index, each in enumerate(parts) if each == part] for part in sorted(set(parts))]


def owners(shapes: Sequence[tuple[int, int]], world_size: int, settled: Sequence[int] = ()) -> list[int]:
    """Which rank works on which matrix: bucket by bucket the most expensive first, each to the rank with least so far.

    Bucket by bucket, because a bucket that is spread unevenly is sent with gaps. Depends on the arguments alone, so
    every rank comes to the same. The first ones stay with their `settled` owners.
    """
    load = [0] * world_size
    owner = [*settled, *[0] * (len(shapes) - len(settled))]
    for index, rank in enumerate(settled):
        load[rank] += multiplications(*shapes[index])
    for bucket in buckets(shapes):
        fresh = [index for index in bucket if index >= len(settled)]
        for index in sorted(fresh, key=lambda index: (-multiplications(*shapes[index]), index)):
            owner[index] = min(range(world_size), key=load.__getitem__)
            load[owner[index]] += multiplications(*shapes[index])
    return owner


class _Rows:
    """Where each of some matrices lies in the row `[L]` of its owner, one after another."""

    def __init__(self, indices: Sequence[int], shapes: Sequence[tuple[int, int]], owner: Sequence[int]) -> None:
        self._shapes = shapes
        self._starts: dict[int, int] = {}
        ends = [0] * (1 + max(owner, default=0))
        for index in indices:
            rows, columns = shapes[index]
            self._starts[index] = ends[owner[index]]
            ends[owner[index]] += -(-rows * columns // ALIGNMENT) * ALIGNMENT
        self.length = max(ends)

    def part(self, row_L: Tensor, index: int) -> Tensor:
        """Matrix `index` in its owner's row."""
        rows, columns = self._shapes[index]
        return row_L[self._starts[index] :][: rows * columns].view(rows, columns)


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
        shapes = [tuple(parameter.shape) for parameter in parameters]
        self.owner = owners(shapes, ranks.world_size, settled)
        self.own = [index for index, rank in enumerate(self.owner) if rank == ranks.rank]
        self.buckets = buckets(shapes)
        self._rows = _Rows(range(len(shapes)), shapes, self.owner)
        self._rows_of_bucket = [_Rows(bucket, shapes, self.owner) for bucket in self.buckets]

    def start_reducing(self, bucket: int, gradients: Mapping[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """Starts to average a bucket's gradients over the ranks; what it returns waits for this rank's own, by index.

        A gradient that is not there is so on every rank.
        """
        rows = self._rows_of_bucket[bucket]
        sent_WL = torch.zeros(self._ranks.world_size, rows.length, dtype=self.dtype, device=self._ranks.device)
        if gradients:
            places = [rows.part(sent_WL[self.owner[index]], index) for index in gradients]
            torch._foreach_copy_(places, list(gradients.values()))
        wait = self._ranks.start_mean_of_rows(sent_WL)
        own = [index for index in gradients if self.owner[index] == self._ranks.rank]

        def finish() -> dict[int, Tensor]:
            mean_L = wait()
            return {index: rows.part(mean_L, index) for index in own}

        return finish

    def start_gathering(self, tensors: Mapping[int, Tensor], dtype: torch.dtype) -> Callable[[], dict[int, Tensor]]:
        """Starts to give every rank this rank's tensors, by index, in `dtype`; what it returns waits for everybody's.

        Where an owner has no tensor, there are zeros.
        """
        own_L = torch.zeros(self._rows.length, dtype=dtype, device=self._ranks.device)
        if tensors:
            torch._foreach_copy_([self._rows.part(own_L, index) for index in tensors], list(tensors.values()))
        wait = self._ranks.start_gathering_rows(own_L)

        def finish() -> dict[int, Tensor]:
            rows_WL = wait()
            return {index: self._rows.part(rows_WL[rank], index) for index, rank in enumerate(self.owner)}

        return finish

    def known(self, tensors: Mapping[int, Tensor]) -> list[int]:
        """Which of the parameters have a tensor at their owner; waits for the device."""
        here = torch.zeros(len(self.owner), device=self._ranks.device)
        here[list(tensors)] = 1
        return self._ranks.reduce_sum(here).nonzero().flatten().tolist()


class Reducing:
    """The averaging of one step's gradients over the ranks, bucket after bucket in the same order on all of them."""

    def __init__(self, parameters: Sequence[Tensor], shards: Shards) -> None:
        self._parameters, self._shards = parameters, shards
        self._bucket_of = {
            parameters[index]: bucket for bucket, indices in enumerate(shards.buckets) for index in indices
        }
        self._missing = [len(indices) for indices in shards.buckets]
        self._means: list[Callable[[], dict[int, Tensor]]] = []  # of each bucket that is sent
        self.sent: list[int] = []  # parameters
        self.is_open = True  # while a backward goes on whose gradients are the step's
        self.has_failed = False

    def has_gradient(self, parameter: Tensor) -> None:
        """Sends the buckets that are complete with it, if all before them are sent.

        Raises:
            RuntimeError: the backward that was to be the last before the step is over.
        """
        if not self.is_open:
            raise RuntimeError("a gradient comes after the others are on their way: `step` follows `reducing`")
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._means) < len(self._missing) and self._missing[len(self._means)] == 0:
            self._send()

    @property
    def has_begun(self) -> bool:
        """Whether anything is sent."""
        return len(self._means) > 0

    def send_rest(self) -> None:
        """Sends the remaining buckets, without the gradients that there are none of.

        Raises:
            RuntimeError: the backward failed when some were on their way.
        """
        if self.has_failed:
            raise RuntimeError("a backward failed when some of its gradients were sent: the ranks are out of step")
        while len(self._means) < len(self._missing):
            self._send()

    def means(self) -> dict[int, Tensor]:
        """Waits for the means of this rank's own gradients, by index."""
        return {index: mean for means in self._means for index, mean in means().items()}

    @torch.no_grad()
    def _send(self) -> None:
        bucket = len(self._means)
        gradients = {
            index: self._parameters[index].grad
            for index in self._shards.buckets[bucket]
            if self._parameters[index].grad is not None
        }
        self._means.append(self._shards.start_reducing(bucket, gradients))
        self.sent += gradients
        for index in gradients:
            self._parameters[index].grad = None
