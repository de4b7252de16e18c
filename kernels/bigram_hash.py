"""BigramHash: a hashed embedding of the last two tokens.

Shapes: B batch, T time, K buckets, D channels; N = B * T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import (
    FLOATS,
    INTEGERS,
    check_device,
    check_document_start,
    check_integer,
    check_tensor,
)
from kernels.launch import cdiv, compute_dtype, contiguous, launch, tl, triton
from kernels.registration import register
from kernels.segment_sum import id_dtype, segment_order, segment_sums, segment_totals
from kernels.tuning import tile


@triton.jit
def hashed_pair(token, before, starts, K):
    """The bucket of a token (int32) after `before`; K - 1 where a document starts."""
    mixed = (token * 36313) ^ (before * 27191)
    # `%` keeps the dividend's sign, where the definition rounds down: never negative
    remainder = mixed % (K - 1)
    bucket = tl.where(remainder < 0, remainder + (K - 1), remainder)
    return tl.where(starts, K - 1, bucket)


@triton.jit
def load_buckets(p_tokens, p_start, position, mask, T, K):
    """The buckets of positions in the flat [N]."""
    starts = position % T == 0
    if p_start is not None:
        starts = starts | (tl.load(p_start + position, mask=mask, other=0) != 0)
    token = tl.load(p_tokens + position, mask=mask, other=0).to(tl.int32)
    before = tl.load(p_tokens + position - 1, mask=mask & (starts == 0), other=0).to(tl.int32)
    return hashed_pair(token, before, starts, K)


@triton.jit(do_not_specialize=["N", "T", "K"])
def bigram_hash_kernel(p_tokens, p_start, p_bucket, N, T, K, b_N: tl.constexpr):
    """bucket = ((36313 t) XOR (27191 t_before)) mod (K - 1), b_N positions a program."""
    position = tl.program_id(0) * b_N + tl.arange(0, b_N)
    mask = position < N
    bucket = load_buckets(p_tokens, p_start, position, mask, T, K)
    tl.store(p_bucket + position, bucket.to(p_bucket.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "T", "K"])
def bigram_hash_embed_fwd_kernel(
    p_tokens, p_table, p_scale, p_start, p_y, N, T, K,
    D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """y = scale * table[bucket], one tile of positions a program."""
    position = tl.program_id(0) * b_N + tl.arange(0, b_N)
    m_N = position < N
    bucket = load_buckets(p_tokens, p_start, position, m_N, T, K)
    r_D = tl.program_id(1) * b_D + tl.arange(0, b_D)
    m_ND = m_N[:, None] & (r_D < D)[None, :]
    row = tl.load(p_table + bucket.to(tl.int64)[:, None] * D + r_D[None, :], mask=m_ND, other=0)
    if p_scale is not None:
        row = row.to(COMPUTE) * tl.load(p_scale).to(COMPUTE)
    # streamed past the cache, which is better used for the table
    offsets = position.to(tl.int64)[:, None] * D + r_D[None, :]
    tl.store(p_y + offsets, row.to(p_y.dtype.element_ty), mask=m_ND, cache_modifier=".cs")


def buckets_of(
    tokens_BT: Tensor, num_buckets: int, document_start_BT: Tensor | None, dtype: torch.dtype = torch.int64
) -> Tensor:
    """The bucket of every position, as `dtype`."""
    batch, time = tokens_BT.shape
    bucket_BT = tokens_BT.new_empty((batch, time), dtype=dtype)
    b_N, _, num_warps = tile("bigram_hash", 1, tokens_BT.get_device())
    grid = (cdiv(batch * time, b_N),)
    tensors = (tokens_BT, document_start_BT, bucket_BT)
    launch(bigram_hash_kernel, grid, tensors, (batch * time, time, num_buckets), (b_N,), num_warps=num_warps)
    return bucket_BT


def _hash(tokens_BT: Tensor, num_buckets: int, document_start_BT: Tensor | None) -> Tensor:
    return buckets_of(tokens_BT.contiguous(), num_buckets, contiguous(document_start_BT))


def _fake_hash(tokens_BT: Tensor, num_buckets: int, document_start_BT: Tensor | None) -> Tensor:
    return tokens_BT.new_empty(tokens_BT.shape, dtype=torch.int64)


def _embed(tokens_BT: Tensor, table_KD: Tensor, scale: Tensor | None, document_start_BT: Tensor | None) -> Tensor:
    tokens_BT, table_KD = tokens_BT.contiguous(), table_KD.contiguous()
    batch, time = tokens_BT.shape
    buckets, channels = table_KD.shape
    y_BTD = table_KD.new_empty((batch, time, channels))
    b_N, b_D, num_warps = tile("bigram_hash_embed_fwd", channels, table_KD.get_device())
    grid = (cdiv(batch * time, b_N), cdiv(channels, b_D))
    tensors = (tokens_BT, table_KD, scale, contiguous(document_start_BT), y_BTD)
    constants = (channels, compute_dtype(table_KD.dtype), b_N, b_D)
    sizes = (batch * time, time, buckets)
    launch(bigram_hash_embed_fwd_kernel, grid, tensors, sizes, constants, num_warps=num_warps)
    return y_BTD


def _fake_embed(tokens_BT: Tensor, table_KD: Tensor, scale: Tensor | None, document_start_BT: Tensor | None) -> Tensor:
    return table_KD.new_empty((*tokens_BT.shape, table_KD.shape[1]))


def _embed_backward(
    grad_BTD: Tensor, tokens_BT: Tensor, table_KD: Tensor, scale: Tensor | None, document_start_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of table and scale; the scale's is empty where there is no scale."""
    grad_BTD, table_KD = grad_BTD.contiguous(), table_KD.contiguous()
    buckets = table_KD.shape[0]
    bucket_BT = buckets_of(tokens_BT.contiguous(), buckets, contiguous(document_start_BT), id_dtype(buckets))
    order = segment_order(bucket_BT.flatten(), buckets)
    sums_JD = segment_sums(grad_BTD.flatten(0, 1), order)
    grad_KD, dot = segment_totals(sums_JD, order, 0, table_KD, scale, with_dot=scale is not None)
    return grad_KD, table_KD.new_empty(0) if scale is None else dot.to(scale.dtype)


