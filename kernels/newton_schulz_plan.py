"""Newton-Schulz of many matrices: which products each takes, where they lie, and the order of their tiles.

Decided on the host, from shapes and coefficients. What the tiles are, and why the order is safe, stands in
`kernels.newton_schulz_tiles`, whose kernels read these tables.

Iterations are taken one at a time or in pairs. With R = X X^T, one is X <- P X, where P = c R^2 + b R + a. In a pair
X waits: P and R commute, so that the second iteration's R is P1 R P1, and both together are

    X <- P2 P1 X

Products with the long side of X then become products of square matrices with the short one, of which half is computed:
pairs save arithmetic where X is long.

They cost accuracy where singular values differ much. What bfloat16 rounds off R stands in the place of small ones, and
an iteration multiplies it by up to a^2 as it does them. Where R comes from X again, that is mended; so after a pair
comes a single iteration. (Three at once gave results eight times too large for gradients of a few large singular
values.) And P1 is kept without its a: to round a with it would be the largest error of all for matrices whose columns
differ in size, and more than the definition's may be.

Shapes: M, N a matrix as given; everything else in tiles, whose side `tile_of` chooses for all matrices of a call.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.addresses import KeptTables, kept_tables, table_on
from kernels.launch import cdiv
from kernels.reference import NAMED_COEFFICIENTS, Triple

SMALL, LARGE = 64, 128  # sides of a tile
# Small tiles of all matrices of a call, and of their squares: as many as the largest call has in which they were found
# the faster, on an H100.
FEW, FEW_SQUARES = 512, 264
# Matrices are worked on in groups, so that what is computed from them stays in L2; of about as many tiles of their
# squares, one triangle of each, so that a device has enough to do.
TOGETHER = 256
# Rows and columns that one program copies, whatever the tiles: the order in which squares are summed for a norm must
# not depend on them. The rows divide a tile's; the interpreter is slow to start a program.
START_ROWS = {"cuda": 8, "cpu": 64}
START_COLUMNS = LARGE
ALIGNMENT = 8  # elements: every result starts at a multiple of 16 bytes
# Buffers of a matrix: X, X after an update; squares: R, the polynomial; of a pair P1 R, later P2 P1, and P2.
X, R, P, PR, P2 = (0, 1), 2, 3, 4, 5


def multiplications(rows: int, columns: int) -> int:
    """Of one iteration as it is defined, each product in full: 2 m^2 n + m^3 for short side m and long side n."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


class Stage(NamedTuple):
    """target = alpha * left @ right + beta * added + gamma, of buffers by number. Squares and X X^T are symmetric.

    At first X is what was given, which still has to be multiplied by its scale: alpha is, `power` times.
    """

    left: int
    right: int
    target: int
    added: int = R
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    power: int = 0

    @property
    def factors(self) -> tuple[float, float, float, int]:
        return self.alpha, self.beta, self.gamma, self.power

    @property
    def is_symmetric(self) -> bool:
        """Whether one triangle of its tiles is computed."""
        return self.target not in X

    @property
    def is_of_unlike(self) -> bool:
        """Whether it is the product of two squares: symmetric but for rounding, which differs in the two triangles."""
        return self.is_symmetric and self.left != self.right


def stages_of(coefficients: Sequence[Triple], segments: Sequence[int]) -> list[Stage]:
    """All products of a matrix, one after another; in segments of one iteration or two, as many as there are triples.

    The last polynomial of a segment is computed from R + b / 2c, of which c (R + b / 2c)^2 + a - b^2 / 4c is the same
    polynomial without a sum of matrices; not where the square cannot be completed (c is 0) or would cancel (the
    parabola falls below 0, or opens downwards).
    """
    stages = []
    triples = iter(coefficients)
    for number, length in enumerate(segments):
        x, target = X[number % 2], X[1 - number % 2]
        given = number == 0
        *pair, (a, b, c) = itertools.islice(triples, length)
        least = a - b * b / (4 * c) if c > 0 else -1.0
        shift, beta, gamma = (b / (2 * c), 0.0, least) if least >= 0 else (0.0, b, a)
        gram = Stage(x, x, R, gamma=0.0 if pair else shift, power=2 if given else 0)
        product = P
        if pair:
            ((a1, b1, c1),) = pair
            product = PR
            stages += [
                gram,
                Stage(R, R, P, alpha=c1, beta=b1),
                Stage(P, R, PR, added=R, beta=a1),
                Stage(P, PR, R, added=PR, beta=a1, gamma=shift),
                Stage(R, R, P2, alpha=c, beta=beta, gamma=gamma),
                Stage(P2, P, PR, added=P2, beta=a1),
            ]
        else:
            stages += [gram, Stage(R, R, P, alpha=c, beta=beta, gamma=gamma)]
        stages.append(Stage(product, x, target, power=1 if given else 0))
    return stages


