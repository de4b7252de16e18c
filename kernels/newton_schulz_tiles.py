"""Newton-Schulz of many matrices in one launch: the tiles of every product of every matrix, in one order.

A matrix X is kept as it is given, padded with zeros to whole tiles of TILE x TILE, each of which lies in memory as one
piece. An iteration has three stages; for a tall matrix the products have X on their other side:

    0   A = X X^T           only tiles on and above the diagonal are computed, the others are their mirrors
    1   B = b A + c A A     the same
    2   X = a X + B X

A work item is one tile of one stage of one matrix. Programs take items in turn from a list in which every item comes
after those it needs, and wait until a counter says that the matrix's stage before is done. While one matrix waits,
others are worked on, so that no stage's last tiles leave the device idle. Items are handed out in the list's order:
the first one that is not done is always being worked on, and waits for nothing. So the waiting ends.

Shapes: M, N a matrix as given; R, C its tiles; S = min(R, C); Z matrices; I items; J stages, three an iteration.
`p_matrices` is int64 [Z, 7]: address, M, N, the first of its chunks and how many, where its result begins, and the
address of its momentum where there is one: then the matrix at the first address is a gradient, and what is worked on
is the momentum after it, or one step ahead of that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import cdiv, launch, tl, triton
from kernels.reference import Triple
from kernels.tuning import next_power_of_2

TILE = 128
DEPTH = 64  # of a step along the inner dimension of a product
STAGES = 3
CHUNK = 8192  # elements whose squares one program adds up
START_ROWS = 32  # of a tile that one program writes the start of
ALIGNMENT = 8  # elements: every result starts at a multiple of 16 bytes
KEPT = 64  # plans, and tables of addresses, kept for the next call on the same matrices


@triton.jit
def typed_pointer(p_first, p_address, VECTOR: tl.constexpr):
    """The address as a pointer of p_first's type, at a multiple of VECTOR elements."""
    BYTES: tl.constexpr = p_first.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(tl.load(p_address).to(p_first.dtype), VECTOR * BYTES)


@triton.jit
def moved(p_momentum, gradient, momentum, offsets, mask):
    """momentum * buffer + gradient, as the buffer holds it."""
    buffer = tl.load(p_momentum + offsets, mask=mask, other=0).to(tl.float32)
    return (momentum * buffer + gradient).to(p_momentum.dtype.element_ty)


@triton.jit
def ahead(buffer, gradient, momentum, NESTEROV: tl.constexpr):
    """gradient + momentum * buffer with NESTEROV, else the buffer; as the buffer would hold it."""
    value = buffer.to(tl.float32)
    if NESTEROV:
        value = (gradient + momentum * value).to(buffer.dtype).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["COUNTERS", "MOMENTUM"])
def square_sums_kernel(
    p_first, p_first_buffer, p_momentum, p_chunks, p_matrices, p_sums, p_done, COUNTERS, MOMENTUM,
    NESTEROV: tl.constexpr, b_E: tl.constexpr, b_Z: tl.constexpr,
):  # fmt: skip
    """sums[c] = the sum of squares of the b_E elements of chunk c, in float64, where no float32 overflows.

    Of gradients with a momentum, after it has moved. Also sets the counters to 0, b_Z of them a program. `p_chunks` is
    int32 [., 2]: matrix, number of the chunk in it.
    """
    chunk = tl.program_id(0)
    r_Z = chunk * b_Z + tl.arange(0, b_Z)
    tl.store(p_done + r_Z, 0, mask=r_Z < COUNTERS)
    p_matrix = p_matrices + tl.load(p_chunks + 2 * chunk) * 7
    # No wider loads where addresses allow them: the order of the sum would then depend on the others in the list.
    p_x = typed_pointer(p_first, p_matrix, 1)
    size = tl.load(p_matrix + 1) * tl.load(p_matrix + 2)
    r_E = tl.load(p_chunks + 2 * chunk + 1).to(tl.int64) * b_E + tl.arange(0, b_E)
    mask = r_E < size
    x = tl.load(p_x + r_E, mask=mask, other=0)
    if p_first_buffer is not None:
        momentum = MOMENTUM
        if p_momentum is not None:
            momentum = tl.load(p_momentum).to(tl.float32)
        p_buffer = typed_pointer(p_first_buffer, p_matrix + 6, 1)
        buffer = moved(p_buffer, x.to(tl.float32), momentum, r_E, mask)
        tl.store(p_buffer + r_E, buffer, mask=mask)
        x = ahead(buffer, x.to(tl.float32), momentum, NESTEROV)
    x = x.to(tl.float64)
    tl.store(p_sums + chunk, tl.sum(x * x, axis=0))