def _fake_embed_backward(
    grad_BTD: Tensor, tokens_BT: Tensor, table_KD: Tensor, scale: Tensor | None, document_start_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_scale = table_KD.new_empty(0) if scale is None else scale.new_empty(())
    return table_KD.new_empty(table_KD.shape), grad_scale


_embed_backward_op = register("bigram_hash_embed_backward", _embed_backward, _fake_embed_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
    grad_KD, grad_scale = _embed_backward_op(grad_BTD, *ctx.saved_tensors)
    return None, grad_KD, None if ctx.saved_tensors[2] is None else grad_scale, None


_hash_op = dispatch.register_triton("bigram_hash")(register("bigram_hash", _hash, _fake_hash))
_embed_op = dispatch.register_triton("bigram_hash_embed")(
    register("bigram_hash_embed", _embed, _fake_embed, differentiate=_backward, setup_context=_setup_context)
)


def bigram_hash(tokens_BT: Tensor, num_buckets: int, document_start_BT: Tensor | None = None) -> Tensor:
    """Hashes each token with its predecessor into one of K buckets.

        h[b, i] = ((36313 * t[b, i]) XOR (27191 * t[b, i - 1])) mod (K - 1)    for i > 0
        h[b, 0] = K - 1

    in wrapping 32-bit two's complement, the modulus rounding down, so that 0 <= h <= K - 2 even for negative
    products. A document start takes bucket K - 1, as position 0 does. Exact: the same on every device.

    Args:
        tokens_BT: [B, T], any integer dtype; of wider values the low 32 bits count.
        num_buckets: K, from 2 to 2^31.
        document_start_BT: [B, T] bool, true at the first token of each document; None: position 0 alone.

    Returns:
        int64 [B, T].

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape does not fit, the devices differ, or K is out of range.

    Source: the BigramHash embedding of the parameter-golf records, after hashed n-gram embeddings.
    """
    check_tensor("tokens_BT", tokens_BT, INTEGERS, "BT")
    check_integer("num_buckets", num_buckets, 2, 2**31)
    check_document_start(document_start_BT, "tokens_BT", tokens_BT)
    return dispatch.implementation("bigram_hash", tokens_BT)(tokens_BT, num_buckets, document_start_BT)


def bigram_hash_embed(
    tokens_BT: Tensor, table_KD: Tensor, scale: Tensor | None = None, document_start_BT: Tensor | None = None
) -> Tensor:
    """Looks up each token pair's row of a hashed table.

        y[b, i] = scale * table[h[b, i]],   h = bigram_hash(tokens, K, document_start)

    Args:
        tokens_BT: [B, T], any integer dtype.
        table_KD: [K, D] with K >= 2 and D >= 1, float32, bfloat16, float16 or float64.
        scale: [] (no dimensions), any of the same dtypes, not necessarily the table's; None for 1.
        document_start_BT: [B, T] bool, true at the first token of each document; None: position 0 alone.

    Returns:
        [B, T, D] in the table's dtype; the product and the gradients are computed in float32 (float64 for a
        float64 table) and rounded once. Differentiable in table and scale.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above.
        ValueError: a shape does not fit, K is below 2, D is 0, or the tensors are on different devices.

    Source: as for `bigram_hash`.
    """
    check_tensor("tokens_BT", tokens_BT, INTEGERS, "BT")
    check_tensor("table_KD", table_KD, FLOATS, "KD")
    check_integer("table_KD's number of rows", table_KD.shape[0], 2, 2**31)
    check_integer("table_KD's number of columns", table_KD.shape[1], 1)
    check_device("table_KD", table_KD, "tokens_BT", tokens_BT)
    if scale is not None:
        check_tensor("scale", scale, FLOATS, "")
        check_device("scale", scale, "tokens_BT", tokens_BT)
    check_document_start(document_start_BT, "tokens_BT", tokens_BT)
    embed = dispatch.implementation("bigram_hash_embed", table_KD)
    return embed(tokens_BT, table_KD, scale, document_start_BT)
