"""The input stage of the model: token row + hashed bigram row, RMS norm, SmearGate, in one pass.

Shapes: B batch, T time, V vocabulary, K buckets, D channels; N = B * T rows; P programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.bigram_hash import hashed_pair
from kernels.checks import (
    FLOATS,
    INTEGERS,
    check_device,
    check_document_start,
    check_eps,
    check_integer,
    check_shape,
    check_tensor,
)
from kernels.launch import MAX_COLUMNS, cdiv, compute_dtype, contiguous, launch, tl, triton
from kernels.registration import register
from kernels.segment_sum import id_dtype, segment_order, segment_sums, segment_totals
from kernels.smear_gate import gate_grad, load_mix
from kernels.tuning import tile


@triton.jit
def load_token(p_tokens, p_start, row, N, T, V):
    """The token of a row (int32), -1 if it is not in [0, V), and whether a document starts there.

    Rows outside [0, N) start one.
    """
    inside = (row >= 0) & (row < N)
    starts = (row % T == 0) | (inside == 0)
    if p_start is not None:
        starts = starts | (tl.load(p_start + row, mask=starts == 0, other=1) != 0)
    token = tl.load(p_tokens + row, mask=inside, other=0)
    known = (token >= 0) & (token < V)  # before the cast, which keeps the low 32 bits alone
    return tl.where(known, token.to(tl.int32), -1), starts


@triton.jit
def embedded(
    token, before, starts, p_token_table, p_bigram_table, scale, K, r_D, D: tl.constexpr, COMPUTE: tl.constexpr
):
    """e = token_table[token] + scale * pair, pair = bigram_table[bucket]; NaN for token -1."""
    m_D = r_D < D
    e = tl.load(p_token_table + token.to(tl.int64) * D + r_D, mask=m_D & (token >= 0), other=float("nan")).to(COMPUTE)
    e = tl.where(m_D, e, 0)
    pair = tl.zeros_like(e)
    if p_bigram_table is not None:
        bucket = hashed_pair(token, before, starts, K)
        pair = tl.load(p_bigram_table + bucket.to(tl.int64) * D + r_D, mask=m_D, other=0).to(COMPUTE)
        e += scale * pair
    return e, pair


@triton.jit(do_not_specialize=["N", "T", "V", "K"])
def input_stage_fwd_kernel(
    p_tokens, p_token_table, p_bigram_table, p_scale, p_gate, p_start, p_y, N, T, V, K,
    EPS: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """y = (1 - g) n + g n_before, n = e / rms(e). b_N whole rows a program, each the next one's predecessor."""
    r_D = tl.arange(0, b_D)
    m_D = r_D < D
    mix = load_mix(p_gate, r_D, m_D, COMPUTE)
    scale = 1.0
    if p_scale is not None:
        scale = tl.load(p_scale).to(COMPUTE)
    first = tl.program_id(0) * b_N
    older, _ = load_token(p_tokens, p_start, first - 2, N, T, V)
    before, starts = load_token(p_tokens, p_start, first - 1, N, T, V)
    e, _ = embedded(before, older, starts, p_token_table, p_bigram_table, scale, K, r_D, D, COMPUTE)
    n_before = e * tl.rsqrt(tl.sum(e * e, axis=0) / D + EPS)
    # unrolled, so that the loads of all rows are on their way before the first row is done
    for index in tl.static_range(b_N):
        row = first + index
        token, starts = load_token(p_tokens, p_start, row, N, T, V)
        e, _ = embedded(token, before, starts, p_token_table, p_bigram_table, scale, K, r_D, D, COMPUTE)
        n = e * tl.rsqrt(tl.sum(e * e, axis=0) / D + EPS)
        y = (1 - mix) * n + mix * tl.where(starts, 0, n_before)
        tl.store(p_y + row.to(tl.int64) * D + r_D, y.to(p_y.dtype.element_ty), mask=m_D & (row < N))
        before, n_before = token, n


