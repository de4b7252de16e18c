"""Clipping gradients by their global norm: one read of them gives the factor; whoever uses a gradient multiplies by it.

Shapes: T tensors; S sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.addresses import KeptTables, aligned_addresses, kept_tables, table_on, typed_pointer
from kernels.launch import cdiv, launch, tl, triton
from kernels.registration import is_traced

CHUNK = 8192  # elements whose squares one program adds up
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


@triton.jit
def square_sums_kernel(p_first, p_chunks, p_tensors, p_sums, VECTOR: tl.constexpr, b_E: tl.constexpr):
    """sums[i] = the sum of squares of chunk i, b_E elements of one tensor, in float64. A chunk a program.

    `p_chunks` is int32 [., 2]: tensor, number of the chunk in it; `p_tensors` int64 [T, 2]: an address, at a multiple
    of VECTOR elements, and the size.
    """
    chunk = tl.program_id(0)
    p_tensor = p_tensors + 2 * tl.load(p_chunks + 2 * chunk)
    p_x = typed_pointer(p_first, p_tensor, VECTOR)
    r_E = tl.load(p_chunks + 2 * chunk + 1).to(tl.int64) * b_E + tl.arange(0, b_E)
    x = tl.load(p_x + r_E, mask=r_E < tl.load(p_tensor + 1), other=0).to(tl.float64)
    tl.store(p_sums + chunk, tl.sum(x * x, axis=0))


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


class _Part(NamedTuple):
    """The tensors of one dtype, for `square_sums_kernel`."""

    first: int
    chunks: Tensor
    tensors: Tensor
    programs: int
    size: int  # elements


_parts = KeptTables()


@kept_tables
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    chunks = [(tensor, chunk) for tensor, size in enumerate(sizes) for chunk in range(cdiv(size, CHUNK))]
    return table_on(device, chunks, torch.int32)


@dispatch.register_triton("square_sums")
def _square_sums(tensors: Sequence[Tensor]) -> Tensor:
    addresses, dtypes = aligned_addresses(tensors), tuple([tensor.dtype for tensor in tensors])
    if addresses is None or not DTYPES.issuperset(dtypes):
        return reference.square_sums(tensors)
    device, sizes = tensors[0].device, tuple(map(Tensor.numel, tensors))

    def make() -> list[_Part]:
        parts = []
        for dtype in dict.fromkeys(dtypes):
            own = [index for index, its_dtype in enumerate(dtypes) if its_dtype is dtype]
            own_sizes = tuple([sizes[index] for index in own])
            chunks = _chunks(own_sizes, device)
            table = table_on(device, [(addresses[index], sizes[index]) for index in own], torch.int64)
            parts.append(_Part(own[0], chunks, table, len(chunks), sum(own_sizes)))
        return parts

    parts = _parts.get(device, (addresses, dtypes, sizes), make)
    sums = torch.empty(sum([part.programs for part in parts]), dtype=torch.float64, device=device)
    begin = 0
    for part in parts:
        first = tensors[part.first]
        own = sums[begin : begin + part.programs]
        begin += part.programs
        launch(
            square_sums_kernel,
            (part.programs,),
            (first, part.chunks, part.tensors, own),
            (),
            (16 // first.itemsize, CHUNK),
            num_warps=8,
            counted=lambda part=part, first=first: (part.size * first.itemsize, 0.0),
        )
    return sums


@dispatch.register_triton("clip_factors")
def _clip_factors(sums: Tensor, largest: float) -> Tensor:
    factors = sums.new_empty(2, dtype=torch.float32)
    launch(clip_factors_kernel, (1,), (sums, factors), (len(sums), float(largest)), (1024,))
    return factors
