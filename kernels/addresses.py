"""What kernels ask of lists of tensors, and small tables that they read on the device, addresses of tensors above all.

A graph goes on reading a table wherever it is replayed. So one that is made or used while a graph is captured is there
before the first replay, and is kept for good: a few kilobytes for each captured call. To make one, the capture has to
be "relaxed": `torch.cuda.graph(graph, capture_error_mode="relaxed")`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.launch import VECTOR, current_stream, piece_of, tl, triton

KEPT = 64  # tables of one kind

_read_by_graphs: dict[int, Any] = {}


@triton.jit
def typed_pointer(p_like, p_address, VECTOR: tl.constexpr):
    """The address that stands at `p_address`, as a pointer of p_like's type, at a multiple of VECTOR elements."""
    BYTES: tl.constexpr = p_like.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(tl.load(p_address).to(p_like.dtype), VECTOR * BYTES)


def _aligned(addresses: tuple[int, ...]) -> tuple[int, ...] | None:
    """The same; None if one is no multiple of `VECTOR`."""
    return None if functools.reduce(operator.or_, addresses, 0) % VECTOR else addresses


class Tensors(tuple[Tensor, ...]):
    """Tensors, and what kernels ask of each, asked once: every question to a tensor takes the host some 100 ns."""

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each."""
        return tuple([tensor.shape for tensor in self])

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each."""
        return tuple([tensor.dtype for tensor in self])

    @functools.cached_property
    def addresses(self) -> tuple[int, ...] | None:
        """Where each begins, in bytes, 0 without elements; None if one is not in a row from a multiple of `VECTOR`."""
        if not all(map(Tensor.is_contiguous, self)):
            return None
        return _aligned(tuple(map(Tensor.data_ptr, self)))

    @property
    def like(self) -> Tensor:
        """One with the device and the dtype of the first."""
        return self[0]


class Pieces(Sequence[Tensor]):
    """Contiguous tensors in the memory of `flat`, of these shapes and starts; each is made when it is asked for.

    To make them all takes the host longer than all else about a list, and a kernel only has to know where they lie.
    """

    def __init__(
        self,
        flat: Tensor,
        shapes: tuple[tuple[int, ...], ...],
        strides: Sequence[tuple[int, ...]],
        starts: Sequence[int],
    ) -> None:
        self.flat, self.shapes, self._strides, self._starts = flat, shapes, strides, starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        return piece_of(self.flat, self.shapes[index], self._strides[index], self._starts[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    @property
    def like(self) -> Tensor:
        """One of their device and dtype."""
        return self.flat

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each."""
        return (self.flat.dtype,) * len(self)

    @functools.cached_property
    def addresses(self) -> tuple[int, ...] | None:
        """Where each begins, in bytes; None if that is for one no multiple of `VECTOR`."""
        first, size = self.flat.data_ptr(), self.flat.itemsize
        return _aligned(tuple([first + start * size for start in self._starts]))


def as_tensors(tensors: Sequence[Tensor]) -> Tensors | Pieces:
    """The same, with what kernels ask of them."""
    return tensors if isinstance(tensors, (Tensors, Pieces)) else Tensors(tensors)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what this thread does on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table_on(device: torch.device, rows: Sequence, dtype: torch.dtype) -> Tensor:
    """The rows as a tensor on the device, there for whatever this stream does next; the host does not wait for it."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=dtype)
    on_host = torch.tensor(rows, dtype=dtype, pin_memory=True)
    if not is_capturing(device):
        return on_host.to(device, non_blocking=True)
    # On a stream beside the captured ones: neither the copy nor the memory is the graph's.
    beside = _stream_outside_graphs(device)
    with torch.cuda.stream(beside):
        table = on_host.to(device, non_blocking=True)
    beside.synchronize()
    return table


def _stream_outside_graphs(device: torch.device) -> torch.cuda.Stream:
    while True:  # PyTorch hands out the same 32 in turn, those that are captured among them
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if not is_capturing(device):
                return stream


def keep_for_graph(device: torch.device, tables: Any) -> None:
    """Keeps an object that holds tables, if a graph is being captured that will read them."""
    if is_capturing(device):
        _read_by_graphs[id(tables)] = tables


class KeptTables:
    """What was made for the last calls, for the next one with the same key; the oldest goes first."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def get(self, device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key: an object that holds tables on the device, made on this stream."""
        # The stream is in the key, because only there have the tables surely arrived.
        stream = current_stream(device.index) if device.type == "cuda" else 0
        key = (device, stream, key)
        tables = self._kept.get(key)
        if tables is None:
            if len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            tables = self._kept[key] = make()
        keep_for_graph(device, tables)
        return tables

    def cache_clear(self) -> None:
        """Keeps nothing of the calls so far; graphs keep what they read."""
        self._kept.clear()

    def on(self, device: torch.device, rows: Iterable[tuple[int, ...]]) -> Tensor:
        """The rows as int64 `[len(rows), fields]` on the device, without waiting for it."""
        rows = tuple(rows)
        return self.get(device, rows, lambda: table_on(device, rows, torch.int64))


def kept_tables(function: Callable) -> Callable:
    """Decorates `function(*key, device)`, which makes tables on the device: as `KeptTables.get`."""
    tables = KeptTables()

    @functools.wraps(function)
    def of(*arguments: Any) -> Any:
        return tables.get(arguments[-1], arguments[:-1], lambda: function(*arguments))

    of.cache_clear = tables.cache_clear
    return of
