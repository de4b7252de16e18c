"""Sums of rows by id in a fixed order: the gradient of a lookup table, without atomics.

The entries are sorted by id, and each id's run of entries is cut into tasks of CHUNK; a task is summed by one
program, the tasks of an id by another. What one id is worth thus never depends on when a program ran.

Shapes: M entries, N rows (entry m stands for row m mod N), S ids, D channels, J tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import cdiv, compute_dtype, launch, tl, triton
from kernels.tuning import next_power_of_2, tile

CHUNK = 64


class SegmentOrder(NamedTuple):
    """Which entries belong to which id, and how they are shared out. Depends on the ids alone."""

    entry_M: Tensor  # int64: entries by id, and by number within one id
    first_entry_S1: Tensor  # int32: id s has the sorted entries first_entry[s] to first_entry[s + 1]
    first_task_S1: Tensor  # int32: and the tasks first_task[s] to first_task[s + 1]
    id_J: Tensor  # int32: the id of each task, S for tasks that are not needed


@triton.jit
def count_below(p_sorted, bound, count, STEPS: tl.constexpr):
    """How many of the first `count` of the sorted numbers are below each bound, by bisection: 2^STEPS > count."""
    low = tl.zeros_like(bound)
    high = low + count
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        below = (low < high) & (tl.load(p_sorted + middle, mask=low < high, other=0).to(tl.int32) < bound)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["M", "S"])
def first_entry_kernel(p_sorted, p_first, M, S, STEPS: tl.constexpr, b_S: tl.constexpr):
    """first[s] = how many of the M sorted ids are below s."""
    r_S = tl.program_id(0) * b_S + tl.arange(0, b_S)
    tl.store(p_first + r_S, count_below(p_sorted, r_S, M, STEPS), mask=r_S <= S)


@triton.jit(do_not_specialize=["S"])
def first_task_kernel(p_first_entry, p_first_task, S, CHUNK: tl.constexpr, b_S: tl.constexpr):
    """first_task[s] = the sum over ids below s of ceil(entries / CHUNK). One program."""
    total = 0
    for first in range(0, S + 1, b_S):
        r_S = first + tl.arange(0, b_S)
        m_S = r_S < S
        entries = tl.load(p_first_entry + r_S + 1, mask=m_S, other=0) - tl.load(p_first_entry + r_S, mask=m_S, other=0)
        tasks = (entries + CHUNK - 1) // CHUNK
        tl.store(p_first_task + r_S, total + tl.cumsum(tasks, axis=0) - tasks, mask=r_S <= S)
        total += tl.sum(tasks, axis=0)


@triton.jit(do_not_specialize=["S", "J"])
def task_id_kernel(p_first_task, p_id, S, J, STEPS: tl.constexpr, b_J: tl.constexpr):
    """id[j] = how many ids' tasks all come before task j; S where j is past the last task."""
    r_J = tl.program_id(0) * b_J + tl.arange(0, b_J)
    tl.store(p_id + r_J, count_below(p_first_task + 1, r_J + 1, S, STEPS), mask=r_J < J)


