"""Int6 weights: one fp16 scale a row, codes in [-31, 31], four codes in three bytes.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_float_dtype, check_integer, check_shape, check_tensor


def quantize_int6(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 63 evenly spaced levels.

        scale[r] = min(fp16(max_c |w[r, c]| / 31), 65504), or 1 where that is 0
        codes[r, c] = clamp(round(w[r, c] / scale[r]), -31, 31)

    The codes use the scale as rounded to fp16, a true division, and round half to even. A scale of 0 comes
    from a row of zeros, of values too small for fp16 (up to 31 * 2^-25), or of no columns; its codes are 0.
    An infinity takes code 31 or -31 and makes the scale 65504; NaN takes code 0 and has no part in the scale.

    Args:
        weight_RC: [R, C], float32, bfloat16, float16 or float64; R and C may be 0.

    Returns:
        codes int8 [R, C] and scale float16 [R]. Computed in float32 (float64 for a float64 weight). Not
        differentiable: see `fake_quantize_int6`.

    Raises:
        TypeError: the weight is no tensor or its dtype is not one of those above.
        ValueError: the weight is not a matrix.

    Source: per-row symmetric quantization as in the parameter-golf records, without their floor on the scale.
    """
    check_tensor("weight_RC", weight_RC, FLOATS, "RC")
    return dispatch.implementation("quantize_int6", weight_RC)(weight_RC)


def dequantize_int6(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turns codes back into weights.

        w[r, c] = codes[r, c] * scale[r]

    Args:
        codes: int8 [R, C].
        scale: float16 [R].
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        [R, C] in `dtype`: the exact product (17 bits are enough for it), rounded once. Beyond 65504 float16
        has only infinity.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, or the tensors are on different devices.
    """
    check_tensor("codes", codes, (torch.int8,), "RC")
    check_tensor("scale", scale, (torch.float16,), "R")
    check_shape("scale", scale, codes.shape[:1], "codes", codes)
    check_device("scale", scale, "codes", codes)
    check_float_dtype("dtype", dtype)
    return dispatch.implementation("dequantize_int6", codes)(codes, scale, dtype)


def fake_quantize_int6(weight_RC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as it will be after quantization, for training through it.

        w'[r, c] = dequantize_int6(*quantize_int6(w), dtype)[r, c],   dw'/dw = 1

    Args:
        weight_RC: [R, C], float32, bfloat16, float16 or float64.
        dtype: of the result, one of the same; the weight's by default.

    Returns:
        [R, C] in `dtype`, bit for bit what the artifact will hold. The gradient passes to the weight as it
        is, cast to the weight's dtype (the straight-through estimator).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the weight is not a matrix.

    Source: Bengio, Leonard and Courville 2013, arXiv:1308.3432.
    """
    check_tensor("weight_RC", weight_RC, FLOATS, "RC")
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    return dispatch.implementation("fake_quantize_int6", weight_RC)(weight_RC, dtype)


def pack_int6(codes_RC: Tensor) -> Tensor:
    """Packs four 6-bit codes into three bytes, row by row.

    With u = code + 32 in [0, 63], columns 4g to 4g + 3 become the little-endian 24-bit word

        u[4g] + 2^6 u[4g + 1] + 2^12 u[4g + 2] + 2^18 u[4g + 3]

    and code 0 stands in for the columns that the last group lacks.

    Args:
        codes_RC: int8 [R, C], each in [-32, 31]. Looking at the values would make the host wait for the
            device, so they are not checked: a code outside is packed modulo 64.

    Returns:
        uint8 [R, 3 * ceil(C / 4)].

    Raises:
        TypeError: the codes are no tensor or not int8.
        ValueError: the codes are not a matrix.
    """
    check_tensor("codes_RC", codes_RC, (torch.int8,), "RC")
    return dispatch.implementation("pack_int6", codes_RC)(codes_RC)


def unpack_int6(packed: Tensor, num_columns: int) -> Tensor:
    """The inverse of `pack_int6`, for all 64 codes.

    Args:
        packed: uint8 [R, 3 * ceil(C / 4)].
        num_columns: C.

    Returns:
        int8 [R, C], in [-32, 31].

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: C is negative, or `packed` has not the shape that goes with it.
    """
    check_tensor("packed", packed, (torch.uint8,), "RC")
    check_integer("num_columns", num_columns, 0)
    size = 3 * -(-num_columns // 4)
    if packed.shape[1] != size:
        raise ValueError(f"packed has shape {list(packed.shape)}; for num_columns {num_columns} it must be [R, {size}]")
    return dispatch.implementation("unpack_int6", packed)(packed, num_columns)
