"""Int6 weights: one fp16 scale a row, codes in [-31, 31], four codes in three bytes.

Shapes: R rows, C columns; S bytes a packed row; W 32-bit words. In the lists of matrices that every op takes, N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_float_dtype, check_integer, check_shape, check_tensor
from kernels.grouped import Work, can_group, find_matrix, input_pointer, result_pointer, run_all, run_one
from kernels.launch import cdiv, compute_dtype, tl, triton
from kernels.registration import register
from kernels.tuning import tile

WORDS = 512  # 32-bit words that a program writes where a matrix can be taken by the word


@triton.jit
def load_weight(p_weight, mask, COMPUTE: tl.constexpr):
    """Weights as COMPUTE, 0 for NaN. An infinity needs no care: scale and code both saturate."""
    weight = tl.load(p_weight, mask=mask, other=0).to(COMPUTE)
    return tl.where(weight == weight, weight, 0)  # noqa: PLR0124


@triton.jit
def divide(x, y):
    """x / y rounded to nearest, which `/` alone does not promise for float32."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def store_levels(p_result, weight, scale_R, mask, DEQUANTIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """clamp(round(w / scale), -31, 31), or that times the scale."""
    # Adding 1.5 * 2^(mantissa bits) leaves no bits for a fraction: the sum rounds half to even.
    SHIFT: tl.constexpr = 6755399441055744.0 if COMPUTE.is_fp64() else 12582912.0
    level = divide(weight, scale_R[:, None])
    level = tl.minimum(tl.maximum(level, -31.0), 31.0)
    level = (level + SHIFT) - SHIFT
    if DEQUANTIZE:
        level = (level * scale_R[:, None]).to(tl.float32)  # exact: 17 bits
    tl.store(p_result, level.to(p_result.dtype.element_ty), mask=mask)


@triton.jit
def quantize_rows(
    p_weight, p_result, p_scale, program, R, C,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr,
):  # fmt: skip
    """Codes and scale of b_R rows; without p_scale, the weights that these stand for.

    The first b_C columns stay in registers. Those of a wider matrix are read twice, then from the cache.
    """
    C = C // VECTOR * VECTOR  # VECTOR divides C; here the compiler sees that it does
    first_row = program.to(tl.int64) * b_R
    r_R = tl.arange(0, b_R)
    r_C = tl.arange(0, b_C)
    m_R = r_R < R - first_row
    offsets = r_R[:, None] * C + r_C[None, :]  # [b_R, b_C]
    p_weight += first_row * C
    p_result += first_row * C

    mask = m_R[:, None] & (r_C < C)[None, :]
    weight = load_weight(p_weight + offsets, mask, COMPUTE)
    largest_R = tl.max(tl.abs(weight), axis=1)
    for column in range(b_C, C, b_C):
        later_mask = m_R[:, None] & (column + r_C < C)[None, :]
        later = load_weight(p_weight + column + offsets, later_mask, COMPUTE)
        largest_R = tl.maximum(largest_R, tl.max(tl.abs(later), axis=1))

    scale_R = tl.minimum(divide(largest_R, tl.full((b_R,), 31, COMPUTE)), 65504.0)
    scale_R = scale_R.to(tl.float32).to(tl.float16)  # by way of float32 from float64 as well, as PyTorch does
    scale_R = tl.where(scale_R == 0, 1, scale_R)
    if p_scale is not None:
        tl.store(p_scale + first_row + r_R, scale_R, mask=m_R)

    scale_R = scale_R.to(COMPUTE)
    store_levels(p_result + offsets, weight, scale_R, mask, p_scale is None, COMPUTE)
    for column in range(b_C, C, b_C):
        later_mask = m_R[:, None] & (column + r_C < C)[None, :]
        later = load_weight(p_weight + column + offsets, later_mask, COMPUTE)
        store_levels(p_result + column + offsets, later, scale_R, later_mask, p_scale is None, COMPUTE)


@triton.jit(do_not_specialize=["R", "C"])
def quantize_int6_kernel(
    p_weight, p_codes, p_scale, p_table, R, C,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """scale = fp16(max |w| / 31), codes = clamp(round(w / scale)). b_R whole rows a program."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_weight = input_pointer(p_weight, p_table, matrix, 3, VECTOR, b_N)
    p_codes = result_pointer(p_codes, p_table, matrix, 4, b_N)
    p_scale = result_pointer(p_scale, p_table, matrix, 5, b_N)
    quantize_rows(p_weight, p_codes, p_scale, program, R, C, COMPUTE, VECTOR, b_R, b_C)


