"""What this machine can do at best, measured now: bytes copied and floating-point operations, per second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timing import interleaved


@dataclass(frozen=True)
class Ceilings:
    """Rates of a large copy (bytes read + bytes written) and of a large square matrix product."""

    bytes_per_second: float
    flops_per_second: float  # bfloat16 on a GPU, float32 on a CPU

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The least time for so much work: neither rate can be beaten, and the two overlap."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def measure(device: torch.device) -> Ceilings:
    """Measures both, interleaved, past the cache."""
    on_gpu = device.type == "cuda"
    size, width = (2**28, 8192) if on_gpu else (2**25, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"copy": lambda index: targets[index].copy_(sources[index]), "matmul": lambda _: left @ right},
        sets=2,
        device=device,
        rounds=10,
    )
    return Ceilings(2 * size / times["copy"].median, 2 * width**3 / times["matmul"].median)
