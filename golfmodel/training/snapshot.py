"""The tensors of a training run: copied out between two steps, and put back.

W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from golfmodel.optim.averaging import WeightAverage
from golfmodel.optim.groups import Optimizers, state_shapes
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import CheckpointError
from golfmodel.training.checkpoint import Checkpoint

WEIGHT, STATE, MEAN = "weight/", "optimizer/", "mean/"
CPU_RANDOM, GPU_RANDOM = "random/cpu", "random/cuda"
GPU_RANDOM_BYTES = 16  # a seed and an offset
_OVERHEAD_BYTES = 32 * 2**20  # the header and the states of random generators


class Training:
    """What is saved of a run, where it lies while the run goes on.

    Args:
        model: its parameters, the same on every rank.
        optimizers: over all ranks.
        average: of the parameters.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, average: WeightAverage, ranks: Ranks) -> None:
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._optimizers, self._average, self._ranks = optimizers, average, ranks

    def copied(self) -> dict[str, Tensor]:
        """Copies of everything, on the device; for all ranks together, and empty on all but rank 0.

        The host waits for none of the copies. Over several ranks it waits once, for the steps in flight.
        """
        state = self._optimizers.state_tensors()
        on_gpu = self._ranks.device.type == "cuda"
        random = {CPU_RANDOM: self._ranks.gather_host(torch.get_rng_state())}
        if on_gpu:
            random[GPU_RANDOM] = self._ranks.gather_host(torch.cuda.get_rng_state())
        if not self._ranks.is_main:
            return {}
        means = dict(zip(self._weights, self._average.means, strict=False))
        live = {
            **_prefixed(WEIGHT, self._weights),
            **_prefixed(STATE, state),
            **_prefixed(MEAN, means),
        }
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in live.items()}
        return {**copies, **random}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts everything back, on any number of ranks; for all ranks together.

        A rank that the checkpoint has no random state of keeps its own.
        """
        tensors = checkpoint.tensors
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[WEIGHT + name])
        self._optimizers.load_state_tensors(_without(STATE, tensors))
        means = [tensors[MEAN + name] for name in self._weights] if checkpoint.state.averaged_copies else []
        self._average.load(checkpoint.state.averaged_copies, means)
        rank = self._ranks.rank
        if rank < checkpoint.state.world_size:
            torch.set_rng_state(tensors[CPU_RANDOM][rank].clone())
            if self._ranks.device.type == "cuda" and GPU_RANDOM in tensors:
                torch.cuda.set_rng_state(tensors[GPU_RANDOM][rank].clone())


class Expected:
    """What the tensors of a model's checkpoints must be.

    Args:
        model: only its shapes matter; on the meta device it takes no memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
        self._states = state_shapes(model)

    @property
    def max_bytes(self) -> int:
        """More than any of their files has."""
        means = sum(shape.numel() * torch.float32.itemsize for shape, _ in self._weights.values())
        return _bytes(self._weights.values()) + _bytes(self._states.values()) + means + _OVERHEAD_BYTES

    def check(self, checkpoint: Checkpoint, source: str) -> None:
        """Compares names, shapes and dtypes.

        Raises:
            CheckpointError: one is missing, unknown, or of another shape or dtype; starts with `source`.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        expected = _prefixed(WEIGHT, self._weights)
        if state.averaged_copies:
            expected |= _prefixed(MEAN, {name: (shape, torch.float32) for name, (shape, _) in self._weights.items()})
        expected[CPU_RANDOM] = (torch.Size((state.world_size, len(torch.get_rng_state()))), torch.uint8)
        if GPU_RANDOM in tensors:
            expected[GPU_RANDOM] = (torch.Size((state.world_size, GPU_RANDOM_BYTES)), torch.uint8)
        # a parameter that has had no gradient has no state, else it has all entries
        states = _without(STATE, tensors)
        started = {name.rpartition(".")[0] for name in states}
        expected |= _prefixed(
            STATE, {name: each for name, each in self._states.items() if name.rpartition(".")[0] in started}
        )
        if odd := expected.keys() ^ tensors.keys():
            raise CheckpointError(
                f"{source}: its tensors are not this model's; unmatched: {', '.join(sorted(odd)[:5])}"
            )
        for name, (shape, dtype) in expected.items():
            found = tensors[name]
            if found.shape != shape or found.dtype != dtype:
                raise CheckpointError(
                    f"{source}: {name} is {found.dtype} of shape {tuple(found.shape)}, this model's is {dtype} of "
                    f"shape {tuple(shape)}"
                )
        try:
            for row in tensors[CPU_RANDOM]:
                torch.Generator().set_state(row.clone())
        except RuntimeError as error:
            raise CheckpointError(f"{source}: {CPU_RANDOM} is no state of PyTorch's random generator") from error


def _prefixed(prefix: str, values: Mapping) -> dict:
    return {prefix + name: value for name, value in values.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _bytes(described: Iterable[tuple[torch.Size, torch.dtype]]) -> int:
    return sum(shape.numel() * dtype.itemsize for shape, dtype in described)