@triton.jit(do_not_specialize=["R", "C"])
def fake_quantize_int6_kernel(
    p_weight, p_fake, p_table, R, C,
    COMPUTE: tl.constexpr, VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """fake = clamp(round(w / scale)) * scale, scale = fp16(max |w| / 31). b_R whole rows a program."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_weight = input_pointer(p_weight, p_table, matrix, 3, VECTOR, b_N)
    p_fake = result_pointer(p_fake, p_table, matrix, 4, b_N)
    quantize_rows(p_weight, p_fake, None, program, R, C, COMPUTE, VECTOR, b_R, b_C)


@triton.jit(do_not_specialize=["R", "C"])
def dequantize_int6_kernel(
    p_codes, p_scale, p_weight, p_table, R, C,
    VECTOR: tl.constexpr, b_R: tl.constexpr, b_C: tl.constexpr, b_N: tl.constexpr,
):  # fmt: skip
    """w = codes * scale. b_R rows a program, b_C columns at a time."""
    matrix, program, R, C = find_matrix(p_table, R, C, b_N)
    p_codes = input_pointer(p_codes, p_table, matrix, 3, VECTOR, b_N)
    p_scale = input_pointer(p_scale, p_table, matrix, 4, 1, b_N)
    p_weight = result_pointer(p_weight, p_table, matrix, 5, b_N)
    C = C // VECTOR * VECTOR  # VECTOR divides C; here the compiler sees that it does
    first_row = program.to(tl.int64) * b_R
    r_R = tl.arange(0, b_R)
    r_C = tl.arange(0, b_C)
    m_R = r_R < R - first_row
    scale_R = tl.load(p_scale + first_row + r_R, mask=m_R, other=0).to(tl.float32)
    for column in range(0, C, b_C):
        mask = m_R[:, None] & (column + r_C < C)[None, :]
        offsets = first_row * C + (r_R[:, None] * C + (column + r_C)[None, :])
        weight = tl.load(p_codes + offsets, mask=mask, other=0).to(tl.float32) * scale_R[:, None]
        tl.store(p_weight + offsets, weight.to(p_weight.dtype.element_ty), mask=mask)


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


# Plans are kept: making one takes the host longer than asking for it.


@functools.cache
def _vector(columns: int, itemsize: int, offset: int, input_itemsize: int) -> int:
    """How many elements a lane can take at a time, of an input that begins `offset` bytes past a multiple of 16.

    16 bytes of the wider side, fewer where rows or inputs begin askew. The narrower side follows in steps of as many
    elements, so that no lane's elements are another's on the other side.
    """
    return math.gcd(columns, 16 // itemsize, offset // input_itemsize)


@functools.cache
def _quantize_plan(tuned: str, rows: int, columns: int, dtype: torch.dtype, offset: int, device: int) -> Work:
    b_R, b_C, num_warps = tile(tuned, columns, device)
    vector = _vector(columns, dtype.itemsize, offset, dtype.itemsize)
    constants = (compute_dtype(dtype), vector, b_R, b_C)
    results = (((rows, columns), torch.int8), ((rows,), torch.float16))
    return Work(quantize_int6_kernel, cdiv(rows, b_R), rows, columns, constants, num_warps, results)


@functools.cache
def _fake_quantize_plan(
    tuned: str, rows: int, columns: int, dtype: torch.dtype, offset: int, device: int, result_dtype: torch.dtype
) -> Work:
    b_R, b_C, num_warps = tile(tuned, columns, device)
    vector = _vector(columns, max(dtype.itemsize, result_dtype.itemsize), offset, dtype.itemsize)
    constants = (compute_dtype(dtype), vector, b_R, b_C)
    results = (((rows, columns), result_dtype),)
    return Work(fake_quantize_int6_kernel, cdiv(rows, b_R), rows, columns, constants, num_warps, results)


@functools.cache
def _dequantize_plan(tuned: str, rows: int, columns: int, offset: int, device: int, dtype: torch.dtype) -> Work:
    b_R, b_C, num_warps = tile(tuned, columns, device)
    constants = (_vector(columns, dtype.itemsize, offset, 1), b_R, b_C)
    results = (((rows, columns), dtype),)
    return Work(dequantize_int6_kernel, cdiv(rows, b_R), rows, columns, constants, num_warps, results)


def _by_words(rows: int, columns: int, offset: int) -> bool:
    """Whether a matrix is whole 32-bit words, packed and unpacked, that an int32 counts."""
    return columns % 4 == 0 and rows * columns % 16 == 0 and offset % 4 == 0 and rows * columns < 2**31


@functools.cache
def _pack_plan(rows: int, columns: int, offset: int, device: int) -> Work:
    size = 3 * cdiv(columns, 4)
    results = (((rows, size), torch.uint8),)
    if _by_words(rows, columns, offset):
        programs = cdiv(rows * size // 4, WORDS)
        return Work(pack_int6_words_kernel, programs, rows, columns, (WORDS,), 4, results)
    b_R, b_S, num_warps = tile("pack_int6", size, device)
    return Work(pack_int6_kernel, cdiv(rows, b_R), rows, columns, (b_R, b_S), num_warps, results)


@functools.cache
def _unpack_plan(rows: int, columns: int, offset: int, device: int) -> Work:
    results = (((rows, columns), torch.int8),)
    if _by_words(rows, columns, offset):
        programs = cdiv(rows * columns // 4, WORDS)
        return Work(unpack_int6_words_kernel, programs, rows, columns, (WORDS,), 4, results)
    b_R, b_C, num_warps = tile("unpack_int6", columns, device)
    return Work(unpack_int6_kernel, cdiv(rows, b_R), rows, columns, (b_R, b_C), num_warps, results)


def _where(tensor: Tensor) -> tuple[int, int]:
    """(bytes past a multiple of 16, device)."""
    return tensor.data_ptr() % 16, tensor.get_device()


def _quantize_work(weight_RC: Tensor, tuned: str = "quantize_int6_list") -> Work:
    return _quantize_plan(tuned, *weight_RC.shape, weight_RC.dtype, *_where(weight_RC))


def _fake_quantize_work(weight_RC: Tensor, dtype: torch.dtype, tuned: str = "quantize_int6_list") -> Work:
    return _fake_quantize_plan(tuned, *weight_RC.shape, weight_RC.dtype, *_where(weight_RC), dtype)


def _dequantize_work(codes: Tensor, scale: Tensor, dtype: torch.dtype, tuned: str = "dequantize_int6_list") -> Work:
    return _dequantize_plan(tuned, *codes.shape, *_where(codes), dtype)


def _pack_work(codes_RC: Tensor) -> Work:
    return _pack_plan(*codes_RC.shape, *_where(codes_RC))


def _unpack_work(packed: Tensor, columns: int) -> Work:
    return _unpack_plan(packed.shape[0], columns, *_where(packed))


def _quantize(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    weight_RC = weight_RC.contiguous()
    codes_RC, scale_R = run_one(_quantize_work(weight_RC, "quantize_int6"), weight_RC)
    return codes_RC, scale_R


def _quantize_shapes(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    codes_RC = weight_RC.new_empty(weight_RC.shape, dtype=torch.int8)
    return codes_RC, weight_RC.new_empty(weight_RC.shape[:1], dtype=torch.float16)


def _quantize_all(weights: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*run_all(_quantize_work, [(weight.contiguous(),) for weight in weights]), strict=True))


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    return run_one(_dequantize_work(codes, scale, dtype, "dequantize_int6"), codes, scale)[0]


def _dequantize_shapes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _dequantize_all(codes: Sequence[Tensor], scales: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    arguments = [(c.contiguous(), s.contiguous(), dtype) for c, s, dtype in zip(codes, scales, dtypes, strict=True)]
    return run_all(_dequantize_work, arguments)[0]


def _fake_quantize(weight_RC: Tensor, dtype: torch.dtype) -> Tensor:
    weight_RC = weight_RC.contiguous()
    return run_one(_fake_quantize_work(weight_RC, dtype, "quantize_int6"), weight_RC)[0]


def _fake_quantize_shapes(weight_RC: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_RC.new_empty(weight_RC.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.weight_dtype = inputs[0].dtype


def _backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None]:
    return grad_RC.to(ctx.weight_dtype), None


def _fake_quantize_lists(weights: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    fakes: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(dtypes):  # results of two dtypes cannot share an allocation
        indices = [index for index, other in enumerate(dtypes) if other == dtype]
        (results,) = run_all(_fake_quantize_work, [(weights[index].contiguous(), dtype) for index in indices])
        fakes.update(zip(indices, results, strict=True))
    return tuple([fakes[index] for index in range(len(weights))])


class _FakeQuantizeAll(torch.autograd.Function):
    """`_fake_quantize_lists` with gradients."""

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], *weights: Tensor) -> tuple[Tensor, ...]:
        fakes = _fake_quantize_lists(weights, dtypes)
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *[fake for fake, weight in zip(fakes, weights, strict=True) if not weight.requires_grad]
        )
        return fakes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(grads, ctx.weight_dtypes, strict=True)
        return None, *[grad if grad is None else grad.to(dtype) for grad, dtype in pairs]


def _fake_quantize_all(weights: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> Sequence[Tensor]:
    dtypes = [weight.dtype if dtype is None else dtype for weight, dtype in zip(weights, dtypes, strict=True)]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _FakeQuantizeAll.apply(dtypes, *weights)
    return _fake_quantize_lists(weights, dtypes)


def _pack(codes_RC: Tensor) -> Tensor:
    codes_RC = codes_RC.contiguous()
    return run_one(_pack_work(codes_RC), codes_RC)[0]


def _pack_shapes(codes_RC: Tensor) -> Tensor:
    rows, columns = codes_RC.shape
    return codes_RC.new_empty((rows, 3 * -(-columns // 4)), dtype=torch.uint8)


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


_quantize_registered = register("quantize_int6", _quantize, _quantize_shapes)
_fake_quantize_registered = register(
    "fake_quantize_int6", _fake_quantize, _fake_quantize_shapes, differentiate=_backward, setup_context=_setup_context
)


@dispatch.register_triton("quantize_int6")
def _quantize_op(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    # A registered op without a derivative refuses to be traced where one is asked for.
    return _quantize_registered(weight_RC.detach() if weight_RC.requires_grad else weight_RC)


@dispatch.register_triton("fake_quantize_int6")
def _fake_quantize_op(weight_RC: Tensor, dtype: torch.dtype | None) -> Tensor:
    return _fake_quantize_registered(weight_RC, weight_RC.dtype if dtype is None else dtype)


_dequantize_op = dispatch.register_triton("dequantize_int6")(
    register("dequantize_int6", _dequantize, _dequantize_shapes)
)
_pack_op = dispatch.register_triton("pack_int6")(register("pack_int6", _pack, _pack_shapes))
_unpack_op = dispatch.register_triton("unpack_int6")(register("unpack_int6", _unpack, _unpack_shapes))

# What does in a few launches what calling the op for each matrix does.
_ALL_AT_ONCE: dict[Callable, Callable] = {
    _quantize_op: _quantize_all,
    _dequantize_op: _dequantize_all,
    _fake_quantize_op: _fake_quantize_all,
    _pack_op: _pack_all,
    _unpack_op: _unpack_all,
}


def _for_each(name: str, matrices: Sequence[Tensor], *others: Sequence) -> list | tuple:
    """Op `name` of each of the matrices, with its entries of `others`; in the structure of `matrices`."""
    if len(matrices) == 0:
        return matrices[:]
    function = dispatch.implementation(name, matrices[0])
    if can_group(matrices) and function in _ALL_AT_ONCE:
        results = _ALL_AT_ONCE[function](matrices, *others)
    else:
        results = [function(*arguments) for arguments in zip(matrices, *others, strict=True)]
    return tuple(results) if isinstance(matrices, tuple) else list(results)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and (len(value) == 0 or isinstance(value[0], Tensor))


def _check_matrices(name: str, matrices: Sequence, dtypes: tuple[torch.dtype, ...]) -> None:
    for index, matrix in enumerate(matrices):
        check_tensor(f"{name}[{index}]", matrix, dtypes, "RC")
        check_device(f"{name}[{index}]", matrix, f"{name}[0]", matrices[0])


def _check_list_beside(name: str, value: object, other_name: str, other: Sequence) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple, as {other_name} is, not {type(value).__name__}")
    if len(value) != len(other):
        raise ValueError(f"{name} has length {len(value)}; it must have length {len(other)}, as {other_name} has")


def _check_scale(name: str, scale: object, codes_name: str, codes: Tensor) -> None:
    check_tensor(name, scale, (torch.float16,), "R")
    check_shape(name, scale, codes.shape[:1], codes_name, codes)
    check_device(name, scale, codes_name, codes)


def _check_columns(name: str, num_columns: object, packed_name: str, packed: Tensor) -> None:
    check_integer(name, num_columns, 0)
    size = 3 * -(-num_columns // 4)
    if packed.shape[1] != size:
        raise ValueError(
            f"{packed_name} has shape {list(packed.shape)}; for {name} {num_columns} it must be [R, {size}]"
        )


def quantize_int6(
    weight_RC: Tensor | Sequence[Tensor],
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]] | tuple[tuple[Tensor, Tensor], ...]:
    """Rounds each row to 63 evenly spaced levels.

        scale[r] = min(fp16(max_c |w[r, c]| / 31), 65504), or 1 where that is 0
        codes[r, c] = clamp(round(w[r, c] / scale[r]), -31, 31)

    The codes use the scale as rounded to fp16, a true division, and round half to even. A scale of 0 comes
    from a row of zeros, of values too small for fp16 (up to 31 * 2^-25), or of no columns; its codes are 0.
    An infinity takes code 31 or -31 and makes the scale 65504; NaN takes code 0 and has no part in the scale.

    Args:
        weight_RC: [R, C], float32, bfloat16, float16 or float64; R and C may be 0. Or a list or tuple of such
            matrices on one device, of any shapes and dtypes, done together.

    Returns:
        codes int8 [R, C] and scale float16 [R]; for a list, a list of such pairs, which may share one piece of
        memory. Computed in float32 (float64 for a float64 weight). Not differentiable: see
        `fake_quantize_int6`.

    Raises:
        TypeError: a weight is no tensor or its dtype is not one of those above.
        ValueError: a weight is not a matrix, or the weights are on different devices.

    Source: per-row symmetric quantization as in the parameter-golf records, without their floor on the scale.
    """
    if _is_list(weight_RC):
        _check_matrices("weight_RC", weight_RC, FLOATS)
        return _for_each("quantize_int6", weight_RC)
    check_tensor("weight_RC", weight_RC, FLOATS, "RC")
    return dispatch.implementation("quantize_int6", weight_RC)(weight_RC)


def dequantize_int6(
    codes: Tensor | Sequence[Tensor], scale: Tensor | Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """Turns codes back into weights.

        w[r, c] = codes[r, c] * scale[r]

    Args:
        codes: int8 [R, C], or a list or tuple of such matrices on one device, of any shapes, done together.
        scale: float16 [R], or as many of them as there are codes.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        [R, C] in `dtype`: the exact product (17 bits are enough for it), rounded once. Beyond 65504 float16
        has only infinity. Not differentiable. For a list, a list of such matrices, which may share one piece of memory.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a length does not fit, or the tensors are on different devices.
    """
    check_float_dtype("dtype", dtype)
    if _is_list(codes):
        _check_matrices("codes", codes, (torch.int8,))
        _check_list_beside("scale", scale, "codes", codes)
        for index, pair in enumerate(zip(scale, codes, strict=True)):
            _check_scale(f"scale[{index}]", pair[0], f"codes[{index}]", pair[1])
        scales = [entry.detach() for entry in scale]
        return _for_each("dequantize_int6", codes, scales, [dtype] * len(codes))
    check_tensor("codes", codes, (torch.int8,), "RC")
    _check_scale("scale", scale, "codes", codes)
    scale = scale.detach() if scale.requires_grad else scale
    return dispatch.implementation("dequantize_int6", codes)(codes, scale, dtype)


def fake_quantize_int6(
    weight_RC: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """The weight as it will be after quantization, for training through it.

        w'[r, c] = dequantize_int6(*quantize_int6(w), dtype)[r, c],   dw'/dw = 1

    Args:
        weight_RC: [R, C], float32, bfloat16, float16 or float64. Or a list or tuple of such matrices on one
            device, of any shapes and dtypes, done together.
        dtype: of the result, one of the same; the weight's by default.

    Returns:
        [R, C] in `dtype`, bit for bit what the artifact will hold. The gradient passes to the weight as it
        is, cast to the weight's dtype (the straight-through estimator). For a list, a list of such matrices,
        which may share one piece of memory.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a weight is not a matrix, or the weights are on different devices.

    Source: Bengio, Leonard and Courville 2013, arXiv:1308.3432.
    """
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    if _is_list(weight_RC):
        _check_matrices("weight_RC", weight_RC, FLOATS)
        return _for_each("fake_quantize_int6", weight_RC, [dtype] * len(weight_RC))
    check_tensor("weight_RC", weight_RC, FLOATS, "RC")
    return dispatch.implementation("fake_quantize_int6", weight_RC)(weight_RC, dtype)


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
    if _is_list(codes_RC):
        _check_matrices("codes_RC", codes_RC, (torch.int8,))
        return _for_each("pack_int6", codes_RC)
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
    if _is_list(packed):
        _check_matrices("packed", packed, (torch.uint8,))
        _check_list_beside("num_columns", num_columns, "packed", packed)
        for index, pair in enumerate(zip(num_columns, packed, strict=True)):
            _check_columns(f"num_columns[{index}]", pair[0], f"packed[{index}]", pair[1])
        return _for_each("unpack_int6", packed, num_columns)
    check_tensor("packed", packed, (torch.uint8,), "RC")
    _check_columns("num_columns", num_columns, "packed", packed)
    return dispatch.implementation("unpack_int6", packed)(packed, num_columns)
