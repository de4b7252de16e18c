"""Many matrices in one launch: a table on the device tells every program which matrix is its own, and where it is.

A kernel that can do both takes `(*inputs, *results, p_table, R, C, *constants, b_N)`. For one matrix `p_table` is
None; for many, R and C and the pointers come out of the table, int64 [fields, b_N] with a column a matrix: its first
program, R, C, the addresses of its inputs, the elements at which its results start in an allocation they all share.

Shapes: N matrices, padded to b_N; R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.addresses import KeptTables, table_on
from kernels.launch import launch, piece_of, tl, triton
from kernels.registration import is_traced
from kernels.tuning import next_power_of_2

ALIGNMENT = 16  # bytes: every result starts at a multiple, so that it can be written in the widest words


@triton.jit
def find_matrix(p_table, R, C, b_N: tl.constexpr):
    """(this program's matrix, the program's number within it, R, C)."""
    matrix = 0
    program = tl.program_id(0)
    if p_table is not None:
        first_N = tl.load(p_table + tl.arange(0, b_N))
        # Matrices without programs begin where the next one does, so the last that has begun is never one of them.
        matrix = tl.sum((first_N <= program).to(tl.int32), axis=0) - 1
        program -= tl.load(p_table + matrix).to(tl.int32)
        R = tl.load(p_table + b_N + matrix).to(tl.int32)
        C = tl.load(p_table + 2 * b_N + matrix).to(tl.int32)
    return matrix, program, R, C


@triton.jit
def input_pointer(p_x, p_table, matrix, FIELD: tl.constexpr, ALIGNED: tl.constexpr, b_N: tl.constexpr):
    """Where an input of the matrix begins, at a multiple of ALIGNED elements."""
    if p_table is not None:
        BYTES: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth // 8
        p_x = tl.multiple_of(tl.load(p_table + FIELD * b_N + matrix).to(p_x.dtype), ALIGNED * BYTES)
    return p_x


@triton.jit
def result_pointer(p_y, p_table, matrix, FIELD: tl.constexpr, b_N: tl.constexpr):
    """Where a result of the matrix begins."""
    if p_table is not None:
        BYTES: tl.constexpr = p_y.dtype.element_ty.primitive_bitwidth // 8
        p_y += tl.multiple_of(tl.load(p_table + FIELD * b_N + matrix), 16 // BYTES)
    return p_y


class Work(NamedTuple):
    """What is to be done for one matrix."""

    kernel: Any
    programs: int
    rows: int
    columns: int
    constants: tuple
    num_warps: int
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape and dtype of each


class _Group(NamedTuple):
    """The matrices that one launch does."""

    work: Work  # of its first matrix: the kernel, the constants and the warps are the same for all
    first: int  # which matrix that is
    programs: int
    moved: int  # bytes read and written
    table: Tensor


class _Batch(NamedTuple):
    """A list of matrices, ready to be launched."""

    groups: list[_Group]
    sizes: list[tuple[int, torch.dtype]]  # of the allocation that holds all results of a kind
    parts: list[list[tuple[tuple[int, ...], tuple[int, ...], int]]]  # shape, strides, start: by kind, then matrix
    b_N: int


_batches = KeptTables()
_all_at_once: dict[Callable, Callable] = {}


def is_list(value: object) -> bool:
    """Whether an op was given several tensors. A list of anything else is a wrong argument for one tensor."""
    return isinstance(value, (list, tuple)) and (len(value) == 0 or isinstance(value[0], Tensor))


def all_at_once(op: Callable) -> Callable[[Callable], Callable]:
    """Decorates the function that does in a few launches what calling `op` for each matrix does."""

    def register(function: Callable) -> Callable:
        _all_at_once[op] = function
        return function

    return register


def for_each(name: str, matrices: Sequence[Tensor], *others: Sequence) -> list | tuple:
    """Op `name` of each of the matrices, with its entries of `others`; in the structure of `matrices`."""
    if len(matrices) == 0:
        return matrices[:]
    op = dispatch.implementation(name, matrices[0])
    if op in _all_at_once and not is_traced(matrices):
        results = _all_at_once[op](matrices, *others)
    else:
        results = [op(*arguments) for arguments in zip(matrices, *others, strict=True)]
    return tuple(results) if isinstance(matrices, tuple) else list(results)


def offset_and_device(tensor: Tensor) -> tuple[int, int]:
    """How many bytes past a multiple of 16 a tensor begins, and its device's number (-1: the CPU)."""
    return tensor.data_ptr() % 16, tensor.get_device()


