"""How a Triton kernel is started, and Triton itself where it is installed.

Every kernel takes its tensors first (None for one that is not there), then its run-time sizes, which it names
in `do_not_specialize`, then its compile-time constants. `launch` counts on that order.
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
    num_warps: int = 4,
    cooperative: bool = False,
    counted: Counted | None = None,
) -> None:
    """`kernel[grid](*tensors, *sizes, *constants)` on the device of the first tensor.

    With `cooperative` all programs are resident at once; where the device cannot hold them, the start fails.
    `counted` is given where that is not to touch these tensors once, and nothing more.

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
        raise ValueError(f"{kernel.__name__} was given {sizes[0]} rows; it takes at most {MAX_ROWS}")
    device = tensors[0].get_device()
    if device < 0:
        kernel[grid](*tensors, *sizes, *constants)
        return
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            options = {"num_warps": num_warps, "cooperative": cooperative, "counted": counted}
            launch(kernel, grid, tensors, sizes, constants, **options)
        return
    key: list = [id(kernel), device, num_warps, cooperative, constants]
    pointers, misaligned = [], 0
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
            key.append(None)
        else:
            pointer = tensor.data_ptr()
            misaligned |= pointer
            pointers.append(pointer)
            key.append(tensor.dtype)
    if misaligned % VECTOR:
        kernel[grid](*tensors, *sizes, *constants, num_warps=num_warps, launch_cooperative_grid=cooperative)
        return
    for size in sizes:
        key.append(size >= 2**31)  # those Triton takes as int64
    key = tuple(key)
    kept = _compiled.get(key)
    if kept is None:
        options = {"num_warps": num_warps, "launch_cooperative_grid": cooperative}
        compiled = kernel[grid](*tensors, *sizes, *constants, **options)
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)
        return
    run, function, metadata = kept
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, current_stream(device), function, metadata, None, None, None, *pointers, *sizes, *constants)


@functools.cache
def processors(device: torch.device) -> int:
    """How many a CUDA device has; 1 for the interpreter, which runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def current_stream(device: int) -> int:
    """The handle of this thread's stream on a CUDA device. PyTorch's object for it takes the host longer."""
    return triton.runtime.driver.active.get_current_stream(device)


def launch_with_descriptors(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple,
    device: torch.device,
    *,
    num_warps: int,
    num_stages: int = 3,
    cooperative: bool = False,
    counted: Counted,
) -> None:
    """`kernel[grid](*arguments)` on a device, for kernels that the copy engine's descriptors go to.

    `cooperative` as for `launch`, which keeps what was compiled in the same way.
    """
    options: dict = {"num_warps": num_warps, "num_stages": num_stages}
    if device.type != "cuda":
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        traits = map(_trait, kernel.params, arguments)
        key = (id(kernel), device, num_warps, num_stages, cooperative, *traits)
        kept = _compiled.get(key)
        if kept is None:
            compiled = kernel[grid](*arguments, **options, launch_cooperative_grid=cooperative)
            _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = kept
        x, y, z = (*grid, 1, 1)[:3]
        stream = current_stream(torch.cuda.current_device())
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)


def _trait(parameter: Any, argument: Any) -> Any:
    """What the code compiled for an argument depends on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % VECTOR == 0
    if hasattr(argument, "block_shape"):  # a descriptor
        return argument.base.dtype, *argument.block_shape
    return argument >= 2**31 if parameter.do_not_specialize else argument


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
