"""The items of `kernels.newton_schulz_tiles` on a Hopper GPU: fetched, multiplied and finished at the same time.

There a tile costs more time around its products than in them: to learn what to do, to wait for what other programs
write, to fetch, to write and to say so. Here warps of their own do each at the same time. Of a program

- one warp takes its items one after another, waits until what they read has been written, and has the copy engine fetch
  it into a ring of slots, as far ahead as there is room;
- two groups of four warps take turns: one multiplies while the other finishes its tile, writes and counts it.

There is one program for each processor, and items are dealt out in turn, so that all three know which come next. That
needs every program to be resident (a cooperative launch): then the first item that is not done waits for nothing, and
the waiting ends.

A slot's halves hold DEPTH columns of a left tile and DEPTH rows of a right one, or the other way round for one that is
transposed; only the first does where both are the same. Or they hold the halves of a tile that is added.

Shapes: S slots, H halves of them; T rows or columns of a tile, K of what a half holds.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernels.launch import Counted, launch, processors, triton
from kernels.newton_schulz_plan import LARGE

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # as it is called before Triton 3.7
except ImportError:  # a platform without Triton, or one that is too old: the kernel is never started there
    gluon, TensorDescriptor = triton, None

DEPTH = 64  # 128 bytes, which is what the copy engine swizzles
BLOCKS = ([LARGE, DEPTH], [DEPTH, LARGE])  # of a tile: columns, rows
SLOTS = 6  # of 32 KB; there is room for no more
# Of a thread of the second group that multiplies and of one that fetches; the first group has what is left.
REGISTERS = (232, 24)


@gluon.jit
def fetch_half(d_columns, d_rows, tile, step, BY_ROWS, columns_HTK, rows_HKT, half, arrived, pred):
    """Has columns of a tile fetched into half a slot, or rows; `step` counts them in DEPTH."""
    T: gl.constexpr = rows_HKT.shape[2]
    K: gl.constexpr = rows_HKT.shape[1]
    if BY_ROWS:
        tma.async_copy_global_to_shared(d_rows, [tile * T + step * K, 0], arrived, rows_HKT.index(half), pred=pred)
    else:
        tma.async_copy_global_to_shared(d_columns, [tile * T, step * K], arrived, columns_HTK.index(half), pred=pred)


@gluon.jit
def fetch_items(d_columns, d_rows, p_items, p_done, ring, ITEMS):
    """Fetches what this program's items read, slot after slot; `n` counts those of all of them."""
    columns_HTK, rows_HKT, arrived_S, free_S = ring
    SLOTS: gl.constexpr = arrived_S.shape[0]
    T: gl.constexpr = rows_HKT.shape[2]
    K: gl.constexpr = rows_HKT.shape[1]
    HALF: gl.constexpr = 2 * T * K  # bytes
    n = 0
    item = gl.program_id(0)
    while item < ITEMS:
        p_item = p_items + 16 * item
        form = gl.load(p_item)
        left = gl.load(p_item + 1)
        left_step = gl.load(p_item + 2)
        right = gl.load(p_item + 3)
        right_step = gl.load(p_item + 4)
        tiles = gl.load(p_item + 5)
        added = gl.load(p_item + 6)
        waits_for = gl.load(p_item + 13)
        count = gl.load(p_item + 14)
        if waits_for >= 0:
            done = gl.atomic_add(p_done + waits_for, 0, sem="acquire")
            while done < count:
                done = gl.atomic_add(p_done + waits_for, 0, sem="acquire")
            # The copy engine sees what programs wrote only past this fence.
            gl.inline_asm_elementwise(
                "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [count], dtype=gl.int32, is_pure=False, pack=1
            )
        same = (left == right) & (left_step == right_step)
        unlike = same == 0
        for tile in range(0, tiles):
            for step in gl.static_range(T // K):
                slot = n % SLOTS
                arrived = arrived_S.index(slot)
                mbarrier.wait(free_S.index(slot), ((n // SLOTS) & 1) ^ 1)
                mbarrier.expect(arrived, HALF, pred=same)
                mbarrier.expect(arrived, 2 * HALF, pred=unlike)
                from_left = left + tile * left_step
                from_right = right + tile * right_step
                half = 2 * slot
                fetch_half(d_columns, d_rows, from_left, step, form == 2, columns_HTK, rows_HKT, half, arrived, True)
                half += 1
                fetch_half(d_columns, d_rows, from_right, step, form != 1, columns_HTK, rows_HKT, half, arrived, unlike)
                n += 1
        if added >= 0:
            slot = n % SLOTS
            arrived = arrived_S.index(slot)
            mbarrier.wait(free_S.index(slot), ((n // SLOTS) & 1) ^ 1)
            mbarrier.expect(arrived, 2 * HALF)
            for step in gl.static_range(T // K):
                fetch_half(d_columns, d_rows, added, step, False, columns_HTK, rows_HKT, 2 * slot + step, arrived, True)
            n += 1
        item += gl.num_programs(0)


@gluon.jit
def add_product(
    product, ring, turn, n, steps, same, added, LEFT_TRANSPOSED: gl.constexpr, RIGHT_TRANSPOSED: gl.constexpr
):
    """The product of left and right tiles, from slot n on; then it is the others' turn."""
    columns_HTK, rows_HKT, arrived_S, free_S = ring
    SLOTS: gl.constexpr = arrived_S.shape[0]
    for step in range(0, steps):
        slot = n % SLOTS
        mbarrier.wait(arrived_S.index(slot), (n // SLOTS) & 1)
        other = 2 * slot + gl.where(same, 0, 1)
        left = rows_HKT.index(2 * slot).permute((1, 0)) if LEFT_TRANSPOSED else columns_HTK.index(2 * slot)
        right = columns_HTK.index(other).permute((1, 0)) if RIGHT_TRANSPOSED else rows_HKT.index(other)
        product = warpgroup_mma(left, right, product, use_acc=step > 0, is_async=True)
        product = warpgroup_mma_wait(1, deps=(product,))
        if step > 0:  # the step before is done with its slot
            barrier()
            mbarrier.arrive(free_S.index((n - 1) % SLOTS), count=1)
        n += 1
    if added >= 0:
        mbarrier.wait(arrived_S.index(n % SLOTS), (n // SLOTS) & 1)
    # Whoever waits for a slot must know that what it held before had arrived: so they wait one after another.
    mbarrier.arrive(turn, count=1)
    product = warpgroup_mma_wait(0, deps=(product,))
    barrier()
    mbarrier.arrive(free_S.index((n - 1) % SLOTS), count=1)
    return product


@gluon.jit
def slots_of(p_item, PER_TILE: gl.constexpr):
    """How many an item takes."""
    slots = PER_TILE * gl.load(p_item + 5)
    return gl.where(gl.load(p_item + 6) >= 0, slots + 1, slots)


@gluon.jit
def rows_and_columns(T: gl.constexpr, layout: gl.constexpr):
    """Of the elements of a tile."""
    r_T = gl.arange(0, T, gl.SliceLayout(1, layout))
    c_T = gl.arange(0, T, gl.SliceLayout(0, layout))
    return r_T[:, None], c_T[None, :]


@gluon.jit
def work_items(memory, ring, turns, ITEMS, VECTOR: gl.constexpr, OWN: gl.constexpr):
    """Multiplies and finishes every second item of this program, from its first (OWN = 0) or second (1) on."""
    p_work, p_out, p_items, p_matrices, p_factors, p_scales, p_done = memory
    columns_HTK, rows_HKT, arrived_S, free_S = ring
    SLOTS: gl.constexpr = arrived_S.shape[0]
    T: gl.constexpr = rows_HKT.shape[2]
    PER_TILE: gl.constexpr = T // rows_HKT.shape[1]
    E: gl.constexpr = T * T
    product_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    by_columns: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])
    tile_STT = columns_HTK._reinterpret(p_work.dtype.element_ty, [SLOTS, T, T], columns_HTK.layout)
    n = 0
    rounds = 0
    item = gl.program_id(0)
    if OWN == 1:
        if item < ITEMS:
            n += slots_of(p_items + 16 * item, PER_TILE)
        item += gl.num_programs(0)
    while item < ITEMS:
        p_item = p_items + 16 * item
        form = gl.load(p_item)
        same = (gl.load(p_item + 1) == gl.load(p_item + 3)) & (gl.load(p_item + 2) == gl.load(p_item + 4))
        steps = PER_TILE * gl.load(p_item + 5)
        added = gl.load(p_item + 6)
        target = gl.load(p_item + 7)
        mirror = gl.load(p_item + 8)
        p_factor = p_factors + 4 * gl.load(p_item + 9)
        matrix = gl.load(p_item + 10)
        row = gl.load(p_item + 11)
        column = gl.load(p_item + 12)
        raises = gl.load(p_item + 15)
        alpha = gl.load(p_factor)
        beta = gl.load(p_factor + 1)
        gamma = gl.load(p_factor + 2)
        power = gl.load(p_factor + 3)
        scale = gl.load(p_scales + matrix)
        if power > 0:
            alpha *= scale
        if power > 1:
            alpha *= scale

        mbarrier.wait(turns.index(OWN), (rounds & 1) ^ (1 - OWN))
        turn = turns.index(1 - OWN)
        product = gl.zeros((T, T), gl.float32, product_layout)
        if form == 0:
            product = add_product(product, ring, turn, n, steps, same, added, False, False)
        if form == 1:
            product = add_product(product, ring, turn, n, steps, same, added, False, True)
        if form == 2:
            product = add_product(product, ring, turn, n, steps, same, added, True, False)
        n += steps

        product *= alpha
        if added >= 0:
            product += beta * tile_STT.index(n % SLOTS).load(product_layout).to(gl.float32)
            fence_async_shared()  # the copy engine writes there next
            barrier()
            mbarrier.arrive(free_S.index(n % SLOTS), count=1)
            n += 1
        r_TT, c_TT = rows_and_columns(T, product_layout)
        if (row == column) & (gamma != 0):
            product += gl.where(r_TT == c_TT, gamma, 0.0)
        value = product.to(p_work.dtype.element_ty)
        if (mirror >= 0) & (mirror == target):
            value = gl.where(r_TT <= c_TT, value, gl.convert_layout(value.permute((1, 0)), product_layout))
        r_by_rows, c_by_rows = rows_and_columns(T, by_rows)
        if target >= 0:
            p_target = p_work + target.to(gl.int64) * E + (r_by_rows * T + c_by_rows)
            gl.store(p_target, gl.convert_layout(value, by_rows))
        if target < 0:
            p_matrix = p_matrices + matrix * 7
            M = gl.load(p_matrix + 1).to(gl.int32)
            N = gl.load(p_matrix + 2).to(gl.int32) // VECTOR * VECTOR
            p_result = p_out + gl.multiple_of(gl.load(p_matrix + 5), VECTOR) + row.to(gl.int64) * N
            p_result += gl.multiple_of(column, T) + (r_by_rows * N + c_by_rows)
            mask = (r_by_rows < M - row) & (c_by_rows < N - column)
            gl.store(p_result, gl.convert_layout(value, by_rows), mask=mask)
        if (mirror >= 0) & (mirror != target):
            r_by_columns, c_by_columns = rows_and_columns(T, by_columns)
            p_mirror = p_work + mirror.to(gl.int64) * E + (c_by_columns * T + r_by_columns)
            gl.store(p_mirror, gl.convert_layout(value, by_columns))
        barrier()  # all of the tile is written before it is counted
        gl.atomic_add(p_done + raises, 1, sem="release")

        rounds += 1
        item += gl.num_programs(0)
        if item < ITEMS:
            n += slots_of(p_items + 16 * item, PER_TILE)
        item += gl.num_programs(0)


@gluon.jit(do_not_specialize=["ITEMS"])
def newton_schulz_hopper_kernel(
    d_columns, d_rows, p_work, p_out, p_items, p_matrices, p_factors, p_scales, p_done, ITEMS,
    VECTOR: gl.constexpr, b_T: gl.constexpr, b_K: gl.constexpr, SLOTS: gl.constexpr,
    MULTIPLYING: gl.constexpr, FETCHING: gl.constexpr,
):  # fmt: skip
    """As `newton_schulz_kernel`; `d_columns` and `d_rows` describe the workspace, a tile's rows one after another."""
    columns_HTK = gl.allocate_shared_memory(p_work.dtype.element_ty, [2 * SLOTS, b_T, b_K], d_columns.layout)
    rows_HKT = columns_HTK._reinterpret(p_work.dtype.element_ty, [2 * SLOTS, b_K, b_T], d_rows.layout)
    arrived_S = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free_S = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(arrived_S.index(slot), count=1)
        mbarrier.init(free_S.index(slot), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()  # the copy engine sees them
    memory = (p_work, p_out, p_items, p_matrices, p_factors, p_scales, p_done)
    ring = (columns_HTK, rows_HKT, arrived_S, free_S)
    gl.warp_specialize(
        [
            (work_items, (memory, ring, turns, ITEMS, VECTOR, 0)),
            (work_items, (memory, ring, turns, ITEMS, VECTOR, 1)),
            (fetch_items, (d_columns, d_rows, p_items, p_done, ring, ITEMS)),
        ],
        [4, 1],
        [MULTIPLYING, FETCHING],
    )


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether this kernel does: on a Hopper GPU, with a Triton whose Gluon it is written for."""
    if device.type != "cuda" or TensorDescriptor is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


def start(tables: tuple[Tensor, ...], items: int, vector: int, counted: Counted) -> None:
    """Starts the kernel for large tiles.

    Args:
        tables: the workspace and the other tensors that `newton_schulz_kernel` takes.
        items: how many there are.
        vector: VECTOR of that kernel.
    """
    work, device = tables[0], tables[0].device
    rows = work.view(-1, LARGE)
    launch(
        newton_schulz_hopper_kernel,
        (min(processors(device), items),),
        tables,
        (items,),
        (vector, LARGE, DEPTH, SLOTS, *REGISTERS),
        descriptors=tuple([TensorDescriptor.from_tensor(rows, block, layout()) for block in BLOCKS]),
        cooperative=True,
        counted=counted,
    )


@functools.cache
def layout() -> Any:
    """How the copy engine lays a block out in shared memory, and products read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