class Place(NamedTuple):
    """A matrix in the workspace: its size in tiles, whether it has more rows than columns (of elements), first tile."""

    rows: int
    columns: int
    tall: bool
    first: int

    @property
    def side(self) -> int:
        """The short one."""
        return min(self.rows, self.columns)

    @property
    def triangle(self) -> int:
        """Tiles of a square on and above its diagonal."""
        return self.side * (self.side + 1) // 2

    def buffer(self, number: int) -> int:
        """Its first tile."""
        return self.first + min(number, R) * self.rows * self.columns + max(number - R, 0) * self.side**2

    def count(self, stage: Stage) -> int:
        """Items of a stage."""
        return self.triangle if stage.is_symmetric else self.rows * self.columns

    def depth(self, stage: Stage) -> int:
        """Tiles along the inner dimension of a stage's product."""
        return max(self.rows, self.columns) if stage.left in X else self.side


def place_of(M: int, N: int, first: int, tile: int) -> Place:
    return Place(cdiv(M, tile), cdiv(N, tile), M > N, first)


def tiles_of(place: Place, stages: Sequence[Stage]) -> int:
    """That the buffers take which the stages use."""
    return place.buffer(max(stage.target for stage in stages) + 1) - place.first if stages else 0


def cost_of(place: Place, stages: Sequence[Stage]) -> int:
    """Products of two tiles."""
    return sum(place.count(stage) * place.depth(stage) for stage in stages)


