"""From the attention's one projection to its queries, keys and values: RMS norm per head, rotary embedding, gain.

Shapes: B batch, T time, H query heads, G key heads and as many value heads, h head size, C = (H + 2 G) h channels,
F = h / 2 pairs of a head; N = B * T rows, P programs. A line of a tile is one head of one row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import FLOATS, check_device, check_eps, check_integer, check_shape, check_tensor
from kernels.launch import MAX_COLUMNS, cdiv, compute_dtype, launch, tl, triton
from kernels.registration import register
from kernels.tuning import tile

BACKWARD_TILES = 4  # tiles a program adds up before it writes its share of the gain's gradient


@triton.jit
def part_of(p_q, p_k, p_v, head, H: tl.constexpr, G: tl.constexpr, F: tl.constexpr):
    """Where a head of the projection is in q, k or v, and how far apart the rows are there."""
    if head < H:
        p_part = p_q + head * 2 * F
    elif head < H + G:
        p_part = p_k + (head - H) * 2 * F
    else:
        p_part = p_v + (head - H - G) * 2 * F
    return p_part, tl.where(head < H, H * 2 * F, G * 2 * F)


@triton.jit
def load_halves(p_x, offsets, mask, F: tl.constexpr, COMPUTE: tl.constexpr):
    """The first and the second half of every head [lines, b_F], 0 outside."""
    first = tl.load(p_x + offsets, mask=mask, other=0).to(COMPUTE)
    return first, tl.load(p_x + F + offsets, mask=mask, other=0).to(COMPUTE)


@triton.jit
def store_halves(p_x, offsets, first, second, mask, F: tl.constexpr):
    """The inverse of `load_halves`."""
    tl.store(p_x + offsets, first.to(p_x.dtype.element_ty), mask=mask)
    tl.store(p_x + F + offsets, second.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_gain(p_gain, heads, H: tl.constexpr, COMPUTE: tl.constexpr):
    """What each of `heads` [lines] is multiplied by [lines, 1]: 1 for those of k."""
    gain = tl.load(p_gain + heads, mask=heads < H, other=0).to(COMPUTE)
    return tl.where(heads < H, gain, 1)[:, None]  # Triton's interpreter has no 1 in bfloat16 for `other`


@triton.jit
def inverse_rms(first, second, EPS: tl.constexpr, F: tl.constexpr):
    """1 / rms of every head [lines, 1]."""
    squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
    return tl.rsqrt(squares / (2 * F) + EPS)


@triton.jit(do_not_specialize=["N", "T"])
def qk_norm_rotary_fwd_kernel(
    p_qkv, p_gain, p_cos, p_sin, p_q, p_k, p_v, N, T,
    EPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    COMPUTE: tl.constexpr, b_N: tl.constexpr, b_H: tl.constexpr, b_F: tl.constexpr,
):  # fmt: skip
    """b_N rows of b_H heads a program, which are all of q, of k or of v; neighbours take other heads of the rows."""
    SLABS: tl.constexpr = (H + 2 * G) // b_H
    head = tl.program_id(0) % SLABS * b_H
    first_row = tl.program_id(0) // SLABS * b_N
    r_L = tl.arange(0, b_N * b_H)  # lines
    r_N = r_L[:, None] // b_H
    r_F = tl.arange(0, b_F)[None, :]
    m_N = r_N < N - first_row
    m_NF = m_N & (r_F < F)
    offsets = r_L[:, None] % b_H * 2 * F + r_F
    p_qkv += first_row.to(tl.int64) * ((H + 2 * G) * 2 * F) + head * 2 * F
    first, second = load_halves(p_qkv, r_N * ((H + 2 * G) * 2 * F) + offsets, m_NF, F, COMPUTE)
    if head < H + G:
        position = (first_row + r_N) % T * F + r_F
        cos = tl.load(p_cos + position, mask=m_NF, other=0).to(COMPUTE)
        sin = tl.load(p_sin + position, mask=m_NF, other=0).to(COMPUTE)
        gain = load_gain(p_gain, head + r_L % b_H, H, COMPUTE)
        scale = gain * inverse_rms(first, second, EPS, F)
        first, second = scale * (first * cos + second * sin), scale * (second * cos - first * sin)
    p_part, stride = part_of(p_q, p_k, p_v, head, H, G, F)
    store_halves(p_part + first_row.to(tl.int64) * stride, r_N * stride + offsets, first, second, m_NF, F)


@triton.jit(do_not_specialize=["N", "T"])
def qk_norm_rotary_bwd_kernel(
    p_grad_q, p_grad_k, p_grad_v, p_qkv, p_gain, p_cos, p_sin, p_grad_qkv, p_sums, N, T,
    EPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    COMPUTE: tl.constexpr, b_N: tl.constexpr, b_H: tl.constexpr, b_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """grad_qkv = inverse gain (d - n mean(d n)), d the gradient rotated back; sums [P, H] of d n, TILES tiles each."""
    SLABS: tl.constexpr = (H + 2 * G) // b_H
    head = tl.program_id(0) % SLABS * b_H
    program = tl.program_id(0) // SLABS
    r_L = tl.arange(0, b_N * b_H)  # lines
    r_N = r_L[:, None] // b_H
    r_F = tl.arange(0, b_F)[None, :]
    offsets = r_L[:, None] % b_H * 2 * F + r_F
    p_part, stride = part_of(p_grad_q, p_grad_k, p_grad_v, head, H, G, F)
    gain = load_gain(p_gain, head + r_L % b_H, H, COMPUTE)
    sums = tl.zeros((b_N * b_H, 1), COMPUTE)
    begin = program * TILES * b_N
    for index in range(tl.cdiv(tl.minimum(N - begin, TILES * b_N).to(tl.int32), b_N)):
        first_row = begin + index * b_N
        m_N = r_N < N - first_row
        m_NF = m_N & (r_F < F)
        p_grad = p_part + first_row.to(tl.int64) * stride
        grad1, grad2 = load_halves(p_grad, r_N * stride + offsets, m_NF, F, COMPUTE)
        base = first_row.to(tl.int64) * ((H + 2 * G) * 2 * F) + head * 2 * F
        offsets_qkv = r_N * ((H + 2 * G) * 2 * F) + offsets
        if head < H + G:
            first, second = load_halves(p_qkv + base, offsets_qkv, m_NF, F, COMPUTE)
            position = (first_row + r_N) % T * F + r_F
            cos = tl.load(p_cos + position, mask=m_NF, other=0).to(COMPUTE)
            sin = tl.load(p_sin + position, mask=m_NF, other=0).to(COMPUTE)
            inverse = inverse_rms(first, second, EPS, F)
            n1, n2 = first * inverse, second * inverse
            d1, d2 = grad1 * cos - grad2 * sin, grad1 * sin + grad2 * cos
            product = tl.sum(d1 * n1 + d2 * n2, axis=1, keep_dims=True)
            mean = product / (2 * F)
            grad1, grad2 = inverse * gain * (d1 - n1 * mean), inverse * gain * (d2 - n2 * mean)
            sums += tl.where(m_N, product, 0)  # with eps 0, NaN in rows that are not there
        store_halves(p_grad_qkv + base, offsets_qkv, grad1, grad2, m_NF, F)
    r_H = head + tl.arange(0, b_H)
    total = tl.sum(tl.reshape(sums, (b_N, b_H)), axis=0)
    tl.store(p_sums + program.to(tl.int64) * H + r_H, total, mask=r_H < H)


def _tile(kernel: str, heads: int, kv_heads: int, pairs: int, device: int) -> tuple[int, int, int, int]:
    """b_N, b_H, b_F and the number of warps. b_H divides H and G, so that no program has heads of two kinds."""
    lines, b_F, num_warps = tile(kernel, pairs, device)
    common = math.gcd(heads, kv_heads)
    b_H = min(common & -common, lines)  # the largest power of two in it
    return lines // b_H, b_H, b_F, num_warps


def _run(
    qkv_BTC: Tensor, gain_H: Tensor, cos_TF: Tensor, sin_TF: Tensor, num_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, _ = qkv_BTC.shape
    heads, pairs = gain_H.shape[0], cos_TF.shape[1]
    q_BTHh, k_BTGh, v_BTGh = _fake(qkv_BTC, gain_H, cos_TF, sin_TF, num_kv_heads, eps)
    b_N, b_H, b_F, num_warps = _tile("qk_norm_rotary_fwd", heads, num_kv_heads, pairs, qkv_BTC.get_device())
    grid = (cdiv(batch * time, b_N) * (heads + 2 * num_kv_heads) // b_H,)
    inputs = [tensor.contiguous() for tensor in (qkv_BTC, gain_H, cos_TF, sin_TF)]
    constants = (eps, heads, num_kv_heads, pairs, compute_dtype(qkv_BTC.dtype), b_N, b_H, b_F)
    tensors = (*inputs, q_BTHh, k_BTGh, v_BTGh)
    launch(qk_norm_rotary_fwd_kernel, grid, tensors, (batch * time, time), constants, num_warps=num_warps)
    return q_BTHh, k_BTGh, v_BTGh


def _fake(
    qkv_BTC: Tensor, gain_H: Tensor, cos_TF: Tensor, sin_TF: Tensor, num_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, _ = qkv_BTC.shape
    counts = (gain_H.shape[0], num_kv_heads, num_kv_heads)
    q_BTHh, k_BTGh, v_BTGh = (qkv_BTC.new_empty((batch, time, count, 2 * cos_TF.shape[1])) for count in counts)
    return q_BTHh, k_BTGh, v_BTGh


def _run_backward(
    grad_q_BTHh: Tensor,
    grad_k_BTGh: Tensor,
    grad_v_BTGh: Tensor,
    qkv_BTC: Tensor,
    gain_H: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, time, heads, size = grad_q_BTHh.shape
    kv_heads, pairs = grad_k_BTGh.shape[2], size // 2
    b_N, b_H, b_F, num_warps = _tile("qk_norm_rotary_bwd", heads, kv_heads, pairs, qkv_BTC.get_device())
    programs = cdiv(batch * time, b_N * BACKWARD_TILES)
    grad_qkv_BTC = qkv_BTC.new_empty(qkv_BTC.shape)
    sums_PH = qkv_BTC.new_empty((programs, heads), dtype=torch.promote_types(qkv_BTC.dtype, torch.float32))
    inputs = (grad_q_BTHh, grad_k_BTGh, grad_v_BTGh, qkv_BTC, gain_H, cos_TF, sin_TF)
    tensors = (*(tensor.contiguous() for tensor in inputs), grad_qkv_BTC, sums_PH)
    constants = (eps, heads, kv_heads, pairs, compute_dtype(qkv_BTC.dtype), b_N, b_H, b_F, BACKWARD_TILES)
    grid = (programs * (heads + 2 * kv_heads) // b_H,)
    launch(qk_norm_rotary_bwd_kernel, grid, tensors, (batch * time, time), constants, num_warps=num_warps)
    return grad_qkv_BTC, sums_PH.sum(0).to(gain_H.dtype)


def _fake_backward(
    grad_q_BTHh: Tensor, grad_k_BTGh: Tensor, grad_v_BTGh: Tensor, qkv_BTC: Tensor, gain_H: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return qkv_BTC.new_empty(qkv_BTC.shape), gain_H.new_empty(gain_H.shape)


_backward_op = register("qk_norm_rotary_backward", _run_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *grads: Tensor) -> tuple:
    return *_backward_op(*grads, *ctx.saved_tensors, ctx.eps), None, None, None, None


_op = register("qk_norm_rotary", _run, _fake, differentiate=_backward, setup_context=_setup_context)
dispatch.register_triton("qk_norm_rotary")(_op)


def qk_norm_rotary(
    qkv_BTC: Tensor, gain_H: Tensor, cos_TF: Tensor, sin_TF: Tensor, num_kv_heads: int, *, eps: float = 2.0**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits an attention's projection into heads; normalizes and rotates queries and keys, and scales the queries.

        n = head / sqrt(mean(head^2) + eps)
        rotated = [n1 * cos + n2 * sin, n2 * cos - n1 * sin],   n1 and n2 the halves of n
        q = gain * rotated,   k = rotated,   v = head

    with the cos and sin of the row's position. The values are copied, so that the gradients of queries, keys and
    values are written side by side, as the one gradient of the projection.

    Args:
        qkv_BTC: [B, T, C], float32, bfloat16, float16 or float64: H query heads, G key heads and G value heads of
            size h, one after another, C = (H + 2 G) h; B and T may be 0.
        gain_H: [H] with H >= 1, a factor for each query head; any of the same dtypes, not necessarily qkv's.
        cos_TF: [T, F] with F = h / 2 from 1 to 2^20, of the angle that each pair (j, j + F) of a head is turned by at
            each position; any of the same dtypes. No gradient.
        sin_TF: [T, F], likewise.
        num_kv_heads: G, at least 1. It need not divide H.
        eps: added to the mean square; not negative.

    Returns:
        q [B, T, H, h], k and v [B, T, G, h], contiguous, in qkv's dtype, computed in float32 (float64 for a float64
        qkv), rounded once. Differentiable in qkv and gain.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above, num_kv_heads is no integer, or
            eps is no number.
        ValueError: a shape does not fit, H, G or F is 0, F is above 2^20, eps is negative, or the tensors are on
            different devices.

    Source: Henry et al. 2020, arXiv:2010.04245, for the norm of queries and keys; Su et al. 2021, arXiv:2104.09864,
    for the rotary embedding; Zhang and Sennrich 2019, arXiv:1910.07467, for RMS norm.
    """
    check_tensor("qkv_BTC", qkv_BTC, FLOATS, "BTC")
    check_tensor("gain_H", gain_H, FLOATS, "H")
    check_integer("gain_H's number of heads", gain_H.shape[0], 1)
    check_device("gain_H", gain_H, "qkv_BTC", qkv_BTC)
    check_tensor("cos_TF", cos_TF, FLOATS, "TF")
    check_integer("cos_TF's number of columns", cos_TF.shape[1], 1, MAX_COLUMNS)
    check_shape("cos_TF", cos_TF, (qkv_BTC.shape[1], cos_TF.shape[1]), "qkv_BTC", qkv_BTC)
    check_device("cos_TF", cos_TF, "qkv_BTC", qkv_BTC)
    check_tensor("sin_TF", sin_TF, FLOATS, "TF")
    check_shape("sin_TF", sin_TF, cos_TF.shape, "cos_TF", cos_TF)
    check_device("sin_TF", sin_TF, "qkv_BTC", qkv_BTC)
    check_integer("num_kv_heads", num_kv_heads, 1)
    heads, size = gain_H.shape[0], 2 * cos_TF.shape[1]
    wanted = (heads + 2 * num_kv_heads) * size
    if qkv_BTC.shape[2] != wanted:
        raise ValueError(
            f"qkv_BTC has {qkv_BTC.shape[2]} channels; for {heads} query, {num_kv_heads} key and {num_kv_heads} value "
            f"heads of size {size} it must have {wanted}"
        )
    check_eps(eps)
    attention_inputs = dispatch.implementation("qk_norm_rotary", qkv_BTC)
    return attention_inputs(qkv_BTC, gain_H, cos_TF, sin_TF, num_kv_heads, eps)
