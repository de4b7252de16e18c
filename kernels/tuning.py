"""Tile sizes of the kernels: a table of measured shapes by GPU architecture, and the rule that fits them to a width."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program works on at a time, and how many warps share it."""

    rows: int
    columns: int
    num_warps: int


class Shape(NamedTuple):
    """How the tile of a kernel follows from the width of its rows."""

    elements: int  # of a tile, or one row where that is more
    max_columns: int  # a wider row takes several tiles
    per_warp: int  # elements for each warp, of 16 at most
    max_rows: int = 4096


class Product(NamedTuple):
    """How a matrix product is cut up."""

    rows: int
    columns: int
    depth: int  # of a step along the inner dimension
    num_warps: int
    stages: int  # of the copies ahead of the products
    programs: int  # for each processor
    flatten: bool  # whether the next tile's copies start before this one is finished


# A kernel that needs the whole of a row at once takes any width up to `launch.MAX_COLUMNS`.
WHOLE_ROW = 2**30

# Measured on an H200 with torch 2.11.0 and triton 3.6.0: at 98,304 rows of 512 bfloat16 channels, and for int6 at the
# model's matrices. Not varied were the tiles of the int6 ops for one matrix, of the packing, the ids and the casts;
# those of the rows in float8 were, on an H100.
MEASURED: dict[tuple[int, int], dict[str, Shape]] = {
    (9, 0): {
        "add_rms_norm_fwd": Shape(1024, WHOLE_ROW, 256),
        "add_rms_norm_bwd": Shape(512, WHOLE_ROW, 512, max_rows=16),
        "cast_weights": Shape(2048, 512, 512),
        "cross_entropy": Shape(1024, WHOLE_ROW, 1024),
        "smear_gate_fwd": Shape(2048, 1024, 512),
        "smear_gate_bwd": Shape(512, 256, 512),
        "column_sums": Shape(2048, 8, 256, max_rows=256),
        "bigram_hash": Shape(256, 1, 64),
        "bigram_hash_embed_fwd": Shape(4096, 1024, 512),
        "segment_sum": Shape(512, 256, 512),
        "segment_total": Shape(2048, 256, 512),
        "input_stage_fwd": Shape(4096, WHOLE_ROW, 4096, max_rows=8),
        "input_stage_bwd": Shape(32768, WHOLE_ROW, 32768, max_rows=64),
        "lookup_ids": Shape(512, 1, 128),
        "qk_norm_rotary_fwd": Shape(2048, WHOLE_ROW, 512),
        "qk_norm_rotary_bwd": Shape(2048, WHOLE_ROW, 256),
        "rows_in_fp8": Shape(2048, WHOLE_ROW, 256),
        "quantize_int6": Shape(2048, 8192, 512),
        "quantize_int6_list": Shape(2048, 512, 512),
        "dequantize_int6": Shape(2048, 1024, 512),
        "dequantize_int6_list": Shape(2048, 512, 512),
        "pack_int6": Shape(2048, 1024, 512),
        "pack_int6_words": Shape(512, 1, 128),
        "unpack_int6": Shape(2048, 1024, 512),
        "unpack_int6_words": Shape(512, 1, 128),
    }
}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def tile(kernel: str, columns: int, device: int) -> Tile:
    """The tile of a kernel for rows of so many columns on a CUDA device, or on the CPU (-1): `Tensor.get_device()`."""
    architecture = torch.cuda.get_device_capability(device) if device >= 0 else (9, 0)
    # An architecture that nobody measured yet gets Hopper's shapes.
    elements, max_columns, per_warp, max_rows = MEASURED.get(architecture, MEASURED[9, 0])[kernel]
    b_columns = min(next_power_of_2(columns), max_columns)
    rows = min(max(elements // b_columns, 1), max_rows)
    return Tile(rows, b_columns, min(max(rows * b_columns // per_warp, 1), 16))


# Measured as above, at 98,304 rows and the model's widths; those in float8 on an H100.
PRODUCTS: dict[tuple[int, int], dict[str, Product]] = {
    (9, 0): {
        "squared_relu": Product(128, 256, 64, 8, 4, 1, flatten=True),
        "added": Product(128, 256, 64, 8, 3, 1, flatten=True),
        "squared_relu_backward": Product(128, 128, 64, 4, 3, 2, flatten=False),
        "fp8_squares": Product(256, 128, 128, 8, 4, 1, flatten=True),
        "fp8_added": Product(128, 128, 128, 8, 4, 1, flatten=True),
        "fp8_slopes": Product(256, 128, 128, 8, 3, 1, flatten=False),
        "fp8_input": Product(256, 128, 128, 8, 4, 1, flatten=True),
    }
}


@functools.cache
def products(device: int) -> dict[str, Product] | None:
    """How matrix products are cut up on a CUDA device, or on the CPU (-1); None for an architecture nobody measured."""
    return PRODUCTS.get(torch.cuda.get_device_capability(device) if device >= 0 else (9, 0))
