"""Packed int6: four codes in three bytes.

Shapes: R rows, C columns; S bytes a packed row; W 32-bit words. In the lists of matrices that both ops take, N.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import check_integer, check_length, check_matrices, check_tensor
from kernels.grouped import (
    Work,
    all_at_once,
    find_matrix,
    for_each,
    input_pointer,
    is_list,
    offset_and_device,
    result_pointer,
    run_all,
    run_one,
)
from kernels.launch import cdiv, tl, triton
from kernels.registration import register
from kernels.tuning import tile


@triton.jit
def load_24_bits(p_words, mask):
    """A 32-bit word of four codes, each cut to the six bits of code + 32, as one number of 24 bits."""
    word = (tl.load(p_words, mask=mask, other=0) ^ 0x20202020) & 0x3F3F3F3F
    return (word & 0x3F) | ((word >> 2) & 0xFC0) | ((word >> 4) & 0x3F000) | ((word >> 6) & 0xFC0000)


# The words' loads follow no pattern that vectorizes. Not knowing how the pointers are aligned, the compiler gives
# neighbouring lanes neighbouring words to store, and so words that are nearly neighbours to load.
@triton.jit(do_not_specialize=["R", "C"], do_not_specialize_on_alignment=["p_codes", "p_packed"])
def pack_int6_words_kernel(p_codes, p_packed, p_table, R, C, b_W: tl.constexpr, b_N: tl.constexpr):
    """packed[3q + r] = t[4q + r] >> 8r | t[4q + r + 1] << (24 - 8r), r < 3, t[i] the 24 bits of codes 4i to 4i + 3.

    By 32-bit words of the flat matrix, b_W of them a program, one a lane.
    """
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_codes = input_pointer(p_codes, p_table, matrix, 3, 4, b_N).to(tl.pointer_type(tl.uint32))
    p_packed = result_pointer(p_packed, p_table, matrix, 4, b_N).to(tl.pointer_type(tl.uint32))
    r_W = program * b_W + tl.arange(0, b_W)
    m_W = r_W < R * C // 16 * 3
    p_codes += r_W + r_W // 3  # 4q + r
    shift = (r_W % 3 * 8).to(tl.uint32)
    low = load_24_bits(p_codes, m_W)
    high = load_24_bits(p_codes + 1, m_W)
    tl.store(p_packed + r_W, (low >> shift) | (high << (24 - shift)), mask=m_W)


@triton.jit(do_not_specialize=["R", "C"])
def pack_int6_kernel(p_codes, p_packed, p_table, R, C, b_R: tl.constexpr, b_S: tl.constexpr, b_N: tl.constexpr):
    """packed[3g + k] = u[4g + k] >> 2k | u[4g + k + 1] << (6 - 2k), u = code + 32. b_R rows, b_S bytes at a time."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_codes = input_pointer(p_codes, p_table, matrix, 3, 1, b_N)
    p_packed = result_pointer(p_packed, p_table, matrix, 4, b_N)
    S = (C + 3) // 4 * 3
    row = program.to(tl.int64) * b_R + tl.arange(0, b_R)[:, None]
    for first in range(0, S, b_S):
        byte = first + tl.arange(0, b_S)[None, :]
        column = byte // 3 * 4 + byte % 3
        shift = byte % 3 * 2
        p_code = p_codes + row * C + column
        low = tl.load(p_code, mask=(row < R) & (column < C), other=0).to(tl.int32)
        high = tl.load(p_code + 1, mask=(row < R) & (column + 1 < C), other=0).to(tl.int32)
        packed = (((low + 32) & 63) >> shift) | (((high + 32) & 63) << (6 - shift))
        tl.store(p_packed + row * S + byte, packed.to(tl.uint8), mask=(row < R) & (byte < S))


