"""Newton-Schulz of many matrices in one launch: the tiles of every product of every matrix, in one order.

A matrix X is kept as it is given, padded with zeros to whole square tiles, each of which lies in memory as one piece.
Its stages are products of such matrices (`kernels.newton_schulz_plan`), in the usual form of an iteration

    R = X X^T + b / 2c              only tiles on and above the diagonal are computed, the others are their mirrors
    P = c R R + a - b^2 / 4c        the same
    X = P X

where a number stands for so many times the identity; for a tall matrix the products have X on their other side.

A work item is one tile of one stage of one matrix. They are dealt out in turn to programs, from a list in which every
item comes after those it needs; a program waits until a counter says that the matrix's stage before is done. While one
matrix waits, others are worked on, so that no stage's last tiles leave the device idle. All programs are resident at
once (a cooperative launch), and each works its items off in the list's order: the first one that is not done waits for
nothing. So the waiting ends.

Shapes: M, N a matrix as given; Z matrices; I items; J kinds of stages.
`p_matrices` is int64 [Z, 7]: address, M, N, the first of its parts and how many, where its result begins, and the
address of its momentum where there is one: then the matrix at the first address is a gradient, and what is worked on
is the momentum after it, or one step ahead of that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import newton_schulz_hopper
from kernels.addresses import Pieces, as_tensors, table_on, typed_pointer
from kernels.launch import cdiv, launch, number_of, processors, tensor_and_number, tl, triton
from kernels.newton_schulz_plan import LARGE, SMALL, START_COLUMNS, Plan, plan_of
from kernels.reference import Triple
from kernels.tuning import next_power_of_2

DEPTH = 64  # of a step along the inner dimension of a product; divides every tile's side
# Steps of a product that are on their way at once. A few small tiles leave memory's latency bare, and have the room.
PIPELINED = {SMALL: 6, LARGE: 3}
ROOM_FOR_TWO = ((8, 0), (9, 0), (10, 0))  # GPUs of which a processor holds two programs; others may hold one
SAFE_NORMS = (2.0**-40, 2.0**50)  # of a matrix as it is given, so that products of its elements are normal float32


@triton.jit
def moved(p_buffer, gradient, momentum, mask):
    """momentum * buffer + gradient, as the buffer holds it."""
    buffer = tl.load(p_buffer, mask=mask, other=0).to(tl.float32)
    return (momentum * buffer + gradient).to(p_buffer.dtype.element_ty)


@triton.jit
def ahead(buffer, gradient, momentum, NESTEROV: tl.constexpr):
    """gradient + momentum * buffer with NESTEROV, else the buffer; as the buffer would hold it."""
    value = buffer.to(tl.float32)
    if NESTEROV:
        value = (gradient + momentum * value).to(buffer.dtype).to(tl.float32)
    return value


@triton.jit
def part_of(p_first, p_first_buffer, p_part, p_matrix, b_R: tl.constexpr, b_C: tl.constexpr):
    """A part, b_R rows and b_C columns: addresses in the matrix and in its momentum, which of them exist."""
    # No wider loads where addresses allow them: the order of sums would then depend on the others in the list.
    M = tl.load(p_matrix + 1)
    N = tl.load(p_matrix + 2)
    r_M = tl.load(p_part + 1).to(tl.int64) + tl.arange(0, b_R)
    r_N = tl.load(p_part + 2) + tl.arange(0, b_C)
    mask = (r_M < M)[:, None] & (r_N < N)[None, :]
    offsets = r_M[:, None] * N + r_N[None, :]
    p_x = typed_pointer(p_first, p_matrix, 1) + offsets
    p_buffer = p_x
    if p_first_buffer is not None:
        p_buffer = typed_pointer(p_first_buffer, p_matrix + 6, 1) + offsets
    return p_x, p_buffer, mask


@triton.jit
def store_part(p_work, p_part, p_matrix, x, b_R: tl.constexpr, b_C: tl.constexpr, b_T: tl.constexpr):
    """Writes a part to its tiles in the workspace, one beside another; the last of a row may be missing."""
    tile = tl.load(p_part + 3).to(tl.int64)
    row = tl.load(p_part + 1) % b_T
    r_C = tl.arange(0, b_C)
    offsets = r_C // b_T * (b_T * b_T) + r_C % b_T
    offsets = (row + tl.arange(0, b_R))[:, None] * b_T + offsets[None, :]
    columns = tl.multiple_of(tl.cdiv(tl.load(p_matrix + 2), b_T) * b_T - tl.load(p_part + 2), b_T)
    mask_1C = (r_C < columns)[None, :]
    tl.store(p_work + tile * (b_T * b_T) + offsets, x.to(p_work.dtype.element_ty), mask=mask_1C)


@triton.jit(do_not_specialize=["COUNTERS", "MOMENTUM"])
def start_kernel(
    p_first, p_first_buffer, p_momentum, p_clip, p_parts, p_matrices, p_sums, p_work, p_done, COUNTERS, MOMENTUM,
    NESTEROV: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_T: tl.constexpr, b_Z: tl.constexpr,
):  # fmt: skip
    """X = G, and sums[i] = the sum of squares of part i in float64, where no float32 overflows. A part a program.

    With a momentum it moves first. Also sets the counters to 0, b_Z of them a program. `p_parts` is int32 [., 4]:
    matrix, row and column where the part begins, the first of its tiles in the workspace.
    """
    part = tl.program_id(0)
    r_Z = part * b_Z + tl.arange(0, b_Z)
    tl.store(p_done + r_Z, 0, mask=r_Z < COUNTERS)
    p_part = p_parts + 4 * part
    p_matrix = p_matrices + tl.load(p_part) * 7
    p_x, p_buffer, mask = part_of(p_first, p_first_buffer, p_part, p_matrix, b_R, b_C)
    x = tl.load(p_x, mask=mask, other=0).to(tl.float32)
    if p_clip is not None:
        x *= tl.load(p_clip)
    if p_first_buffer is not None:
        momentum = number_of(p_momentum, MOMENTUM)
        buffer = moved(p_buffer, x, momentum, mask)
        tl.store(p_buffer, buffer, mask=mask)
        x = ahead(buffer, x, momentum, NESTEROV)
    store_part(p_work, p_part, p_matrix, x, b_R, b_C, b_T)
    x = x.to(tl.float64)
    tl.store(p_sums + part, tl.sum(tl.sum(x * x, axis=1), axis=0))


@triton.jit(do_not_specialize=["MOMENTUM"])
def scale_kernel(
    p_first, p_first_buffer, p_momentum, p_clip, p_parts, p_matrices, p_sums, p_work, p_scales, MOMENTUM,
    NESTEROV: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    b_R: tl.constexpr, b_C: tl.constexpr, b_T: tl.constexpr, b_P: tl.constexpr,
):  # fmt: skip
    """scale = 1 / (||G||_F + 1e-7), by which X still has to be multiplied. A matrix a program.

    A matrix whose norm is not in [LEAST, MOST], so that float32 might not hold the products of its elements, is
    multiplied here and now; its scale is then 1.
    """
    matrix = tl.program_id(0)
    p_matrix = p_matrices + matrix * 7
    first_part = tl.load(p_matrix + 3)
    parts = tl.load(p_matrix + 4)
    square_P = tl.zeros((b_P,), tl.float64)
    for part in range(0, parts, b_P):
        r_P = part + tl.arange(0, b_P)
        square_P += tl.load(p_sums + first_part + r_P, mask=r_P < parts, other=0)
    norm = tl.sqrt(tl.sum(square_P, axis=0))
    # one infinity or NaN makes all of a matrix NaN
    scale = tl.where(norm < float("inf"), 1 / (norm + 1e-7), float("nan"))
    if ((norm > 0) & (norm < LEAST)) | ((norm > MOST) & (norm < float("inf"))):
        # for the largest numbers the scale is no normal float32: there it takes two factors
        first = tl.where(scale < 1e-30, 1e-20, 1.0)
        second = (scale / first).to(tl.float32)
        for part in range(0, parts):
            p_part = p_parts + (first_part + part) * 4
            p_x, p_buffer, mask = part_of(p_first, p_first_buffer, p_part, p_matrix, b_R, b_C)
            x = tl.load(p_x, mask=mask, other=0).to(tl.float32)
            if p_clip is not None:
                x *= tl.load(p_clip)
            if p_first_buffer is not None:
                buffer = tl.load(p_buffer, mask=mask, other=0)
                x = ahead(buffer, x, number_of(p_momentum, MOMENTUM), NESTEROV)
            store_part(p_work, p_part, p_matrix, x * first.to(tl.float32) * second, b_R, b_C, b_T)
        scale = tl.full((), 1, tl.float64)
    tl.store(p_scales + matrix, scale.to(tl.float32))


@triton.jit
def add_product(
    product, p_left, p_right, left_step, right_step, K,
    LEFT_TRANSPOSED: tl.constexpr, RIGHT_TRANSPOSED: tl.constexpr, b_T: tl.constexpr, b_K: tl.constexpr,
    PIPELINED: tl.constexpr,
):  # fmt: skip
    """Plus left tiles times right tiles, K of each, transposed where it says so; their steps are in tiles."""
    columns = tl.arange(0, b_T)[:, None] * b_T + tl.arange(0, b_K)[None, :]  # b_K columns of a tile
    rows = tl.arange(0, b_K)[:, None] * b_T + tl.arange(0, b_T)[None, :]  # b_K rows of a tile
    for k in tl.range(0, K * b_T, b_K, num_stages=PIPELINED):
        tile = k // b_T
        within = tl.multiple_of(k % b_T, b_K)
        p_left_tile = p_left + tile * left_step * (b_T * b_T)
        p_right_tile = p_right + tile * right_step * (b_T * b_T)
        if LEFT_TRANSPOSED:
            left = tl.trans(tl.load(p_left_tile + within * b_T + rows))
        else:
            left = tl.load(p_left_tile + within + columns)
        if RIGHT_TRANSPOSED:
            right = tl.trans(tl.load(p_right_tile + within + columns))
        else:
            right = tl.load(p_right_tile + within * b_T + rows)
        product = tl.dot(left, right, product)
    return product


@triton.jit
def wait_for(p_counter, count):
    """Returns once the counter has reached `count`; what was written before it was counted can then be read."""
    done = tl.atomic_add(p_counter, 0, sem="acquire")
    while done < count:
        done = tl.atomic_add(p_counter, 0, sem="acquire")


@triton.jit(do_not_specialize=["ITEMS"])
def newton_schulz_kernel(
    p_work, p_out, p_items, p_matrices, p_factors, p_scales, p_done, ITEMS,
    VECTOR: tl.constexpr, b_T: tl.constexpr, b_K: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """target = alpha * (the product of left and right tiles) + beta * added + gamma * identity, for every item.

    `p_items` is int32 [I, 16]: which side of the product is transposed (0 none, 1 the right, 2 the left); first
    tile and step of left and of right; how many; the tiles added (-1: none), written (-1: the result), and written
    transposed (-1: none); factors; matrix; row and column of the tile; the counter to wait for (-1: none), what it must
    say, and the one to raise. `p_factors` is float32 [J, 4]: alpha, beta, gamma, and the power of the matrix's scale by
    which alpha is multiplied.
    """
    b_E: tl.constexpr = b_T * b_T
    r_T = tl.arange(0, b_T)
    square = r_T[:, None] * b_T + r_T[None, :]
    transposed = r_T[None, :] * b_T + r_T[:, None]
    item = tl.program_id(0)
    while item < ITEMS:
        p_item = p_items + 16 * item
        form = tl.load(p_item)
        p_left = p_work + tl.load(p_item + 1).to(tl.int64) * b_E
        left_step = tl.load(p_item + 2)
        p_right = p_work + tl.load(p_item + 3).to(tl.int64) * b_E
        right_step = tl.load(p_item + 4)
        K = tl.load(p_item + 5)
        added = tl.load(p_item + 6)
        target = tl.load(p_item + 7)
        mirror = tl.load(p_item + 8)
        factors = tl.load(p_item + 9)
        matrix = tl.load(p_item + 10)
        row = tl.load(p_item + 11)
        column = tl.load(p_item + 12)
        waits_for = tl.load(p_item + 13)
        count = tl.load(p_item + 14)
        raises = tl.load(p_item + 15)
        if waits_for >= 0:
            wait_for(p_done + waits_for, count)
        # used after the products, and on their way during them
        p_factor = p_factors + 4 * factors
        alpha = tl.load(p_factor)
        beta = tl.load(p_factor + 1)
        gamma = tl.load(p_factor + 2)
        power = tl.load(p_factor + 3)
        scale = tl.load(p_scales + matrix)

        # One after another, not one or the other: products of branches that meet would be waited for step by step.
        product = tl.zeros((b_T, b_T), tl.float32)
        if form == 0:
            product = add_product(product, p_left, p_right, left_step, right_step, K, False, False, b_T, b_K, PIPELINED)
        if form == 1:
            product = add_product(product, p_left, p_right, left_step, right_step, K, False, True, b_T, b_K, PIPELINED)
        if form == 2:
            product = add_product(product, p_left, p_right, left_step, right_step, K, True, False, b_T, b_K, PIPELINED)

        if power > 0:
            alpha *= scale
        if power > 1:
            alpha *= scale
        product *= alpha
        if added >= 0:
            p_added = p_work + added.to(tl.int64) * b_E + square
            # from L2: another program wrote it
            product += beta * tl.load(p_added, cache_modifier=".cg").to(tl.float32)
        if (row == column) & (gamma != 0):
            product += tl.where(r_T[:, None] == r_T[None, :], gamma, 0)
        value = product.to(p_work.dtype.element_ty)
        if (mirror >= 0) & (mirror == target):
            value = tl.where(r_T[:, None] <= r_T[None, :], value, tl.trans(value))
        if target >= 0:
            tl.store(p_work + target.to(tl.int64) * b_E + square, value)
            if (mirror >= 0) & (mirror != target):
                tl.store(p_work + mirror.to(tl.int64) * b_E + transposed, value)
        else:
            p_matrix = p_matrices + matrix * 7
            M = tl.load(p_matrix + 1).to(tl.int32)
            N = tl.load(p_matrix + 2).to(tl.int32) // VECTOR * VECTOR
            p_result = p_out + tl.multiple_of(tl.load(p_matrix + 5), VECTOR) + row.to(tl.int64) * N
            p_result += tl.multiple_of(column, b_T)
            mask = (r_T < M - row)[:, None] & (r_T < N - column)[None, :]
            tl.store(p_result + (r_T[:, None] * N + r_T[None, :]), value.to(tl.bfloat16), mask=mask)
        tl.debug_barrier()  # all of the tile is written before it is counted
        tl.atomic_add(p_done + raises, 1, sem="release")
        item += tl.num_programs(0)


def _table(plan: Plan, addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The plan's rows with these addresses, of every matrix and then of every momentum, on the device."""

    def make() -> Tensor:
        momenta = addresses[len(plan.rows) :] or [0] * len(plan.rows)
        rows = zip(addresses, plan.rows, momenta, strict=False)
        return table_on(device, [(address, *row[1:6], momentum) for address, row, momentum in rows], torch.int64)

    return plan.tables.get(device, addresses, make)


