"""A matrix product whose result is finished before it is written: squared, added to, multiplied by a derivative.

Shapes: M rows, N columns of the result, K summed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.launch import VECTOR, aligned, cdiv, launch, processors, tl, triton
from kernels.tuning import Product, products

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:  # a platform without Triton
    TensorDescriptor = None


@triton.jit
def finish(x, d_other, d_c, row, column, EPILOGUE: tl.constexpr):
    """Writes the finished x to d_c at [row, column]."""
    if EPILOGUE == "added":
        if d_other is not None:
            x += d_other.load([row, column]).to(tl.float32)
    elif EPILOGUE == "squared_relu":
        x = tl.where(x < 0, 0, x)  # unlike a maximum it keeps a NaN
        x *= x
    else:
        x *= 2 * tl.sqrt(d_other.load([row, column]).to(tl.float32))
    d_c.store([row, column], x.to(d_c.dtype))


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    d_a, d_b, d_other, d_c, M, N, K,
    EPILOGUE: tl.constexpr, B_TRANSPOSED: tl.constexpr, FLATTEN: tl.constexpr, INTERPRETED: tl.constexpr,
    b_M: tl.constexpr, b_N: tl.constexpr, b_K: tl.constexpr,
):  # fmt: skip
    """c = finished(a b), b given as [N, K] with B_TRANSPOSED. Programs take tiles in turn, those of one row together.

    A tile is finished in two halves, so that less shared memory for it comes off the stages'.
    """
    columns = tl.cdiv(N, b_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, b_M) * columns, tl.num_programs(0), flatten=FLATTEN):
        row = tile // columns * b_M
        column = tile % columns * b_N
        x = tl.zeros((b_M, b_N), tl.float32)
        for k in range(0, K, b_K):
            a = d_a.load([row, k])
            b = d_b.load([column, k]).T if B_TRANSPOSED else d_b.load([k, column])
            if INTERPRETED:  # which cannot multiply bfloat16
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, b, x)
        left, right = tl.split(tl.permute(tl.reshape(x, (b_M, 2, b_N // 2)), (0, 2, 1)))
        finish(left, d_other, d_c, row, column, EPILOGUE)
        finish(right, d_other, d_c, row, column + b_N // 2, EPILOGUE)


def takes(*tensors: Tensor) -> bool:
    """Whether `matmul` works on these: bfloat16, not empty, rows of whole vectors, an architecture it was tuned on."""
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or not tensor.numel() or tensor.shape[-1] % (VECTOR // tensor.itemsize):
            return False
    return products(tensors[0].get_device()) is not None


def matmul(
    a_MK: Tensor,
    b: Tensor,
    other_MN: Tensor | None = None,
    *,
    epilogue: str,
    b_transposed: bool = False,
    tile: Product | None = None,
) -> Tensor:
    """The product [M, N] of a and b, [K, N] or with `b_transposed` [N, K], accumulated in float32, rounded once.

    `epilogue` is "added": a b + other, if there is one; "squared_relu": relu(a b)^2; or "squared_relu_backward": a b
    times 2 sqrt(other), which is the derivative of relu(h)^2 where other is its value. All tensors as `takes` wants
    them; `tile` is for those who measure.
    """
    a_MK, b = aligned(a_MK), aligned(b)
    rows, depth = a_MK.shape
    columns = b.shape[0] if b_transposed else b.shape[1]
    c_MN = a_MK.new_empty((rows, columns))
    tile = products(a_MK.get_device())[epilogue] if tile is None else tile
    b_M, b_N, b_K = tile.rows, tile.columns, tile.depth
    half = [b_M, b_N // 2]
    d_c = descriptor(c_MN, half)
    d_other = None if other_MN is None else descriptor(aligned(other_MN), half)
    grid = (min(cdiv(rows, b_M) * cdiv(columns, b_N), tile.programs * processors(a_MK.device)),)
    launch(
        matmul_kernel,
        grid,
        (),
        (rows,),
        (columns, depth, epilogue, b_transposed, tile.flatten, not a_MK.is_cuda, b_M, b_N, b_K),
        descriptors=(
            *(descriptor(a_MK, [b_M, b_K]), descriptor(b, [b_N, b_K] if b_transposed else [b_K, b_N]), d_other, d_c),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.stages,
        counted=lambda: work_of_product(rows, columns, depth, (a_MK, b, other_MN, c_MN)),
    )
    return c_MN


def work_of_product(rows: int, columns: int, depth: int, tensors: Sequence[Tensor | None]) -> tuple[float, float]:
    """Bytes and operations of a product that touches these tensors once."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None), 2.0 * rows * columns * depth


def descriptor(tensor: Tensor, block: list[int]) -> Any:
    """Of a contiguous matrix whose rows begin at multiples of 16 bytes, for copies of `block` [rows, columns]."""
    return TensorDescriptor.from_tensor(tensor, block)
