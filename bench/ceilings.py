"""What this machine can do at best, measured now: bytes copied and floating-point operations, per second."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Timed, interleaved


@dataclass(frozen=True)
class Ceilings:
    """Rates of a large copy (bytes read + bytes written) and of a large square matrix product."""

    bytes_per_second: float
    flops_per_second: float  # bfloat16; on a CPU the faster of bfloat16 and float32

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The least time for so much work: neither rate can be beaten, and the two overlap."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def measure(device: torch.device) -> Ceilings:
    """Measures both, interleaved, past the cache."""
    on_gpu = device.type == "cuda"
    size, width = (2**28, 8192) if on_gpu else (2**25, 1024)
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    timed: dict[str, Timed] = {"copy": lambda index: targets[index].copy_(sources[index])}
    for dtype in (torch.bfloat16,) if on_gpu else (torch.bfloat16, torch.float32):
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        timed[f"matmul {dtype}"] = functools.partial(_multiply, left, right)
    times = interleaved(timed, sets=2, device=device, rounds=10)
    product = min(measured.median for name, measured in times.items() if name != "copy")
    return Ceilings(2 * size / times["copy"].median, 2 * width**3 / product)


def _multiply(left: Tensor, right: Tensor, _: int) -> Tensor:
    return left @ right