def _addresses(batches: Sequence[Tensor]) -> tuple[int, ...]:
    """Of every matrix."""
    return tuple(
        [
            batch.data_ptr() + number * math.prod(batch.shape[-2:]) * batch.itemsize
            for batch in batches
            for number in range(math.prod(batch.shape[:-2]))
        ]
    )


@functools.cache
def _programs(device: torch.device) -> int:
    """That are resident at once; one for the interpreter, which runs a program to its end before the next."""
    room_for_two = device.type == "cuda" and torch.cuda.get_device_capability(device) in ROOM_FOR_TWO
    return (2 if room_for_two else 1) * processors(device)


class Momentum(NamedTuple):
    """Buffers beside gradients, and how both become what is orthogonalized."""

    buffers: Sequence[Tensor]  # like the batches, which are matrices; moved in place
    addresses: tuple[int, ...]  # of every gradient, then of every buffer
    factor: float | Tensor  # [] on the device where it is a tensor
    nesterov: bool
    clip: Tensor | None = None  # [] on the device: gradients are multiplied by it first


def orthogonalize(
    batches: Sequence[Tensor], coefficients: tuple[Triple, ...], momentum: Momentum | None = None
) -> Pieces:
    """Newton-Schulz of contiguous [M, N] or [batch, M, N], none of them empty, of one dtype, on one device; bfloat16.

    With a momentum these are gradients: g = clip * gradient, buffer = factor * buffer + g, and what is orthogonalized
    is g + factor * buffer with `nesterov`, else the buffer. The results share one allocation.
    """
    device = batches[0].device
    shapes = as_tensors(batches).shapes
    plan = plan_of(shapes, coefficients, device)
    buffers, addresses, factor, nesterov, clip = momentum or Momentum((), _addresses(batches), 0.0, False)
    table = _table(plan, addresses, device)
    # the interpreter can neither multiply bfloat16 nor round to it
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = torch.empty(plan.workspace * plan.tile**2, dtype=dtype, device=device)
    out = torch.empty(plan.results, dtype=torch.bfloat16, device=device)
    matrices, parts, items = len(plan.rows), len(plan.parts), len(plan.items)
    sums = torch.empty(parts, dtype=torch.float64, device=device)
    scales = torch.empty(matrices, dtype=torch.float32, device=device)
    done = torch.empty(plan.counters, dtype=torch.int32, device=device)

    copied = plan.copied * plan.tile**2 * work.itemsize
    tensor, number = tensor_and_number(factor)
    given = (batches[0], buffers[0] if buffers else None, tensor, clip, plan.parts, table, sums, work)
    launch(
        start_kernel,
        (parts,),
        (*given, done),
        (plan.counters, number),
        (nesterov, plan.start_rows, START_COLUMNS, plan.tile, next_power_of_2(cdiv(plan.counters, parts))),
        num_warps=2,
        counted=lambda: (sum(x.nbytes for x in (*batches, *buffers, *buffers)) + copied, 0.0),
    )
    launch(
        scale_kernel,
        (matrices,),
        (*given, scales),
        (number,),
        (nesterov, *SAFE_NORMS, plan.start_rows, START_COLUMNS, plan.tile, 128),
        counted=lambda: (sums.nbytes + scales.nbytes, 0.0),
    )
    tables = (work, out, plan.items, table, plan.factors, scales, done)

    def counted() -> tuple[float, float]:
        return copied + out.nbytes, plan.operations

    if plan.tile == LARGE and newton_schulz_hopper.runs_on(device):
        newton_schulz_hopper.start(tables, items, plan.vector, counted)
    else:
        launch(
            newton_schulz_kernel,
            (min(_programs(device), items),),
            tables,
            (items,),
            (plan.vector, plan.tile, DEPTH, PIPELINED[plan.tile]),
            cooperative=True,
            counted=counted,
        )
    return Pieces(out, shapes, plan.strides, plan.starts)