@triton.jit(do_not_specialize=["R", "C"], do_not_specialize_on_alignment=["p_packed", "p_codes"])
def unpack_int6_words_kernel(p_packed, p_codes, p_table, R, C, b_W: tl.constexpr, b_N: tl.constexpr):
    """codes[4i + p] = (t[i] >> 6p & 63) - 32, t[i] the 24 bits of bytes 3i to 3i + 2, out of one or two words.

    By 32-bit words of the flat matrix, b_W of them a program, one a lane.
    """
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_packed = input_pointer(p_packed, p_table, matrix, 3, 4, b_N).to(tl.pointer_type(tl.uint32))
    p_codes = result_pointer(p_codes, p_table, matrix, 4, b_N).to(tl.pointer_type(tl.uint32))
    r_W = program * b_W + tl.arange(0, b_W)
    m_W = r_W < R * C // 4
    byte = r_W % 4 * 3  # of the twelve that four words of codes take
    p_packed += r_W // 4 * 3 + byte // 4
    shift = (byte % 4 * 8).to(tl.uint32)
    low = tl.load(p_packed, mask=m_W, other=0) >> shift
    high = tl.load(p_packed + 1, mask=m_W & (shift > 8), other=0) << ((32 - shift) & 31)
    word = low | high
    word = (word & 0x3F) | ((word & 0xFC0) << 2) | ((word & 0x3F000) << 4) | ((word & 0xFC0000) << 6)
    # Subtracts 32 from each byte: 96 more carries into no other byte, and the top bit makes it 128 less.
    tl.store(p_codes + r_W, (word + 0x60606060) ^ 0x80808080, mask=m_W)