@triton.jit(do_not_specialize=["S", "N"])
def segment_sum_kernel(
    p_x, p_entry, p_first_entry, p_first_task, p_id, p_sums, S, N,
    D: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, b_M: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """sums[j] = the sum of x's rows over the entries of task j, b_M entries at a time."""
    task = tl.program_id(0)
    segment = tl.load(p_id + task)
    if segment < S:
        first = tl.load(p_first_entry + segment) + (task - tl.load(p_first_task + segment)) * CHUNK
        last = tl.minimum(first + CHUNK, tl.load(p_first_entry + segment + 1))
        r_D = tl.program_id(1) * b_D + tl.arange(0, b_D)
        m_D = r_D < D
        sums = tl.zeros((b_M, b_D), COMPUTE)
        # unrolled, so that many rows are on their way at a time
        for start in tl.range(first, last, b_M, loop_unroll_factor=8):
            r_M = start + tl.arange(0, b_M)
            m_M = r_M < last
            row_M = (tl.load(p_entry + r_M, mask=m_M, other=0).to(tl.int32) % N).to(tl.int64)
            mask = m_M[:, None] & m_D[None, :]
            sums += tl.load(p_x + row_M[:, None] * D + r_D[None, :], mask=mask, other=0).to(COMPUTE)
        tl.store(p_sums + task.to(tl.int64) * D + r_D, tl.sum(sums, axis=0), mask=m_D)


@triton.jit(do_not_specialize=["BEGIN"])
def segment_total_kernel(
    p_sums, p_first_task, p_scale, p_table, p_total, p_dot, BEGIN,
    D: tl.constexpr, COMPUTE: tl.constexpr, b_J: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """total[s] = scale * the sum of the tasks' sums of id BEGIN + s; dot[s] = <that sum, table[s]>."""
    segment = tl.program_id(0)
    first = tl.load(p_first_task + BEGIN + segment)
    last = tl.load(p_first_task + BEGIN + segment + 1)
    r_D = tl.program_id(1) * b_D + tl.arange(0, b_D)
    m_D = r_D < D
    total = tl.zeros((b_J, b_D), COMPUTE)
    for task in range(first, last, b_J):
        r_J = task + tl.arange(0, b_J)
        offsets = r_J.to(tl.int64)[:, None] * D + r_D[None, :]
        total += tl.load(p_sums + offsets, mask=(r_J < last)[:, None] & m_D[None, :], other=0)
    total = tl.sum(total, axis=0)
    offsets = segment.to(tl.int64) * D + r_D
    if p_dot is not None:
        row = tl.load(p_table + offsets, mask=m_D, other=0).to(COMPUTE)
        tl.store(p_dot + segment * tl.num_programs(1) + tl.program_id(1), tl.sum(total * row, axis=0))
    if p_scale is not None:
        total *= tl.load(p_scale).to(COMPUTE)
    tl.store(p_total + offsets, total.to(p_total.dtype.element_ty), mask=m_D)


def id_dtype(num_ids: int) -> torch.dtype:
    """The narrowest dtype that holds ids up to `num_ids`: the fewer bits, the faster the sort."""
    return torch.int16 if num_ids < 2**15 else torch.int32


def segment_order(id_M: Tensor, num_ids: int) -> SegmentOrder:
    """The order of the entries `id_M`, an integer tensor; an id of `num_ids` or above is left out."""
    sorted_M, entry_M = torch.sort(id_M, stable=True)
    entries = len(id_M)
    first_entry_S1, first_task_S1 = (id_M.new_empty(num_ids + 1, dtype=torch.int32) for _ in range(2))
    tasks = cdiv(entries, CHUNK) + min(num_ids, entries)
    id_J = id_M.new_empty(tasks, dtype=torch.int32)
    block = 128
    grid = (cdiv(num_ids + 1, block),)
    launch(first_entry_kernel, grid, (sorted_M, first_entry_S1), (entries, num_ids), (entries.bit_length(), block))
    block = min(next_power_of_2(num_ids + 1), 4096)
    launch(first_task_kernel, (1,), (first_entry_S1, first_task_S1), (num_ids,), (CHUNK, block), num_warps=8)
    block = 128
    constants = (num_ids.bit_length(), block)
    launch(task_id_kernel, (cdiv(tasks, block),), (first_task_S1, id_J), (num_ids, tasks), constants)
    return SegmentOrder(entry_M, first_entry_S1, first_task_S1, id_J)


def segment_sums(x_ND: Tensor, order: SegmentOrder) -> Tensor:
    """The sum of every task `[J, D]`, in float32 (float64 for float64)."""
    rows, channels = x_ND.shape
    sums_JD = x_ND.new_empty((len(order.id_J), channels), dtype=torch.promote_types(x_ND.dtype, torch.float32))
    b_M, b_D, num_warps = tile("segment_sum", channels, x_ND.get_device())
    grid = (len(order.id_J), cdiv(channels, b_D))
    tensors = (x_ND, *order, sums_JD)
    sizes = (len(order.first_entry_S1) - 1, rows)
    constants = (channels, compute_dtype(x_ND.dtype), CHUNK, b_M, b_D)
    launch(segment_sum_kernel, grid, tensors, sizes, constants, num_warps=num_warps)
    return sums_JD


def segment_totals(
    sums_JD: Tensor,
    order: SegmentOrder,
    begin: int,
    table_SD: Tensor,
    scale: Tensor | None = None,
    *,
    with_dot: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """scale * the sum of each id from `begin` on, one for each row of `table_SD` and like it.

    Also, if asked for, the inner product of all those sums, before the scale, with the table: `[]`, unrounded.
    """
    total_SD = torch.empty_like(table_SD)
    num_ids, channels = table_SD.shape
    b_J, b_D, num_warps = tile("segment_total", channels, sums_JD.get_device())
    grid = (num_ids, cdiv(channels, b_D))
    dot_SC = sums_JD.new_empty(grid) if with_dot else None
    tensors = (sums_JD, order.first_task_S1, scale, table_SD if with_dot else None, total_SD, dot_SC)
    constants = (channels, compute_dtype(sums_JD.dtype), b_J, b_D)
    launch(segment_total_kernel, grid, tensors, (begin,), constants, num_warps=num_warps)
    return total_SD, dot_SC.sum() if with_dot else None
