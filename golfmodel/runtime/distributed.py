"""The ranks of a run: one process, or as many as torchrun starts, on one host or several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from golfmodel.runtime.errors import ConfigError

TIMEOUT = timedelta(minutes=10)
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size_of(environment: Mapping[str, str]) -> int:
    """How many ranks torchrun started, 1 without it.

    Raises:
        ConfigError: `WORLD_SIZE` is no positive whole number, or stands without the rest of what torchrun sets.
    """
    world_size = _whole_number(environment, "WORLD_SIZE", default=1, low=1)
    absent = [name for name in TORCHRUN_VARIABLES if name not in environment]
    if world_size > 1 and absent:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} but {', '.join(absent)} is not set: start with torchrun, or unset WORLD_SIZE"
        )
    return world_size


def rank_of(environment: Mapping[str, str]) -> int:
    """This process's rank, 0 without torchrun.

    Raises:
        ConfigError: `RANK` is no whole number.
    """
    return _whole_number(environment, "RANK", default=0, low=0)


def _whole_number(environment: Mapping[str, str], name: str, *, default: int, low: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or int(text) < low:
        raise ConfigError(f"{name} is {text!r}: must be a whole number of at least {low}, as torchrun sets it")
    return int(text)


def runs_on_gpu(device: str) -> bool:
    """Whether a run on `device` ("cuda", "cpu", or "auto" for a GPU if there is one) uses a GPU.

    Raises:
        ConfigError: "cuda" where there is none.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ConfigError("DEVICE (--device) is 'cuda': this host shows no GPU; use cpu or auto")
    return found and device != "cpu"


# Newer names in newer versions of torch, where the older ones warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks, and the few ways in which they speak to each other.

    Attributes:
        rank: this process's number, from 0.
        world_size: how many there are, over all hosts.
        device: where this rank computes.
        control: the gloo group for host values; None for one rank.
        store: the key-value store where the ranks met; None for one rank.

    Tensors travel over NCCL between GPUs and gloo between CPUs. Host values travel over `control`, a gloo group, so
    that agreeing on the time or a file never waits for a GPU.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by its mean over ranks, through one float32 all-reduce."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([g.flatten().float() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])

    def start_mean_of_rows(self, rows_WL: Tensor) -> Callable[[], Tensor]:
        """Starts to average `[W, L]` over the W ranks; what it returns waits for this rank's row, `[L]`."""
        if self.world_size == 1:
            return lambda: rows_WL[0]
        mean_L = torch.empty_like(rows_WL[0])
        work = _reduce_scatter(mean_L, rows_WL.view(-1), async_op=True)

        def wait() -> Tensor:
            work.wait()
            return mean_L.div_(self.world_size)

        return wait

    def start_gathering_rows(self, own_L: Tensor) -> Callable[[], Tensor]:
        """Starts to give every rank the `[L]` of each; what it returns waits for all of them, `[W, L]`."""
        if self.world_size == 1:
            return lambda: own_L[None]
        rows_WL = own_L.new_empty(self.world_size, len(own_L))
        work = _all_gather(rows_WL.view(-1), own_L, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return rows_WL

        return wait

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the device, on every rank."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def reduce_min(self, value: Tensor) -> Tensor:
        """The elementwise minimum over ranks of a tensor on the device, on every rank."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size == 1:
            return value
        result = value.clone()
        dist.all_reduce(result, op=operation)
        return result

    def broadcast_parameters(self, parameters: Iterable[Tensor]) -> None:
        """Gives every rank rank 0's values."""
        if self.world_size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.detach(), src=0)

    def gather_host(self, own_L: Tensor) -> Tensor:
        """The `[L]` of each rank, `[W, L]`, on every rank; of tensors on the host, touching no GPU."""
        if self.world_size == 1:
            return own_L[None]
        rows = [torch.empty_like(own_L) for _ in range(self.world_size)]
        dist.all_gather(rows, own_L, group=self.control)
        return torch.stack(rows)

    def broadcast_number(self, value: float) -> float:
        """Rank 0's `value` on every rank, exactly; touches no GPU."""
        return self.broadcast_numbers([value])[0]

    def broadcast_numbers(self, values: Sequence[float]) -> list[float]:
        """Rank 0's `values` on every rank, exactly, in one message; touches no GPU."""
        if self.world_size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(message, src=0, group=self.control)
        return message.tolist()

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's `data` on every rank; the others pass None."""
        if self.world_size == 1:
            assert data is not None
            return data
        size = int(self.broadcast_number(len(data) if data is not None else 0))
        if size == 0:
            return b""
        message = torch.empty(size, dtype=torch.uint8)
        if data:
            message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(message, src=0, group=self.control)
        return message.numpy().tobytes()


@contextmanager
def process_group(
    device: str = "auto", environment: Mapping[str, str] = os.environ, *, timeout: timedelta = TIMEOUT
) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started and leaves them at the end; one process needs no group.

    Args:
        device: "cuda", "cpu", or "auto" for a GPU if there is one.
        environment: where `RANK`, `WORLD_SIZE` and `LOCAL_RANK` stand.
        timeout: how long a rank waits for another in a collective.

    Raises:
        ConfigError: no GPU, or fewer than the ranks on this host, or ranks that are no numbers.
    """
    world_size = world_size_of(environment)
    rank, local_rank = rank_of(environment), _whole_number(environment, "LOCAL_RANK", default=0, low=0)
    on_gpu = runs_on_gpu(device)
    if on_gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this host shows {count}; use --nproc_per_node={count} or less"
            )
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=place)
        return
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    # torchrun's store outlives a restart (torch 2.13), and with it the addresses of ranks that are gone.
    store = dist.PrefixStore(f"start-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=place if on_gpu else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else dist.group.WORLD
    yield Ranks(rank=rank, world_size=world_size, device=place, control=control, store=store)
    # Not after an error: the other ranks may be waiting inside a collective, and leaving would wait for them. The
    # process ends with its message, and torchrun ends the others.
    dist.destroy_process_group()