@triton.jit(do_not_specialize=["R", "C"])
def unpack_int6_kernel(p_packed, p_codes, p_table, R, C, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr):
    """codes[4g + p] = (t[g] >> 6p & 63) - 32, t[g] the 24 bits of bytes 3g to 3g + 2. b_R rows, b_C codes at a time."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_packed = input_pointer(p_packed, p_table, matrix, 3, 1, b_N)
    p_codes = result_pointer(p_codes, p_table, matrix, 4, b_N)
    S = (C + 3) // 4 * 3
    row = program.to(tl.int64) * b_R + tl.arange(0, b_R)[:, None]
    for first in range(0, C, b_C):
        column = first + tl.arange(0, b_C)[None, :]
        mask = (row < R) & (column < C)
        bit = column % 4 * 6
        p_byte = p_packed + row * S + column // 4 * 3 + bit // 8
        low = tl.load(p_byte, mask=mask, other=0).to(tl.int32) >> (bit % 8)
        high = tl.load(p_byte + 1, mask=mask & (bit % 8 > 2), other=0).to(tl.int32) << (8 - bit % 8)
        tl.store(p_codes + row * C + column, (((low | high) & 63) - 32).to(tl.int8), mask=mask)


def _by_words(rows: int, columns: int, offset: int) -> bool:
    """Whether a matrix is whole 32-bit words, packed and unpacked, that an int32 counts."""
    return columns % 4 == 0 and rows * columns % 16 == 0 and offset % 4 == 0 and rows * columns < 2**31


# Plans are kept: making one takes the host longer than asking for it.


@functools.cache
def _pack_plan(rows: int, columns: int, offset: int, device: int) -> Work:
    size = 3 * cdiv(columns, 4)
    results = (((rows, size), torch.uint8),)
    if _by_words(rows, columns, offset):
        b_W, _, num_warps = tile("pack_int6_words", 1, device)
        programs = cdiv(rows * size // 4, b_W)
        return Work(pack_int6_words_kernel, programs, rows, columns, (b_W,), num_warps, results)
    b_R, b_S, num_warps = tile("pack_int6", size, device)
    return Work(pack_int6_kernel, cdiv(rows, b_R), rows, columns, (b_R, b_S), num_warps, results)


@functools.cache
def _unpack_plan(rows: int, columns: int, offset: int, device: int) -> Work:
    results = (((rows, columns), torch.int8),)
    if _by_words(rows, columns, offset):
        b_W, _, num_warps = tile("unpack_int6_words", 1, device)
        programs = cdiv(rows * columns // 4, b_W)
        return Work(unpack_int6_words_kernel, programs, rows, columns, (b_W,), num_warps, results)
    b_R, b_C, num_warps = tile("unpack_int6", columns, device)
    return Work(unpack_int6_kernel, cdiv(rows, b_R), rows, columns, (b_R, b_C), num_warps, results)


def _pack_work(codes_RC: Tensor) -> Work:
    return _pack_plan(*codes_RC.shape, *offset_and_device(codes_RC))


def _unpack_work(packed: Tensor, columns: int) -> Work:
    return _unpack_plan(packed.shape[0], columns, *offset_and_device(packed))


def _pack(codes_RC: Tensor) -> Tensor:
    codes_RC = codes_RC.contiguous()
    return run_one(_pack_work(codes_RC), codes_RC)[0]


def _pack_shapes(codes_RC: Tensor) -> Tensor:
    rows, columns = codes_RC.shape
    return codes_RC.new_empty((rows, 3 * cdiv(columns, 4)), dtype=torch.uint8)


def _pack_all(codes: Sequence[Tensor]) -> list[Tensor]:
    return run_all(_pack_work, [(matrix.contiguous(),) for matrix in codes])[0]


def _unpack(packed: Tensor, num_columns: int) -> Tensor:
    packed = packed.contiguous()
    return run_one(_unpack_work(packed, num_columns), packed)[0]


def _unpack_shapes(packed: Tensor, num_columns: int) -> Tensor:
    return packed.new_empty((packed.shape[0], num_columns), dtype=torch.int8)


def _unpack_all(packed: Sequence[Tensor], num_columns: Sequence[int]) -> list[Tensor]:
    arguments = [(matrix.contiguous(), columns) for matrix, columns in zip(packed, num_columns, strict=True)]
    return run_all(_unpack_work, arguments)[0]


_pack_op = dispatch.register_triton("pack_int6")(register("pack_int6", _pack, _pack_shapes))
_unpack_op = dispatch.register_triton("unpack_int6")(register("unpack_int6", _unpack, _unpack_shapes))
all_at_once(_pack_op)(_pack_all)
all_at_once(_unpack_op)(_unpack_all)


def _check_columns(name: str, num_columns: object, packed_name: str, packed: Tensor) -> None:
    check_integer(name, num_columns, 0)
    size = 3 * cdiv(num_columns, 4)
    if packed.shape[1] != size:
        raise ValueError(
            f"{packed_name} has shape {list(packed.shape)}; for {name} {num_columns} it must be [R, {size}]"
        )


def pack_int6(codes_RC: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """Packs four 6-bit codes into three bytes, row by row.

    With u = code + 32 in [0, 63], columns 4g to 4g + 3 become the little-endian 24-bit word

        u[4g] + 2^6 u[4g + 1] + 2^12 u[4g + 2] + 2^18 u[4g + 3]

    and code 0 stands in for the columns that the last group lacks.

    Args:
        codes_RC: int8 [R, C], each in [-32, 31]. Looking at the values would make the host wait for the
            device, so they are not checked: a code outside is packed modulo 64. Or a list or tuple of such
            matrices on one device, of any shapes, done together.

    Returns:
        uint8 [R, 3 * ceil(C / 4)]; for a list, a list of such matrices, which may share one piece of memory.

    Raises:
        TypeError: the codes are no tensor or not int8.
        ValueError: the codes are not a matrix, or the matrices are on different devices.
    """
    if is_list(codes_RC):
        check_matrices("codes_RC", codes_RC, (torch.int8,))
        return for_each("pack_int6", codes_RC)
    check_tensor("codes_RC", codes_RC, (torch.int8,), "RC")
    return dispatch.implementation("pack_int6", codes_RC)(codes_RC)


def unpack_int6(
    packed: Tensor | Sequence[Tensor], num_columns: int | Sequence[int]
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """The inverse of `pack_int6`, for all 64 codes.

    Args:
        packed: uint8 [R, 3 * ceil(C / 4)], or a list or tuple of such matrices on one device, done together.
        num_columns: C, or one for each of the matrices.

    Returns:
        int8 [R, C], in [-32, 31]; for a list, a list of such matrices, which may share one piece of memory.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: C is negative, `packed` has not the shape that goes with it, there are not as many of one as
            of the other, or the matrices are on different devices.
    """
    if is_list(packed):
        check_matrices("packed", packed, (torch.uint8,))
        check_length("num_columns", num_columns, "packed", packed)
        for index, pair in enumerate(zip(num_columns, packed, strict=True)):
            _check_columns(f"num_columns[{index}]", pair[0], f"packed[{index}]", pair[1])
        return for_each("unpack_int6", packed, num_columns)
    check_tensor("packed", packed, (torch.uint8,), "RC")
    _check_columns("num_columns", num_columns, "packed", packed)
    return dispatch.implementation("unpack_int6", packed)(packed, num_columns)