def operations_of(M: int, N: int, stages: Sequence[Stage]) -> float:
    """Additions and multiplications of a matrix's products, without padding, one triangle of the symmetric ones."""
    short, long = sorted((M, N))
    return sum(
        2.0 * (short * (short + 1) // 2 if stage.is_symmetric else M * N) * (long if stage.left in X else short)
        for stage in stages
    )


def segments_of(M: int, N: int, coefficients: tuple[Triple, ...]) -> tuple[int, ...]:
    """How many iterations a matrix takes at a time, 1 or 2, whatever the tiles.

    Every other time 2 where that saves arithmetic, and only where the error was found to be within twice that of the
    definition: four to six iterations with the quintic. With seven or eight it is a little more; Polar Express begins
    with an a that is too large for it.
    """
    usual = (1,) * len(coefficients)
    if not 4 <= len(coefficients) <= 6 or set(coefficients) != {NAMED_COEFFICIENTS["quintic"][0]}:
        return usual
    pairs: list[int] = []
    while sum(pairs) < len(coefficients):
        pairs.append(min(1 if len(pairs) % 2 else 2, len(coefficients) - sum(pairs)))
    place = place_of(M, N, 0, LARGE)
    return min((usual, tuple(pairs)), key=lambda each: cost_of(place, stages_of(coefficients, each)))


def tile_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """The side of all tiles of a call: small where there are few of them, since few large ones leave a device idle.

    A matrix has the same result either way, to the bit.
    """
    tiles = squares = 0
    for *batch, M, N in shapes:
        place = place_of(M, N, 0, SMALL)
        tiles += math.prod(batch) * place.rows * place.columns
        squares += math.prod(batch) * place.triangle
    return SMALL if tiles <= FEW and squares <= FEW_SQUARES else LARGE


def groups_of(places: Sequence[Place], costs: Sequence[int]) -> list[list[int]]:
    """Matrices that are worked on together, the most expensive first, each in the group that has least so far."""
    tiles = [place.triangle for place in places]
    groups: list[list[int]] = [[] for _ in range(min(max(sum(tiles) // TOGETHER, 1), len(places)))]
    least = [(0, number) for number in range(len(groups))]
    for matrix in sorted(range(len(places)), key=lambda matrix: -costs[matrix]):
        size, number = heapq.heappop(least)
        groups[number].append(matrix)
        heapq.heappush(least, (size + tiles[matrix], number))
    return groups


def work_order(places: Sequence[Place], stages: Sequence[Sequence[Stage]], tile: int) -> list[tuple[int, ...]]:
    """Every item in the order in which items are taken: group by group, in each stage by stage.

    Returns:
        For each what `newton_schulz_kernel` reads; its factors by their number in `factors_of`.
    """
    counters = list(itertools.accumulate(map(len, stages), initial=0))
    numbers = {factors: number for number, factors in enumerate(factors_of(stages))}
    items = []
    groups = groups_of(places, list(map(cost_of, places, stages)))
    for group, index in itertools.product(groups, range(max(map(len, stages)))):
        for matrix in group:
            place, own = places[matrix], stages[matrix]
            if index >= len(own):
                continue
            counter = counters[matrix] + index
            waits = (counter - 1, place.count(own[index - 1])) if index else (-1, 0)
            for product, written, row, column in _tiles(place, own[index], last=index == len(own) - 1):
                factors = numbers[own[index].factors]
                items.append((*product, *written, factors, matrix, row * tile, column * tile, *waits, counter))
    return items


def factors_of(stages: Sequence[Sequence[Stage]]) -> list[tuple[float, float, float, int]]:
    """Alpha, beta, gamma and power, each combination that there is."""
    return list(dict.fromkeys(stage.factors for each in stages for stage in each))


def _tiles(place: Place, stage: Stage, *, last: bool) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
    """Of each tile of a stage: its product, the tiles added, written and written transposed, its row and column.

    Where a diagonal tile is to be written transposed to its own place, its upper triangle stands for the lower one too.
    Then the tiles' size decides nothing.
    """
    left, right, target, added = map(place.buffer, stage[:4])
    depth = place.depth(stage)
    if not stage.is_symmetric:
        for row, column in itertools.product(range(place.rows), range(place.columns)):
            at = target + row * place.columns + column
            if place.tall:
                product = (1, right + row * depth, 1, left + column * depth, 1, depth)
            else:
                product = (0, left + row * depth, 1, right + column, place.columns, depth)
            yield product, (-1, -1 if last else at, -1), row, column
        return
    side = place.side
    for row, column in itertools.combinations_with_replacement(range(side), 2):
        if stage.left in X and place.tall:
            product = (2, left + row, side, right + column, side, depth)
        else:
            product = (1, left + row * depth, 1, right + column * depth, 1, depth)
        at, mirror = row * side + column, column * side + row
        mirrored = row != column or stage.is_of_unlike
        written = (added + at if stage.beta else -1, target + at, target + mirror if mirrored else -1)
        yield product, written, row, column


class Plan(NamedTuple):
    """What depends on shapes and coefficients alone: where everything lies, and in which order it is worked on."""

    rows: list[list[int]]  # of `p_matrices`, but for the addresses
    tables: KeptTables  # of those with addresses
    parts: Tensor  # for `start_kernel`
    items: Tensor  # for `newton_schulz_kernel`
    factors: Tensor  # for the same
    counters: int  # that it counts with
    starts: list[int]  # where the results of each batch begin
    strides: list[tuple[int, ...]]  # of the same
    vector: int  # elements: a divisor of every N, and so of where every result begins, up to ALIGNMENT
    workspace: int  # tiles
    copied: int  # tiles of it that the matrices take as they are given
    operations: float
    results: int  # elements
    start_rows: int  # of a part
    tile: int  # the side of every tile


@kept_tables
def plan_of(shapes: tuple[tuple[int, ...], ...], coefficients: tuple[Triple, ...], device: torch.device) -> Plan:
    """For contiguous tensors [M, N] or [batch, M, N], and a triple for each iteration."""
    rows, parts, places, stages, starts, strides = [], [], [], [], [], []
    workspace = results = copied = 0
    operations = 0.0
    start_rows, tile = START_ROWS[device.type], tile_of(shapes)
    for *batch, M, N in shapes:
        strides.append((*[M * N for _ in batch], N, 1))
        results = cdiv(results, ALIGNMENT) * ALIGNMENT
        starts.append(results)
        own = stages_of(coefficients, segments_of(M, N, coefficients))
        for _ in range(math.prod(batch)):
            matrix = len(rows)
            place = place_of(M, N, workspace, tile)
            first_part = len(parts)
            for row in range(0, place.rows * tile, start_rows):
                first = place.buffer(X[0]) + row // tile * place.columns
                parts += [(matrix, row, column, first + column // tile) for column in range(0, N, START_COLUMNS)]
            rows.append([0, M, N, first_part, len(parts) - first_part, results, 0])
            copied += place.rows * place.columns
            operations += operations_of(M, N, own)
            places.append(place)
            stages.append(own)
            workspace += tiles_of(place, own)
            results += M * N
    tables = (parts, work_order(places, stages, tile))
    factors = factors_of(stages)
    return Plan(
        rows,
        KeptTables(),
        *(table_on(device, table, torch.int32) for table in tables),
        factors=table_on(device, factors, torch.float32),
        counters=sum(map(len, stages)),
        starts=starts,
        strides=strides,
        vector=math.gcd(ALIGNMENT, *[N for *_, N in shapes]),
        workspace=workspace,
        copied=copied,
        operations=operations,
        results=results,
        start_rows=start_rows,
        tile=tile,
    )