@triton.jit(do_not_specialize=["MOMENTUM"])
def start_kernel(
    p_first, p_first_buffer, p_momentum, p_tiles, p_matrices, p_sums, p_work, MOMENTUM,
    NESTEROV: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_T: tl.constexpr, b_P: tl.constexpr,
):  # fmt: skip
    """X = G / (||G||_F + 1e-7), rounded once to bfloat16. b_R rows of a tile a program.

    `p_tiles` is int32 [., 4]: matrix, row and column where the part begins, the tile's number in the workspace.
    """
    p_tile = p_tiles + 4 * tl.program_id(0)
    p_matrix = p_matrices + tl.load(p_tile) * 7
    row = tl.load(p_tile + 1)
    r_R = tl.arange(0, b_R)
    r_T = tl.arange(0, b_T)
    p_x = typed_pointer(p_first, p_matrix, VECTOR)
    M = tl.load(p_matrix + 1)
    N = tl.load(p_matrix + 2) // VECTOR * VECTOR  # VECTOR divides N; here the compiler sees that it does
    first_chunk = tl.load(p_matrix + 3)
    chunks = tl.load(p_matrix + 4)

    square_P = tl.zeros((b_P,), tl.float64)
    for chunk in range(0, chunks, b_P):
        r_P = chunk + tl.arange(0, b_P)
        square_P += tl.load(p_sums + first_chunk + r_P, mask=r_P < chunks, other=0)
    norm = tl.sqrt(tl.sum(square_P, axis=0))
    # one infinity or NaN makes all of a matrix NaN
    scale = tl.where(norm < float("inf"), 1 / (norm + 1e-7), float("nan"))
    # for the largest numbers the scale is no normal float32: there it takes two factors
    first = tl.where(scale < 1e-30, 1e-20, 1.0)
    second = (scale / first).to(tl.float32)

    r_M = row.to(tl.int64) + r_R
    r_N = tl.multiple_of(tl.load(p_tile + 2), b_T) + r_T
    mask = (r_M < M)[:, None] & (r_N < N)[None, :]
    offsets = r_M[:, None] * N + r_N[None, :]
    x = tl.load(p_x + offsets, mask=mask, other=0).to(tl.float32)
    if p_first_buffer is not None:
        momentum = MOMENTUM
        if p_momentum is not None:
            momentum = tl.load(p_momentum).to(tl.float32)
        p_buffer = typed_pointer(p_first_buffer, p_matrix + 6, VECTOR)
        x = ahead(tl.load(p_buffer + offsets, mask=mask, other=0), x, momentum, NESTEROV)
    x = x * first.to(tl.float32) * second
    p_part = p_work + tl.load(p_tile + 3).to(tl.int64) * (b_T * b_T) + (row % b_T) * b_T
    tl.store(p_part + r_R[:, None] * b_T + r_T[None, :], x.to(p_work.dtype.element_ty))


