"""Newton-Schulz of many matrices: where each lies in the workspace, and the order in which its tiles are worked on.

Decided on the host, from shapes alone. What the stages are, and why the order is safe, stands in
`kernels.newton_schulz_tiles`, whose kernels read these tables.

Shapes: M, N a matrix as given; everything else in tiles of TILE x TILE.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import cdiv

TILE = 128
STAGES = 3  # of an iteration
CHUNK = 8192  # elements whose squares one program adds up
START_ROWS = 32  # of a tile that one program writes the start of
ALIGNMENT = 8  # elements: every result starts at a multiple of 16 bytes
KEPT = 64  # plans kept for the next call on matrices of the same shapes


def multiplications(rows: int, columns: int) -> int:
    """Of one iteration, each product in full: 2 m^2 n + m^3 for the short side m and the long side n."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


class Plan(NamedTuple):
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


class Place(NamedTuple):
    """A matrix in the workspace: its size in tiles, whether it has more rows than columns (of elements), and the first
    tiles of X, of X after an update, of A and of B."""

    rows: int
    columns: int
    tall: bool
    x: tuple[int, int]
    gram: int
    polynomial: int


def place_of(M: int, N: int, first: int) -> Place:
    rows, columns = cdiv(M, TILE), cdiv(N, TILE)
    size, square = rows * columns, min(rows, columns) ** 2
    return Place(rows, columns, M > N, (first, first + size), first + 2 * size, first + 2 * size + square)


def tiles_of(place: Place) -> int:
    return 2 * (place.rows * place.columns + min(place.rows, place.columns) ** 2)


def work_order(places: Sequence[Place], iterations: int) -> list[tuple[int, ...]]:
    """Every item in the order in which items are handed out: stage by stage, the most expensive matrices first."""

    by_cost = sorted(range(len(places)), key=lambda matrix: -multiplications(*places[matrix][:2]))
    stages = STAGES * iterations
    return [item for stage in range(stages) for matrix in by_cost for item in _items(places, matrix, stage, stages)]


def _items(places: Sequence[Place], matrix: int, stage: int, stages: int) -> Iterator[tuple[int, ...]]:
    """The items of one stage of one matrix, as `newton_schulz_kernel` reads them."""
    rows, columns, tall, xs, gram, polynomial = places[matrix]
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
                if tall:
                    product = (1, x + row * side, 1, polynomial + column * side, 1, side)
                else:
                    product = (0, polynomial + row * side, 1, x + column, columns, side)
                written = (x + at, x_next + at, -1)
            else:
                source = gram if kind else x
                if kind == 0 and tall:
                    product = (2, x + row, columns, x + column, columns, rows)
                else:
                    long = side if kind else columns
                    product = (1, source + row * long, 1, source + column * long, 1, long)
                target, mirror = row * side + column, column * side + row
                base = polynomial if kind else gram
                written = (gram + target, base + target, base + mirror if row != column else -1)
            yield (*product, *written, stage, matrix, row * TILE, column * TILE, *waits, counter)


@functools.lru_cache(KEPT)
def plan_of(shapes: tuple[tuple[int, int, int], ...], iterations: int, device: torch.device) -> Plan:
    """For batches of so many matrices [M, N]."""
    rows, chunks, parts, places, starts = [], [], [], [], []
    workspace = results = 0
    for batch, M, N in shapes:
        results = cdiv(results, ALIGNMENT) * ALIGNMENT
        starts.append(results)
        for _ in range(batch):
            matrix = len(rows)
            place = place_of(M, N, workspace)
            count = cdiv(M * N, CHUNK)
            rows.append([0, M, N, len(chunks), count, results, 0])
            chunks += [(matrix, number) for number in range(count)]
            for row in range(0, place.rows * TILE, START_ROWS):
                first = place.x[0] + row // TILE * place.columns
                parts += [(matrix, row, column * TILE, first + column) for column in range(place.columns)]
            places.append(place)
            workspace += tiles_of(place)
            results += M * N
    tables = (chunks, parts, work_order(places, iterations))
    return Plan(
        rows,
        *(torch.tensor(table, dtype=torch.int32).to(device) for table in tables),
        starts=starts,
        columns=math.gcd(*[N for _, _, N in shapes]),
        alignment=math.gcd(ALIGNMENT, *[row[5] for row in rows]),
        workspace=workspace,
        results=results,
    )