@triton.jit(do_not_specialize=["N", "T", "V", "K"])
def input_stage_bwd_kernel(
    p_grad, p_tokens, p_token_table, p_bigram_table, p_scale, p_gate, p_start, p_grad_e, p_gate_sums, p_scale_sums,
    N, T, V, K,
    EPS: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr, b_N: tl.constexpr, b_D: tl.constexpr,
):  # fmt: skip
    """grad_e of b_N whole rows a program, one after another; their sums of n (grad_after - grad) and <grad_e, pair>."""
    r_D = tl.arange(0, b_D)
    m_D = r_D < D
    mix = load_mix(p_gate, r_D, m_D, COMPUTE)
    scale = 1.0
    if p_scale is not None:
        scale = tl.load(p_scale).to(COMPUTE)
    first = tl.program_id(0) * b_N
    before, _ = load_token(p_tokens, p_start, first - 1, N, T, V)
    token, starts = load_token(p_tokens, p_start, first, N, T, V)
    grad = tl.load(p_grad + first.to(tl.int64) * D + r_D, mask=m_D & (first < N), other=0).to(COMPUTE)
    gate_sums = tl.zeros((b_D,), COMPUTE)
    scale_sums = tl.zeros((b_D,), COMPUTE)
    for index in range(tl.minimum(N - first, b_N).to(tl.int32)):
        row = first + index
        token_after, starts_after = load_token(p_tokens, p_start, row + 1, N, T, V)
        grad_after = tl.load(p_grad + (row + 1).to(tl.int64) * D + r_D, mask=m_D & (row + 1 < N), other=0).to(COMPUTE)
        grad_smeared = tl.where(starts_after, 0, grad_after)
        e, pair = embedded(token, before, starts, p_token_table, p_bigram_table, scale, K, r_D, D, COMPUTE)
        inverse = tl.rsqrt(tl.sum(e * e, axis=0) / D + EPS)
        n = e * inverse
        grad_n = (1 - mix) * grad + mix * grad_smeared
        grad_e = inverse * (grad_n - n * (tl.sum(grad_n * n, axis=0) / D))
        tl.store(p_grad_e + row.to(tl.int64) * D + r_D, grad_e.to(p_grad_e.dtype.element_ty), mask=m_D)
        gate_sums += n * (grad_smeared - grad)
        scale_sums += grad_e * pair
        before, token, starts, grad = token, token_after, starts_after, grad_after
    tl.store(p_gate_sums + tl.program_id(0).to(tl.int64) * D + r_D, gate_sums, mask=m_D)
    if p_scale_sums is not None:
        tl.store(p_scale_sums + tl.program_id(0), tl.sum(scale_sums, axis=0))


@triton.jit(do_not_specialize=["N", "T", "V", "K"])
def lookup_ids_kernel(p_tokens, p_start, p_id, N, T, V, K, b_N: tl.constexpr):
    """For the order of both tables' gradients: id[n] = token, id[N + n] = V + bucket; V + K, left out, if unknown."""
    row = tl.program_id(0) * b_N + tl.arange(0, b_N)
    token, starts = load_token(p_tokens, p_start, row, N, T, V)
    tl.store(p_id + row, tl.where(token >= 0, token, V + K).to(p_id.dtype.element_ty), mask=row < N)
    if K > 0:
        before, _ = load_token(p_tokens, p_start, row - 1, N, T, V)
        bucket = hashed_pair(token, before, starts, K)
        tl.store(p_id + N + row, (V + bucket).to(p_id.dtype.element_ty), mask=row < N)


def _run(
    tokens_BT: Tensor,
    token_table_VD: Tensor,
    gate_D: Tensor,
    bigram_table_KD: Tensor | None,
    scale: Tensor | None,
    document_start_BT: Tensor | None,
    eps: float,
) -> Tensor:
    batch, time = tokens_BT.shape
    vocabulary, channels = token_table_VD.shape
    buckets = 0 if bigram_table_KD is None else bigram_table_KD.shape[0]
    y_BTD = token_table_VD.new_empty((batch, time, channels))
    b_N, b_D, num_warps = tile("input_stage_fwd", channels, token_table_VD.get_device())
    tensors = (
        *(tokens_BT.contiguous(), token_table_VD.contiguous(), contiguous(bigram_table_KD)),
        *(scale, gate_D.contiguous(), contiguous(document_start_BT), y_BTD),
    )
    sizes = (batch * time, time, vocabulary, buckets)
    constants = (eps, channels, compute_dtype(y_BTD.dtype), b_N, b_D)
    grid = (cdiv(batch * time, b_N),)
    launch(input_stage_fwd_kernel, grid, tensors, sizes, constants, num_warps=num_warps)
    return y_BTD


