"""Addresses of many tensors in a table on the device: for kernels that work on all of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.launch import tl, triton

KEPT = 64  # tables of one kind


@triton.jit
def typed_pointer(p_like, p_address, VECTOR: tl.constexpr):
    """The address that stands at `p_address`, as a pointer of p_like's type, at a multiple of VECTOR elements."""
    BYTES: tl.constexpr = p_like.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(tl.load(p_address).to(p_like.dtype), VECTOR * BYTES)


class KeptTables:
    """Tables of whole numbers, kept on the device for the next call with the same ones; the oldest goes first."""

    def __init__(self) -> None:
        self._kept: dict[tuple, Tensor] = {}

    def on(self, device: torch.device, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """The rows as int64 `[len(rows), fields]` on the device, without waiting for it."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        # The stream is in the key, because only there has the table surely arrived.
        key = (device, stream, tuple(rows))
        table = self._kept.get(key)
        if table is None:
            if len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            on_host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
            table = self._kept[key] = on_host.to(device, non_blocking=True)
        return table