@triton.jit
def times(p_left, p_right, left_step, right_step, K, b_T: tl.constexpr, b_K: tl.constexpr):
    """Left tiles times right tiles, K of each; from one to the next it is `left_step` and `right_step` tiles."""
    left_offsets = tl.arange(0, b_T)[:, None] * b_T + tl.arange(0, b_K)[None, :]
    right_offsets = tl.arange(0, b_K)[:, None] * b_T + tl.arange(0, b_T)[None, :]
    product = tl.zeros((b_T, b_T), tl.float32)
    for k in tl.range(0, K * b_T, b_K):
        tile = k // b_T
        within = tl.multiple_of(k % b_T, b_K)
        left = tl.load(p_left + tile * left_step * (b_T * b_T) + within + left_offsets)
        right = tl.load(p_right + tile * right_step * (b_T * b_T) + within * b_T + right_offsets)
        product = tl.dot(left, right, product)
    return product


@triton.jit
def times_transpose(p_left, p_right, left_step, right_step, K, b_T: tl.constexpr, b_K: tl.constexpr):
    """Left tiles times the transposes of right tiles."""
    offsets = tl.arange(0, b_T)[:, None] * b_T + tl.arange(0, b_K)[None, :]
    product = tl.zeros((b_T, b_T), tl.float32)
    for k in tl.range(0, K * b_T, b_K):
        tile = k // b_T
        within = tl.multiple_of(k % b_T, b_K)
        left = tl.load(p_left + tile * left_step * (b_T * b_T) + within + offsets)
        right = tl.load(p_right + tile * right_step * (b_T * b_T) + within + offsets)
        product = tl.dot(left, tl.trans(right), product)
    return product


@triton.jit
def transpose_times(p_left, p_right, left_step, right_step, K, b_T: tl.constexpr, b_K: tl.constexpr):
    """The transposes of left tiles times right tiles."""
    offsets = tl.arange(0, b_K)[:, None] * b_T + tl.arange(0, b_T)[None, :]
    product = tl.zeros((b_T, b_T), tl.float32)
    for k in tl.range(0, K * b_T, b_K):
        tile = k // b_T
        within = tl.multiple_of(k % b_T, b_K)
        left = tl.load(p_left + tile * left_step * (b_T * b_T) + within * b_T + offsets)
        right = tl.load(p_right + tile * right_step * (b_T * b_T) + within * b_T + offsets)
        product = tl.dot(tl.trans(left), right, product)
    return product


@triton.jit
def wait_for(p_counter, count):
    """Returns once the counter has reached `count`; what was written before it was counted can then be read."""
    done = tl.atomic_add(p_counter, 0, sem="acquire")
    while done < count:
        done = tl.atomic_add(p_counter, 0, sem="acquire")