def _fake(tokens_BT: Tensor, token_table_VD: Tensor, *_: Any) -> Tensor:
    return token_table_VD.new_empty((*tokens_BT.shape, token_table_VD.shape[1]))


def _run_backward(
    grad_BTD: Tensor,
    tokens_BT: Tensor,
    token_table_VD: Tensor,
    gate_D: Tensor,
    bigram_table_KD: Tensor | None,
    scale: Tensor | None,
    document_start_BT: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of token table, gate, bigram table and scale; empty for the last two where there are none."""
    tokens_BT, token_table_VD, gate_D = tokens_BT.contiguous(), token_table_VD.contiguous(), gate_D.contiguous()
    bigram_table_KD, document_start_BT = contiguous(bigram_table_KD), contiguous(document_start_BT)
    batch, time = tokens_BT.shape
    rows = batch * time
    vocabulary, channels = token_table_VD.shape
    buckets = 0 if bigram_table_KD is None else bigram_table_KD.shape[0]
    sizes = (rows, time, vocabulary, buckets)

    b_N, b_D, num_warps = tile("input_stage_bwd", channels, token_table_VD.get_device())
    programs = cdiv(rows, b_N)
    wide = torch.promote_types(token_table_VD.dtype, torch.float32)
    # 1 / rms(e) can be thousands before the scale makes up for it: float16 has no room for that
    half = token_table_VD.dtype == torch.float16
    grad_e_ND = token_table_VD.new_empty((rows, channels), dtype=wide if half else token_table_VD.dtype)
    gate_sums_PD = token_table_VD.new_empty((programs, channels), dtype=wide)
    scale_sums_P = None if scale is None else token_table_VD.new_empty(programs, dtype=wide)
    tensors = (
        *(grad_BTD.contiguous(), tokens_BT, token_table_VD, bigram_table_KD, scale, gate_D, document_start_BT),
        *(grad_e_ND, gate_sums_PD, scale_sums_P),
    )
    constants = (eps, channels, compute_dtype(wide), b_N, b_D)
    launch(input_stage_bwd_kernel, (programs,), tensors, sizes, constants, num_warps=num_warps)

    lookups = rows if bigram_table_KD is None else 2 * rows
    id_M = tokens_BT.new_empty(lookups, dtype=id_dtype(vocabulary + buckets))
    b_N, _, num_warps = tile("lookup_ids", 1, tokens_BT.get_device())
    tensors = (tokens_BT, document_start_BT, id_M)
    launch(lookup_ids_kernel, (cdiv(rows, b_N),), tensors, sizes, (b_N,), num_warps=num_warps)
    order = segment_order(id_M, vocabulary + buckets)
    sums_JD = segment_sums(grad_e_ND, order)
    grad_token_table_VD, _ = segment_totals(sums_JD, order, 0, token_table_VD)
    grad_bigram_table_KD, grad_scale = token_table_VD.new_empty(0), token_table_VD.new_empty(0)
    if bigram_table_KD is not None:
        grad_bigram_table_KD, _ = segment_totals(sums_JD, order, vocabulary, bigram_table_KD, scale)
    if scale is not None:
        grad_scale = scale_sums_P.sum().to(scale.dtype)
    return grad_token_table_VD, gate_grad(gate_sums_PD, gate_D), grad_bigram_table_KD, grad_scale


def _fake_backward(
    grad_BTD: Tensor,
    tokens_BT: Tensor,
    token_table_VD: Tensor,
    gate_D: Tensor,
    bigram_table_KD: Tensor | None,
    scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        token_table_VD.new_empty(token_table_VD.shape),
        gate_D.new_empty(gate_D.shape),
        token_table_VD.new_empty(0) if bigram_table_KD is None else bigram_table_KD.new_empty(bigram_table_KD.shape),
        token_table_VD.new_empty(0) if scale is None else scale.new_empty(()),
    )


_backward_op = register("input_stage_backward", _run_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple:
    _, _, _, bigram_table_KD, scale, _ = ctx.saved_tensors
    grads = _backward_op(grad_BTD, *ctx.saved_tensors, ctx.eps)
    grad_table_VD, grad_gate_D, grad_bigram_table_KD, grad_scale = grads
    return (
        *(None, grad_table_VD, grad_gate_D),
        None if bigram_table_KD is None else grad_bigram_table_KD,
        None if scale is None else grad_scale,
        *(None, None),
    )


_op = register("input_stage", _run, _fake, differentiate=_backward, setup_context=_setup_context)
dispatch.register_triton("input_stage")(_op)


def input_stage(
    tokens_BT: Tensor,
    token_table_VD: Tensor,
    gate_D: Tensor,
    bigram_table_KD: Tensor | None = None,
    scale: Tensor | None = None,
    document_start_BT: Tensor | None = None,
    *,
    eps: float = 2.0**-23,
) -> Tensor:
    """Tokens to what the first block reads: embedding, RMS norm and SmearGate, rounded once.

        e[b, i] = token_table[t[b, i]] + scale * bigram_table[h[b, i]],   h = bigram_hash(t, K, document_start)
        n[b, i] = e[b, i] / sqrt(mean(e[b, i]^2) + eps)
        y[b, i] = (1 - g) * n[b, i] + g * n[b, i - 1],   g = sigmoid(gate)

    where n[b, -1] = 0, and the predecessor is 0 wherever `document_start` is true as well.

    Args:
        tokens_BT: [B, T], any integer dtype, each in [0, V). Looking at the values would make the host wait
            for the device, so a GPU does not check them: a token outside gives NaN, and never a stray read.
        token_table_VD: [V, D] with D from 1 to 2^20, float32, bfloat16, float16 or float64.
        gate_D: [D], the logit of the mix; any of the same dtypes.
        bigram_table_KD: [K, D] with K >= 2, in the token table's dtype, already projected to the model's width
            (the projection commutes with the lookup); None for no bigram term.
        scale: [] (no dimensions), any of the same dtypes; None for 1.
        document_start_BT: [B, T] bool, true at the first token of each document; None: position 0 alone.
        eps: added to the mean square; not negative.

    Returns:
        [B, T, D] in the tables' dtype, computed in float32 (float64 for float64). Differentiable in both tables,
        the gate and the scale. The rows' gradients are kept in the tables' dtype (float32 for float16) on
        their way to the tables, where they are summed in float32 and in an order that only the tokens decide.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above, or eps is no number.
        ValueError: a shape does not fit, K is below 2, D is not from 1 to 2^20, eps is negative, a scale comes without
            a bigram table, or the tensors are on different devices.

    Source: the input stage of the parameter-golf records; Zhang and Sennrich 2019, arXiv:1910.07467, for RMS norm.
    """
    check_tensor("tokens_BT", tokens_BT, INTEGERS, "BT")
    check_tensor("token_table_VD", token_table_VD, FLOATS, "VD")
    check_integer("token_table_VD's number of columns", token_table_VD.shape[1], 1, MAX_COLUMNS)
    check_device("token_table_VD", token_table_VD, "tokens_BT", tokens_BT)
    check_tensor("gate_D", gate_D, FLOATS, "D")
    check_shape("gate_D", gate_D, token_table_VD.shape[1:], "token_table_VD", token_table_VD)
    check_device("gate_D", gate_D, "tokens_BT", tokens_BT)
    if bigram_table_KD is not None:
        check_tensor("bigram_table_KD", bigram_table_KD, (token_table_VD.dtype,), "KD")
        wanted = (bigram_table_KD.shape[0], token_table_VD.shape[1])
        check_shape("bigram_table_KD", bigram_table_KD, wanted, "token_table_VD", token_table_VD)
        check_integer("bigram_table_KD's number of rows", bigram_table_KD.shape[0], 2, 2**31)
        check_device("bigram_table_KD", bigram_table_KD, "tokens_BT", tokens_BT)
    if scale is not None:
        if bigram_table_KD is None:
            raise ValueError("scale is given without bigram_table_KD, the table that it scales")
        check_tensor("scale", scale, FLOATS, "")
        check_device("scale", scale, "tokens_BT", tokens_BT)
    check_document_start(document_start_BT, "tokens_BT", tokens_BT)
    check_eps(eps)
    stage = dispatch.implementation("input_stage", token_table_VD)
    return stage(tokens_BT, token_table_VD, gate_D, bigram_table_KD, scale, document_start_BT, eps)
