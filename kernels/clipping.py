"""Clipping gradients by their global norm: one read of them gives the factor; whoever uses a gradient multiplies by it.

Shapes: T tensors; S sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.addresses import KeptTables, as_tensors, kept_tables, table_on, typed_pointer
from kernels.launch import cdiv, launch, tl, triton
from kernels.registration import is_traced

CHUNK = 8192  # elements whose squares one program adds up
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def square_sum(p_like, p_tensor, r_E):
    """The sum of squares, in float64, of these elements of a tensor, which is of p_like's dtype."""
    VECTOR: tl.constexpr = 128 // p_like.dtype.element_ty.primitive_bitwidth
    p_x = typed_pointer(p_like, p_tensor, VECTOR)
    x = tl.load(p_x + r_E, mask=r_E < tl.load(p_tensor + 1), other=0).to(tl.float64)
    return tl.sum(x * x, axis=0)


@triton.jit
def square_sums_kernel(p_chunks, p_tensors, p_float32, p_bfloat16, p_float16, p_sums, b_E: tl.constexpr):
    """sums[i] = the sum of squares of chunk i, b_E elements of one tensor, in float64. A chunk a program.

    `p_chunks` is int32 [., 2]: tensor, number of the chunk in it; `p_tensors` int64 [T, 3]: an address, at a multiple
    of 16 bytes, the size, and the dtype by its number in `DTYPES`. `p_float32` and so on are any tensor of that dtype,
    None where there is none.
    """
    chunk = tl.program_id(0)
    p_tensor = p_tensors + 3 * tl.load(p_chunks + 2 * chunk)
    r_E = tl.load(p_chunks + 2 * chunk + 1).to(tl.int64) * b_E + tl.arange(0, b_E)
    dtype = tl.load(p_tensor + 2)
    square = tl.full((), 0, tl.float64)
    if p_float32 is not None and dtype == 0:
        square = square_sum(p_float32, p_tensor, r_E)
    if p_bfloat16 is not None and dtype == 1:
        square = square_sum(p_bfloat16, p_tensor, r_E)
    if p_float16 is not None and dtype == 2:
        square = square_sum(p_float16, p_tensor, r_E)
    tl.store(p_sums + chunk, square)


@triton.jit(do_not_specialize=["SUMS", "LARGEST"])
def clip_factors_kernel(p_sums, p_factors, SUMS, LARGEST, b_S: tl.constexpr):
    """factors = (f, 1 / f), f = min(1, LARGEST / (sqrt(the sum of all) + 1e-6)). One program."""
    square_S = tl.zeros((b_S,), tl.float64)
    for start in range(0, SUMS, b_S):
        r_S = start + tl.arange(0, b_S)
        square_S += tl.load(p_sums + r_S, mask=r_S < SUMS, other=0)
    norm = tl.sqrt(tl.sum(square_S, axis=0))
    factor = LARGEST / (norm + 1e-6)
    factor = tl.where(factor > 1, 1, factor)  # NaN stays NaN
    tl.store(p_factors, factor.to(tl.float32))
    tl.store(p_factors + 1, (1 / factor).to(tl.float32))


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Float64 `[S]`, which add up to the sum of squares of all elements.

    Args:
        tensors: at least one, on one device, of any shapes and float dtypes.
    """
    run = reference.square_sums
    if not is_traced((tensors,)):
        run = dispatch.implementation("square_sums", tensors[0])
    return run(tensors)


def clip_factors(sums: Tensor, largest: float) -> Tensor:
    """What clips gradients to a global norm of `largest`, and its inverse: float32 `[2]`.

        f = min(1, largest / (sqrt(sum_i sums[i]) + 1e-6))

    Args:
        sums: as `square_sums` gives them.
    """
    run = reference.clip_factors
    if not is_traced((sums,)):
        run = dispatch.implementation("clip_factors", sums)
    return run(sums, largest)


class _Work(NamedTuple):
    """Tables for `square_sums_kernel`."""

    chunks: Tensor
    tensors: Tensor
    programs: int
    first_of_dtypes: tuple[int | None, ...]  # for each of `DTYPES` the index of a tensor; None if there is none
    bytes: int


_works = KeptTables()


@kept_tables
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    chunks = [(tensor, chunk) for tensor, size in enumerate(sizes) for chunk in range(cdiv(size, CHUNK))]
    return table_on(device, chunks, torch.int32)


@dispatch.register_triton("square_sums")
def _square_sums(tensors: Sequence[Tensor]) -> Tensor:
    tensors = as_tensors(tensors)
    addresses, dtypes, shapes = tensors.addresses, tensors.dtypes, tensors.shapes
    if addresses is None or not set(DTYPES).issuperset(dtypes):
        return reference.square_sums(tensors)
    device = tensors[0].device

    def make() -> _Work:
        sizes = tuple(map(math.prod, shapes))
        chunks = _chunks(sizes, device)
        rows = list(zip(addresses, sizes, map(DTYPES.index, dtypes), strict=True))
        firsts = tuple([dtypes.index(dtype) if dtype in dtypes else None for dtype in DTYPES])
        moved = sum([size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True)])
        return _Work(chunks, table_on(device, rows, torch.int64), len(chunks), firsts, moved)

    work = _works.get(device, (addresses, dtypes, shapes), make)
    sums = torch.empty(work.programs, dtype=torch.float64, device=device)
    likes = [None if index is None else tensors[index] for index in work.first_of_dtypes]
    launch(
        square_sums_kernel,
        (work.programs,),
        (work.chunks, work.tensors, *likes, sums),
        (),
        (CHUNK,),
        num_warps=8,
        counted=lambda: (work.bytes, 0.0),
    )
    return sums


@dispatch.register_triton("clip_factors")
def _clip_factors(sums: Tensor, largest: float) -> Tensor:
    factors = sums.new_empty(2, dtype=torch.float32)
    launch(clip_factors_kernel, (1,), (sums, factors), (len(sums), float(largest)), (1024,))
    return factors