@triton.jit(do_not_specialize=["ITEMS", "LAST"])
def newton_schulz_kernel(
    p_work, p_out, p_items, p_matrices, p_factors, p_done, ITEMS, LAST,
    VECTOR: tl.constexpr, ALIGNED: tl.constexpr, b_T: tl.constexpr, b_K: tl.constexpr,
):  # fmt: skip
    """target = alpha * (the product of left and right tiles) + beta * added, for every item.

    `p_items` is int32 [I, 16]: the form of the product (0 `times`, 1 `times_transpose`, 2 `transpose_times`); first
    tile and step of left and of right; how many; the tiles added, written, and written transposed (-1: none); stage;
    matrix; row and column of the tile; the counter to wait for (-1: none), what it must say, and the one to raise.
    `p_factors` is float32 [J, 2]: alpha and beta of each stage. LAST is the stage whose tiles are the results.
    """
    b_E: tl.constexpr = b_T * b_T
    r_T = tl.arange(0, b_T)
    square = r_T[:, None] * b_T + r_T[None, :]
    item = tl.atomic_add(p_done, 1, sem="relaxed")
    while item < ITEMS:
        p_item = p_items + 16 * item
        form = tl.load(p_item)
        p_left = p_work + tl.load(p_item + 1).to(tl.int64) * b_E
        left_step = tl.load(p_item + 2)
        p_right = p_work + tl.load(p_item + 3).to(tl.int64) * b_E
        right_step = tl.load(p_item + 4)
        K = tl.load(p_item + 5)
        added = tl.load(p_item + 6).to(tl.int64) * b_E
        target = tl.load(p_item + 7).to(tl.int64) * b_E
        mirror = tl.load(p_item + 8).to(tl.int64) * b_E
        stage = tl.load(p_item + 9)
        waits_for = tl.load(p_item + 13)
        count = tl.load(p_item + 14)
        raises = tl.load(p_item + 15)
        alpha = tl.load(p_factors + 2 * stage)
        beta = tl.load(p_factors + 2 * stage + 1)
        if waits_for >= 0:
            wait_for(p_done + waits_for, count)

        if form == 0:
            product = times(p_left, p_right, left_step, right_step, K, b_T, b_K)
        elif form == 1:
            product = times_transpose(p_left, p_right, left_step, right_step, K, b_T, b_K)
        else:
            product = transpose_times(p_left, p_right, left_step, right_step, K, b_T, b_K)

        product *= alpha
        if beta != 0:
            # from L2: another program wrote it
            product += beta * tl.load(p_work + added + square, cache_modifier=".cg").to(tl.float32)
        if stage != LAST:
            tl.store(p_work + target + square, product.to(p_work.dtype.element_ty))
            if mirror >= 0:
                tl.store(p_work + mirror + square, tl.trans(product.to(p_work.dtype.element_ty)))
        else:
            p_matrix = p_matrices + tl.load(p_item + 10) * 7
            row = tl.load(p_item + 11)
            column = tl.load(p_item + 12)
            M = tl.load(p_matrix + 1).to(tl.int32)
            N = tl.load(p_matrix + 2).to(tl.int32) // VECTOR * VECTOR
            p_result = p_out + tl.multiple_of(tl.load(p_matrix + 5), ALIGNED) + row.to(tl.int64) * N
            p_result += tl.multiple_of(column, b_T)
            mask = (r_T < M - row)[:, None] & (r_T < N - column)[None, :]
            tl.store(p_result + (r_T[:, None] * N + r_T[None, :]), product.to(tl.bfloat16), mask=mask)
        tl.debug_barrier()  # all of the tile is written before it is counted
        tl.atomic_add(p_done + raises, 1, sem="release")
        item = tl.atomic_add(p_done, 1, sem="relaxed")


class _Plan(NamedTuple):
    """What depends on shapes alone: where everything lies, and in which order it is worked on."""

    rows: list[list[int]]  # of `p_matrices`
    chunks: Tensor  # for `square_sums_kernel`
    parts: Tensor  # for `start_kernel`
    items: Tensor  # for `newton_schulz_kernel`
    starts: list[int]  # where the results of each batch begin
    columns: int  # a divisor of every N
    alignment: int  # a divisor of where every result begins
    workspace: int  # tiles
    results: int  # elements


class _Place(NamedTuple):
    """A matrix in the workspace: its size in tiles, and the first tiles of X, of X after an update, of A and of B."""

    rows: int
    columns: int
    x: tuple[int, int]
    gram: int
    polynomial: int


def _place(M: int, N: int, first: int) -> _Place:
    rows, columns = cdiv(M, TILE), cdiv(N, TILE)
    size, square = rows * columns, min(rows, columns) ** 2
    return _Place(rows, columns, (first, first + size), first + 2 * size, first + 2 * size + square)


def _tiles(place: _Place) -> int:
    return 2 * (place.rows * place.columns + min(place.rows, place.columns) ** 2)


