"""One small case of every Triton kernel, for NVIDIA's checkers of memory accesses and races. Run by hand, on a GPU:

compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

Each prints how many errors it found at its end; this script fails by itself if two calls
differ.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["GOLF_KERNELS"] = "triton"
# Each tensor in an allocation of its own, so that a stray access does not land in another tensor's memory.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import kernels
from kernels import testing
from kernels.cases import CASES
from kernels.clipping import clip_factors, square_sums
from kernels.muon_update import momentum_newton_schulz_, muon_update_


def main() -> None:
    """Calls every case of `kernels.cases` twice at one shape, with gradients; every op that takes a list; Muon's."""
    device = torch.device("cuda")
    for case in CASES:
        for dtype in case.dtypes:
            arguments = case.draw(case.shapes[-1], dtype, device)
            upstream = testing.upstream_of(case, arguments, dtype, device, 0)
            first, second = (testing.results(case, case.function, arguments, upstream) for _ in range(2))
            if not testing.same_bits(first, second):
                raise SystemExit(f"{case.name}, {dtype}: the second call gave other bits than the first")
        print(case.name, flush=True)

    weights = [torch.randn(shape, device=device) for shape in ((5, 127), (16, 64), (3, 1536))]
    codes, scales = map(list, zip(*kernels.quantize_int6(weights), strict=True))
    rounded = kernels.dequantize_int6(codes, scales)
    packed = kernels.pack_int6(codes)
    unpacked = kernels.unpack_int6(packed, [weight.shape[1] for weight in weights])
    if not all(map(torch.equal, rounded, kernels.fake_quantize_int6(weights))):
        raise SystemExit("fake_quantize_int6 of a list is not what quantize_int6 and dequantize_int6 give")
    if not all(map(torch.equal, codes, unpacked)):
        raise SystemExit("unpack_int6 of a list is not what pack_int6 packed")
    buffers, gradients = ([torch.randn_like(weight) for weight in weights] for _ in range(2))
    clip = clip_factors(square_sums([*gradients, torch.randn(7, device=device).bfloat16()]), 0.3)
    buffers[0] *= 1e-20  # a norm at which the matrix is scaled before the products
    gradients[0] *= 1e-20
    updates = momentum_newton_schulz_(buffers, gradients, momentum=0.9, nesterov=True, clip=clip[0])
    aligned = [torch.randn(16, 64, device=device), torch.randn(3, 1536, device=device)]
    muon_update_(aligned, [updates[1], updates[2]], [1.0, 1.0], lr=0.1, weight_decay=0.1)
    kernels.newton_schulz([torch.randn(512, 512, device=device) for _ in range(9)])  # large tiles, which take others
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
