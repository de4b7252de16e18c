"""How a Triton kernel is started, and Triton itself where it is installed.

Every kernel takes its descriptors first, then its tensors (of either None for one that is not there), then its run-time
sizes, which it names in `do_not_specialize`, then the integers that Triton specializes on and its compile-time
constants. `launch` counts on that order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a platform without Triton: the kernels are never started there

    class triton:
        """Stands in for the decorator alone."""

        @staticmethod
        def jit(function: Callable | None = None, **options: Any) -> Callable:
            return function if function is not None else lambda function: function

    tl = None

MAX_ROWS = 2**30
MAX_COLUMNS = 2**20  # of a row that a program has whole: Triton's largest tile
VECTOR = 16  # bytes of the widest load, and what the copy engine's addresses and strides are multiples of

# What a kernel has to do at least: bytes read and written, operations of products. For who watches launches
# (`bench.kernel_work`); nothing here calls it.
Counted = Callable[[], tuple[float, float]]

_compiled: dict[tuple, tuple] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: tuple,
    *,
    descriptors: tuple[Any, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    cooperative: bool = False,
    counted: Counted | None = None,
) -> None:
    """`kernel[grid](*descriptors, *tensors, *sizes, *constants)` on the device of the first descriptor or tensor.

    `descriptors` are the copy engine's, each of one layout for one kernel; the first is there. With `cooperative` all
    programs are resident at once; where the device cannot hold them, the start fails. `counted` is given where a kernel
    has descriptors, or does not touch its tensors once, and nothing more.

    Triton's own start of a kernel looks at every argument anew, which takes the host longer than the smaller
    kernels run. So what was compiled for these dtypes, constants and 16-byte aligned tensors is kept and started
    with plain addresses. Launch hooks (`triton.knobs.runtime`), Triton's own profiler among them, see the first
    start alone.

    Raises:
        ValueError: the first size, which counts rows, leaves no room for the last tile in an int32.
    """
    if 0 in grid:
        return
    if sizes and sizes[0] > MAX_ROWS:
        raise ValueError(f"{kernel.__name__} was given {sizes[0]} rows or items; it takes at most {MAX_ROWS}")
    device = (descriptors[0].base if descriptors else tensors[0]).get_device()
    if device < 0:
        kernel[grid](*descriptors, *tensors, *sizes, *constants)
        return
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            options = {"num_warps": num_warps, "num_stages": num_stages, "cooperative": cooperative, "counted": counted}
            launch(kernel, grid, tensors, sizes, constants, descriptors=descriptors, **options)
        return
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    blocks = [None if each is None else (each.base.dtype, *each.block_shape) for each in descriptors]
    wide = [size >= 2**31 for size in sizes]  # those Triton takes as int64
    key = (id(kernel), device, num_warps, num_stages, cooperative, constants, *dtypes, *blocks, *wide)
    kept = _compiled.get(key)
    misaligned = any([pointer is not None and pointer % VECTOR for pointer in pointers])
    if kept is None or misaligned:
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_cooperative_grid": cooperative}
        compiled = kernel[grid](*descriptors, *tensors, *sizes, *constants, **options)
        if not misaligned:
            _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)
        return
    run, function, metadata = kept
    x, y, z = (*grid, 1, 1)[:3]
    arguments = (*descriptors, *pointers, *sizes, *constants)
    run(x, y, z, current_stream(device), function, metadata, None, None, None, *arguments)


@functools.cache
def processors(device: torch.device) -> int:
    """How many a CUDA device has; 1 for the interpreter, which runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def current_stream(device: int) -> int:
    """The handle of this thread's stream on a CUDA device. PyTorch's object for it takes the host longer."""
    return triton.runtime.driver.active.get_current_stream(device)


@triton.jit
def number_of(p_number, NUMBER):
    """A number given by address, or where there is none by value."""
    if p_number is not None:
        NUMBER = tl.load(p_number).to(tl.float32)
    return NUMBER


def tensor_and_number(value: float | Tensor) -> tuple[Tensor | None, float]:
    """What `number_of` takes for a tensor `[]`, or for a number."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its elements in a row, a copy where they were not; None for None."""
    return None if tensor is None else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor with its elements in a row from a multiple of `VECTOR`: matrix products choose their way by that."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % VECTOR else tensor


def piece_of(flat: Tensor, shape: Sequence[int], strides: Sequence[int], start: int) -> Tensor:
    """A tensor in the memory of `flat`; no view, so that changing one result leaves autograd's record of the others."""
    return flat.new_empty(0).set_(flat.untyped_storage(), start, shape, strides)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def compute_dtype(dtype: torch.dtype) -> Any:
    """What a kernel computes in, as Triton names it: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