def work_order(places: Sequence[_Place], iterations: int) -> list[tuple[int, ...]]:
    """Every item in the order in which items are handed out: stage by stage, the most expensive matrices first."""

    def cost(matrix: int) -> int:
        short, long = sorted(places[matrix][:2])
        return 2 * short * short * long + short**3

    by_cost = sorted(range(len(places)), key=cost, reverse=True)
    stages = STAGES * iterations
    return [item for stage in range(stages) for matrix in by_cost for item in _items(places, matrix, stage, stages)]


def _items(places: Sequence[_Place], matrix: int, stage: int, stages: int) -> Iterator[tuple[int, ...]]:
    """The items of one stage of one matrix, as `newton_schulz_kernel` reads them."""
    rows, columns, xs, gram, polynomial = places[matrix]
    side = min(rows, columns)
    x, x_next = xs[stage // STAGES % 2], xs[(stage // STAGES + 1) % 2]
    kind = stage % STAGES
    counter = 1 + matrix * stages + stage
    count = rows * columns if kind == 0 else side * (side + 1) // 2
    waits = (counter - 1, count) if stage else (-1, 0)
    for row in range(rows if kind == 2 else side):
        for column in range(columns) if kind == 2 else range(row, side):
            if kind == 2:
                at = row * columns + column
                if rows <= columns:
                    product = (0, polynomial + row * side, 1, x + column, columns, side)
                else:
                    product = (1, x + row * side, 1, polynomial + column * side, 1, side)
                written = (x + at, x_next + at, -1)
            else:
                source = gram if kind else x
                if kind == 0 and rows > columns:
                    product = (2, x + row, columns, x + column, columns, rows)
                else:
                    long = side if kind else columns
                    product = (1, source + row * long, 1, source + column * long, 1, long)
                target, mirror = row * side + column, column * side + row
                base = polynomial if kind else gram
                written = (gram + target, base + target, base + mirror if row != column else -1)
            yield (*product, *written, stage, matrix, row * TILE, column * TILE, *waits, counter)


@functools.lru_cache(KEPT)
def _plan(shapes: tuple[tuple[int, int, int], ...], iterations: int, device: torch.device) -> _Plan:
    """For batches of so many matrices [M, N]."""
    rows, chunks, parts, places, starts = [], [], [], [], []
    workspace = results = 0
    for batch, M, N in shapes:
        results = cdiv(results, ALIGNMENT) * ALIGNMENT
        starts.append(results)
        for _ in range(batch):
            matrix = len(rows)
            place = _place(M, N, workspace)
            count = cdiv(M * N, CHUNK)
            rows.append([0, M, N, len(chunks), count, results, 0])
            chunks += [(matrix, number) for number in range(count)]
            for row in range(0, place.rows * TILE, START_ROWS):
                first = place.x[0] + row // TILE * place.columns
                parts += [(matrix, row, column * TILE, first + column) for column in range(place.columns)]
            places.append(place)
            workspace += _tiles(place)
            results += M * N
    tables = (chunks, parts, work_order(places, iterations))
    return _Plan(
        rows,
        *(torch.tensor(table, dtype=torch.int32).to(device) for table in tables),
        starts=starts,
        columns=math.gcd(*[N for _, _, N in shapes]),
        alignment=math.gcd(ALIGNMENT, *[row[5] for row in rows]),
        workspace=workspace,
        results=results,
    )


@functools.lru_cache(KEPT)
def _factors(coefficients: tuple[Triple, ...], device: torch.device) -> Tensor:
    """Alpha and beta of every stage."""
    factors = [pair for a, b, c in coefficients for pair in ((1.0, 0.0), (c, b), (1.0, a))]
    return torch.tensor(factors, dtype=torch.float32).to(device)


_tables: dict[tuple, tuple[Tensor, int]] = {}


def _table(
    plan: _Plan, batches: Sequence[Tensor], buffers: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, int]:
    """The plan's rows with these addresses, on the device; and how many elements a lane can take at a time."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    # The stream is in the key, because only there has the table surely arrived.
    lists = (batches, buffers)
    key = (device, stream, *[tuple([(x.data_ptr(), x.dtype, x.shape) for x in tensors]) for tensors in lists])
    kept = _tables.get(key)
    if kept is None:
        if len(_tables) >= KEPT:
            del _tables[next(iter(_tables))]
        addresses = _addresses(batches)
        momenta = _addresses(buffers) if buffers else [0] * len(addresses)
        rows = [
            [address, *row[1:6], momentum] for address, row, momentum in zip(addresses, plan.rows, momenta, strict=True)
        ]
        on_host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        size = batches[0].itemsize
        vector = math.gcd(16 // size, plan.columns, *[address // size for address in (*addresses, *momenta)])
        kept = _tables[key] = on_host.to(device, non_blocking=True), vector
    return kept


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Of every matrix."""
    addresses = []
    for tensor in tensors:
        first = tensor.data_ptr()
        if tensor.dim() == 2:
            addresses.append(first)
        else:
            size = tensor.size(1) * tensor.size(2) * tensor.itemsize
            addresses += [first + number * size for number in range(len(tensor))]
    return addresses


@functools.cache
def _programs(device: torch.device) -> int:
    """As many as the device can hold; one for the interpreter, which runs a program to its end before the next."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Momentum(NamedTuple):
    """Buffers beside gradients, and how both become what is orthogonalized."""

    buffers: Sequence[Tensor]  # like the batches; moved in place
    factor: float | Tensor  # [] on the device where it is a tensor
    nesterov: bool


def orthogonalize(
    batches: Sequence[Tensor], coefficients: tuple[Triple, ...], momentum: Momentum | None = None
) -> list[Tensor]:
    """Newton-Schulz of contiguous [M, N] or [batch, M, N], none of them empty, of one dtype, on one device; bfloat16.

    With a momentum these are gradients: buffer = factor * buffer + gradient, and what is orthogonalized is
    gradient + factor * buffer with `nesterov`, else the buffer. The results share one allocation.
    """
    device = batches[0].device
    stages = STAGES * len(coefficients)
    shapes = tuple([(1, *x.shape) if x.dim() == 2 else tuple(x.shape) for x in batches])
    plan = _plan(shapes, len(coefficients), device)
    buffers, factor, nesterov = momentum or Momentum((), 0.0, False)
    table, vector = _table(plan, batches, buffers, device)
    # the interpreter can neither multiply bfloat16 nor round to it
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = torch.empty(plan.workspace * TILE * TILE, dtype=dtype, device=device)
    out = torch.empty(plan.results, dtype=torch.bfloat16, device=device)
    chunks, parts, items = len(plan.chunks), len(plan.parts), len(plan.items)
    sums = torch.empty(chunks, dtype=torch.float64, device=device)
    counters = 1 + stages * len(plan.rows)
    done = torch.empty(counters, dtype=torch.int32, device=device)

    tensor, number = (factor, 0.0) if isinstance(factor, Tensor) else (None, float(factor))
    given = (batches[0], buffers[0] if buffers else None, tensor)
    launch(
        square_sums_kernel,
        (chunks,),
        (*given, plan.chunks, table, sums, done),
        (counters, number),
        (nesterov, CHUNK, next_power_of_2(cdiv(counters, chunks))),
    )
    launch(
        start_kernel,
        (parts,),
        (*given, plan.parts, table, sums, work),
        (number,),
        (nesterov, vector, START_ROWS, TILE, 64),
    )
    launch(
        newton_schulz_kernel,
        (min(_programs(device), items),),
        (work, out, plan.items, table, _factors(coefficients, device), done),
        (items, stages - 1),
        (math.gcd(ALIGNMENT, plan.columns), plan.alignment, TILE, DEPTH),
    )
    storage = out.untyped_storage()
    starts = zip(batches, plan.starts, strict=True)
    return [out.new_empty(0).set_(storage, start, batch.shape, batch.stride()) for batch, start in starts]
