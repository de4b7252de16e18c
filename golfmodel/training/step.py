"""One training step: forward and backward of its micro-batches, then the optimizers; on a GPU one CUDA graph.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

from golfmodel.optim.groups import Optimizers
from golfmodel.runtime import faults, liveness
from golfmodel.runtime.cuda_graphs import captured

MicroBatch = tuple[Tensor, Tensor]  # inputs and targets, int64 [B, T] each

STAGES = ("forward", "backward", "optimizers")  # as profilers see them, of a step that is not recorded

# Before the one that is recorded: they compile what there is to compile, and allocate what stays.
UNRECORDED_STEPS = 2


class Step:
    """Takes steps. On a GPU the third is recorded as a CUDA graph, and from then on the host starts that.

    A graph goes on reading and writing the memory that it was recorded with. So weights, optimizer state and schedule
    may be changed between steps, but only in place; and every step has the same number of micro-batches of one shape.
    What Python decided while it was recorded stays: the model's mode, `GOLF_KERNELS`, which parameters are trained.
    The memory that a step takes is the graph's for as long as there is one, and nobody else's between steps.

    Args:
        loss: the training loss of (inputs, targets).
        optimizers: of the loss's parameters.
        micro_batches: how many make a step.
        device: where all of it is.
        records: whether to record; False keeps to single launches, which a profiler tells apart, but for what the
            optimizers record themselves.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizers: Optimizers,
        micro_batches: int,
        device: torch.device,
        *,
        records: bool = True,
    ) -> None:
        self._loss, self._optimizers, self._micro_batches, self._device = loss, optimizers, micro_batches, device
        # A fault in the gradients is the host's doing, of which a graph knows nothing.
        self._records = records and device.type == "cuda" and not faults.are_planned("gradient")
        self._unrecorded = UNRECORDED_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[MicroBatch] = []
        self._total = torch.zeros((), device=device)

    @property
    def is_recorded(self) -> bool:
        """Whether the next step is a replay."""
        return self._graph is not None

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> Tensor:
        """One optimizer step; returns this rank's mean loss, on the device, where the next step writes its own.

        Raises:
            ValueError: a micro-batch is not of the shape that the recorded step takes.
        """
        if self._graph is None and (not self._records or self._unrecorded > 0):
            self._unrecorded -= 1
            self._take(micro_batches)
            return self._total
        given = list(micro_batches)
        if self._graph is None:
            self._record(given)
        for mine, theirs in zip(self._inputs, given, strict=True):
            if theirs[0].shape != mine[0].shape or theirs[1].shape != mine[1].shape:
                shapes = [list(tensor.shape) for tensor in theirs]
                raise ValueError(f"a micro-batch of shapes {shapes}: the recorded step takes {list(mine[0].shape)}")
            torch._foreach_copy_(mine, theirs)
        self._graph.replay()
        liveness.part_done()
        return self._total

    def forget(self) -> None:
        """Gives the graph's memory back; the next step records anew."""
        self._graph, self._inputs = None, []

    def _take(self, micro_batches: Iterable[MicroBatch]) -> None:
        forward, backward, optimizers = STAGES
        for number, (inputs_BT, targets_BT) in enumerate(micro_batches, start=1):
            liveness.part_done()
            with record_function(forward):
                loss = self._loss(inputs_BT, targets_BT) / self._micro_batches
                (self._total.copy_ if number == 1 else self._total.add_)(loss.detach())
            is_last = number == self._micro_batches
            with record_function(backward), self._optimizers.reducing() if is_last else nullcontext():
                loss.backward()
            liveness.part_done()
        if faults.reach("gradient"):
            parameters = (parameter for group in self._optimizers.param_groups for parameter in group["params"])
            next(each for each in parameters if each.grad is not None).grad.fill_(float("nan"))
        with record_function(optimizers):
            self._optimizers.step()

    def _record(self, given: list[MicroBatch]) -> None:
        """Records what `_take` does on copies of these micro-batches; runs none of it."""
        inputs = [(inputs_BT.clone(), targets_BT.clone()) for inputs_BT, targets_BT in given]
        # What single steps took of memory, the graph takes anew.
        self._optimizers.forget()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        try:
            graph = captured(lambda: self._take(inputs), self._device)
        except BaseException:
            self._optimizers.abandon()  # gradients in the memory of a graph that never ran
            raise
        self._graph, self._inputs = graph, inputs