def run_one(work: Work, *inputs: Tensor) -> list[Tensor]:
    """The results for one matrix."""
    results = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in work.results]
    tensors = (*inputs, *results, None)
    constants = (*work.constants, 1)
    launch(work.kernel, (work.programs,), tensors, (work.rows, work.columns), constants, num_warps=work.num_warps)
    return results


def run_all(plan: Callable[..., Work], arguments: list[tuple]) -> list[list[Tensor]]:
    """By kind of result, that of every matrix, whose work is `plan(*arguments[i])`; few launches do them all.

    The tensors among the arguments are the inputs: contiguous, on one device, of any dtypes. The results of one
    kind have one dtype and share one allocation.
    """
    device = arguments[0][0].device
    traits = [[(x.data_ptr(), x.dtype, x.shape) if isinstance(x, Tensor) else x for x in xs] for xs in arguments]
    # all that a table holds is in the key
    batch = _batches.get(device, (plan, *map(tuple, traits)), lambda: _prepare(plan, arguments, device))
    flats = [torch.empty(size, dtype=dtype, device=device) for size, dtype in batch.sizes]
    for work, first, programs, moved, table in batch.groups:
        tensors = (*_tensors(arguments[first]), *flats, table)
        constants = (*work.constants, batch.b_N)
        launch(
            work.kernel,
            (programs,),
            tensors,
            (0, 0),
            constants,
            num_warps=work.num_warps,
            counted=lambda moved=moved: (moved, 0.0),
        )
    return [[piece_of(flat, *part) for part in parts] for flat, parts in zip(flats, batch.parts, strict=True)]


def _prepare(plan: Callable[..., Work], arguments: list[tuple], device: torch.device) -> _Batch:
    works = [plan(*values) for values in arguments]
    dtypes = [dtype for _, dtype in works[0].results]
    ends = [0] * len(dtypes)
    parts = [[] for _ in dtypes]
    members: dict[tuple, list[int]] = {}
    for index, work in enumerate(works):
        for kind, (shape, dtype) in enumerate(work.results):
            parts[kind].append((shape, torch.empty(shape, device="meta").stride(), ends[kind]))
            unit = ALIGNMENT // dtype.itemsize
            ends[kind] += -(-torch.Size(shape).numel() // unit) * unit
        input_dtypes = tuple(tensor.dtype for tensor in _tensors(arguments[index]))
        members.setdefault((work.kernel, work.constants, work.num_warps, input_dtypes), []).append(index)

    b_N = next_power_of_2(max(map(len, members.values())))
    tables, totals, moved = [], [], []
    for indices in members.values():
        columns, programs = [], 0
        for index in indices:
            work = works[index]
            addresses = [tensor.data_ptr() for tensor in _tensors(arguments[index])]
            columns.append([programs, work.rows, work.columns, *addresses, *(of_kind[index][2] for of_kind in parts)])
            programs += work.programs
        # The padding begins after the last program: no program finds it.
        columns += [[programs] * len(columns[0])] * (b_N - len(columns))
        tables.append(list(zip(*columns, strict=True)))
        totals.append(programs)
        moved.append(sum(_bytes(works[index], arguments[index]) for index in indices))
    on_device = table_on(device, tables, torch.int64)
    groups = [
        _Group(works[indices[0]], indices[0], *of_group)
        for indices, *of_group in zip(members.values(), totals, moved, on_device, strict=True)
    ]
    return _Batch(groups, list(zip(ends, dtypes, strict=True)), parts, b_N)


def _bytes(work: Work, values: tuple) -> int:
    """That the inputs and results of one matrix have."""
    results = sum(math.prod(shape) * dtype.itemsize for shape, dtype in work.results)
    return sum(tensor.nbytes for tensor in _tensors(values)) + results


def _tensors(values: tuple) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
