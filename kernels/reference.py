"""Every op in plain PyTorch: the definition that the kernels are held to.

float64 inputs are computed in float64, every other dtype in float32, and the result is cast back; products of
activations with weights are PyTorch's in their own dtype. Nothing here checks its arguments: the public functions of
`kernels` do, and hand over to these.

Shapes: B batch, T time, D channels, K buckets, R rows, C columns, G groups of four columns; N matrices of S
rows and L columns, S <= L. Of attention: H query heads, G key/value heads, I = H + G, J = H + 2 G, h head size,
C = J h, F = h / 2. Of the MLP: H hidden width. Of the head: V vocabulary, N = B T rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Triple = tuple[float, float, float]

INT6_LIMIT = 31  # the quantizer's largest code; packing also carries -32
FP16_MAX = 65504.0
FP8_NORM = 256.0  # of a row in float8; a square in its units is at most 1.3 times that, and e4m3 ends at 448

# Amsel et al. 2025, arXiv:2505.16932: the optimal quintics for singular values down to 1e-3 of the norm; the
# last one repeats. As published, each but the last is evaluated at x / 1.01, so that a singular value which
# rounding pushes past the interval it was made for still converges.
_POLAR_EXPRESS_EXACT = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_POLAR_EXPRESS = (
    *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS_EXACT),
    (1.875, -1.25, 0.375),
)

NAMED_COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": _POLAR_EXPRESS,
}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, for what an autograd function returns.

    Where that is `x.to` the dtype x has, torch.compile of PyTorch 2.11 makes all of the function's gradients zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


def smear_gate(x_BTD: Tensor, gate_D: Tensor, document_start_BT: Tensor | None = None) -> Tensor:
    """y_i = (1 - g) * x_i + g * x_{i-1}, g = sigmoid(gate), with x_{-1} = 0 at every document start."""
    dtype = _compute_dtype(x_BTD.dtype)
    current_BTD = x_BTD.to(dtype)
    previous_BTD = torch.cat((torch.zeros_like(current_BTD[:, :1]), current_BTD[:, :-1]), dim=1)
    if document_start_BT is not None:
        previous_BTD = previous_BTD.masked_fill(document_start_BT.unsqueeze(-1), 0)
    mix_D = torch.sigmoid(gate_D.to(dtype))
    return ((1 - mix_D) * current_BTD + mix_D * previous_BTD).to(x_BTD.dtype)


def bigram_hash(tokens_BT: Tensor, num_buckets: int, document_start_BT: Tensor | None = None) -> Tensor:
    """((36313 * t_i) XOR (27191 * t_{i-1})) mod (K - 1) in wrapping int32; K - 1 at every start."""
    # Only the low 32 bits of the products matter. Masking first keeps every int64 product exact, so that the
    # wrap to int32 is arithmetic and the same on every device, not an overflow.
    low_BT = tokens_BT.to(torch.int64) & 0xFFFFFFFF
    mixed_BT = (36313 * low_BT[:, 1:]) ^ (27191 * low_BT[:, :-1])
    signed_BT = ((mixed_BT & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    later_BT = torch.remainder(signed_BT, num_buckets - 1)
    buckets_BT = torch.cat((torch.full_like(low_BT[:, :1], num_buckets - 1), later_BT), dim=1)
    if document_start_BT is not None:
        buckets_BT = buckets_BT.masked_fill(document_start_BT, num_buckets - 1)
    return buckets_BT


def bigram_hash_embed(
    tokens_BT: Tensor, table_KD: Tensor, scale: Tensor | None = None, document_start_BT: Tensor | None = None
) -> Tensor:
    """table[bigram_hash(tokens, K)] * scale, in the table's dtype."""
    dtype = _compute_dtype(table_KD.dtype)
    buckets_BT = bigram_hash(tokens_BT, table_KD.shape[0], document_start_BT)
    # The upcast comes before the lookup so that the table's gradient is summed in `dtype`, and F.embedding
    # sums it in a fixed order: the same bits each time.
    rows_BTD = F.embedding(buckets_BT, table_KD.to(dtype))
    if scale is not None:
        rows_BTD = rows_BTD * scale.to(dtype)
    return rows_BTD.to(table_KD.dtype)


def input_stage(
    tokens_BT: Tensor,
    token_table_VD: Tensor,
    gate_D: Tensor,
    bigram_table_KD: Tensor | None = None,
    scale: Tensor | None = None,
    document_start_BT: Tensor | None = None,
    eps: float = 2.0**-23,
) -> Tensor:
    """smear_gate(rms_norm(token_table[tokens] + bigram_hash_embed(tokens, bigram_table, scale)))."""
    dtype = _compute_dtype(token_table_VD.dtype)
    x_BTD = F.embedding(tokens_BT.to(torch.int64), token_table_VD.to(dtype))
    if bigram_table_KD is not None:
        x_BTD = x_BTD + bigram_hash_embed(tokens_BT, bigram_table_KD.to(dtype), scale, document_start_BT)
    x_BTD = F.rms_norm(x_BTD, (x_BTD.shape[-1],), eps=eps)
    return smear_gate(x_BTD, gate_D, document_start_BT).to(token_table_VD.dtype)


def add_rms_norm(
    x_BTD: Tensor,
    y_BTD: Tensor,
    x_scale_D: Tensor | None = None,
    y_scale_D: Tensor | None = None,
    skip_BTD: Tensor | None = None,
    skip_scale_D: Tensor | None = None,
    eps: float = 2.0**-23,
    pass_on: bool = False,
) -> tuple[Tensor, ...]:
    """sum = x_scale * (x + skip_scale * skip) + y_scale * y, and rms_norm(sum); with `pass_on` also x and y."""
    dtype = _compute_dtype(x_BTD.dtype)

    def scaled(term_BTD: Tensor, scale_D: Tensor | None) -> Tensor:
        return term_BTD.to(dtype) if scale_D is None else term_BTD.to(dtype) * scale_D.to(dtype)

    stream_BTD = x_BTD.to(dtype)
    if skip_BTD is not None:
        stream_BTD = stream_BTD + scaled(skip_BTD, skip_scale_D)
    sum_BTD = scaled(stream_BTD, x_scale_D) + scaled(y_BTD, y_scale_D)
    normed_BTD = F.rms_norm(sum_BTD, (sum_BTD.shape[-1],), eps=eps)
    passed_on = (x_BTD, y_BTD) if pass_on else ()
    return sum_BTD.to(x_BTD.dtype), normed_BTD.to(x_BTD.dtype), *passed_on


def qk_norm_rotary(
    qkv_BTC: Tensor, gain_H: Tensor, cos_TF: Tensor, sin_TF: Tensor, num_kv_heads: int, eps: float = 2.0**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """q = gain * rotate(rms_norm(query head)), k = rotate(rms_norm(key head)), v = a copy of the value head."""
    dtype = _compute_dtype(qkv_BTC.dtype)
    heads, size = gain_H.shape[0], 2 * cos_TF.shape[1]
    heads_BTJh = qkv_BTC.unflatten(2, (heads + 2 * num_kv_heads, size))
    qk_BTIh = F.rms_norm(heads_BTJh[:, :, : heads + num_kv_heads].to(dtype), (size,), eps=eps)
    first, second = qk_BTIh.chunk(2, dim=-1)
    cos, sin = cos_TF.to(dtype)[:, None], sin_TF.to(dtype)[:, None]
    qk_BTIh = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    q_BTHh = (qk_BTIh[:, :, :heads] * gain_H.to(dtype)[:, None]).to(qkv_BTC.dtype)
    k_BTGh = qk_BTIh[:, :, heads:].to(qkv_BTC.dtype).contiguous()
    v_BTGh = heads_BTJh[:, :, heads + num_kv_heads :].clone(memory_format=torch.contiguous_format)
    return q_BTHh, k_BTGh, v_BTGh


def squared_relu_mlp(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
    """residual + relu(x up^T)^2 down^T, each product in x's dtype as PyTorch multiplies it."""
    y_BTD = F.linear(F.relu(F.linear(x_BTD, up_HD)).square(), down_DH)
    return y_BTD if residual_BTD is None else residual_BTD + y_BTD


def rows_in_fp8(rows_RC: Tensor, dtype: torch.dtype, factor_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row times the factor, scaled to the norm `FP8_NORM` and rounded to float8 `dtype`; and what its norm was.

    Codes are 0 where the norm is 0, infinite or NaN.
    """
    rows_RC = rows_RC.to(_compute_dtype(rows_RC.dtype))
    if factor_C is not None:
        rows_RC = rows_RC * factor_C
    norm_R = rows_RC.square().sum(1).sqrt()
    usable_R1 = ((norm_R > 0) & (norm_R < math.inf))[:, None]
    scaled_RC = rows_RC * (FP8_NORM / torch.where(usable_R1, norm_R[:, None], 1))
    return torch.where(usable_R1, scaled_RC, 0).to(dtype), norm_R


def squared_relu_mlp_fp8_forward(
    x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and what backward needs: c = relu(cos(x, up))^2 in float8, the norms of x's and of up's rows."""
    dtype = _compute_dtype(x_BTD.dtype)
    x_ND, x_norm_N = rows_in_fp8(x_BTD.flatten(0, 1), torch.float8_e4m3fn)
    up_HD, up_norm_H = rows_in_fp8(up_HD, torch.float8_e4m3fn)
    down_DH, down_norm_D = rows_in_fp8(down_DH, torch.float8_e4m3fn, up_norm_H.square())
    cosines_NH = x_ND.to(dtype) @ up_HD.to(dtype).mT / FP8_NORM**2
    squares_NH = (FP8_NORM * F.relu(cosines_NH).square()).to(torch.float8_e4m3fn)
    y_ND = squares_NH.to(dtype) @ down_DH.to(dtype).mT
    y_BTD = (y_ND * (x_norm_N.square()[:, None] * down_norm_D / FP8_NORM**2)).view(x_BTD.shape)
    if residual_BTD is not None:
        y_BTD = residual_BTD + y_BTD
    return _cast(y_BTD, x_BTD.dtype), squares_NH, x_norm_N, up_norm_H


def squared_relu_mlp_fp8_backward(
    grad_BTD: Tensor,
    x_BTD: Tensor,
    up_HD: Tensor,
    down_DH: Tensor,
    squares_NH: Tensor,
    x_norm_N: Tensor,
    up_norm_H: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down; those of the weights from products in x's dtype."""
    dtype = _compute_dtype(x_BTD.dtype)
    grad_ND, grad_norm_N = rows_in_fp8(grad_BTD.flatten(0, 1), torch.float8_e5m2)
    down_HD, down_norm_H = rows_in_fp8(down_DH.mT, torch.float8_e4m3fn)
    norm_H = up_norm_H * down_norm_H
    up_DH, back_norm_D = rows_in_fp8(up_HD.mT, torch.float8_e4m3fn, norm_H)
    squares_NH = squares_NH.to(dtype) / FP8_NORM
    slopes_NH = squares_NH.sqrt() * (grad_ND.to(dtype) @ down_HD.to(dtype).mT / FP8_NORM**2)
    row_N1 = (2 * x_norm_N * grad_norm_N)[:, None]
    rounded_NH = (FP8_NORM * slopes_NH).to(torch.float8_e5m2)
    grad_x_ND = rounded_NH.to(dtype) @ up_DH.to(dtype).mT * (row_N1 * back_norm_D / FP8_NORM**2)
    grad_h_NH = (slopes_NH * (row_N1 * norm_H)).to(x_BTD.dtype)
    hidden_NH = (squares_NH * (x_norm_N[:, None] * up_norm_H).square()).to(x_BTD.dtype)
    grad_x_BTD = grad_x_ND.view(x_BTD.shape).to(x_BTD.dtype)
    return grad_x_BTD, grad_h_NH.mT @ x_BTD.flatten(0, 1), grad_BTD.flatten(0, 1).mT @ hidden_NH


class _SquaredReluMlpFp8(torch.autograd.Function):
    """Rounding to float8 passes gradients as a plain cast would."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_BTD: Tensor,
        up_HD: Tensor,
        down_DH: Tensor,
        residual_BTD: Tensor | None,
    ) -> Tensor:
        y_BTD, *kept = squared_relu_mlp_fp8_forward(x_BTD, up_HD, down_DH, residual_BTD)
        ctx.adds = residual_BTD is not None
        ctx.save_for_backward(x_BTD, up_HD, down_DH, *kept)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        gradients = squared_relu_mlp_fp8_backward(grad_BTD, *ctx.saved_tensors)
        return *gradients, grad_BTD if ctx.adds else None


def squared_relu_mlp_fp8(x_BTD: Tensor, up_HD: Tensor, down_DH: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
    """residual + relu(x up^T)^2 down^T, of factors that are rounded to float8 with a scale for each row.

    x and up's rows are scaled to one norm, so that the products are cosines and their squares are below 1 whatever the
    tensors hold: the squares need no scale of their own. up's norms are in down's columns instead.
    """
    return _SquaredReluMlpFp8.apply(x_BTD, up_HD, down_DH, residual_BTD)


def linear_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, soft_cap: float | None = None, reduction: str = "mean"
) -> Tensor:
    """log(sum(exp(z))) - z[target], z = x weight^T in x's dtype, then soft_cap * tanh(z / soft_cap); or its mean."""
    z_NV = F.linear(x_BTD, weight_VD).flatten(0, 1).to(_compute_dtype(x_BTD.dtype))
    if soft_cap is not None:
        z_NV = soft_cap * torch.tanh(z_NV / soft_cap)
    # no target is one to ignore, as PyTorch's -100 would be
    options = {"ignore_index": torch.iinfo(torch.int64).min, "reduction": reduction}
    loss = F.cross_entropy(z_NV, targets_BT.flatten().to(torch.int64), **options)
    return loss if reduction == "mean" else loss.view(targets_BT.shape)


def cast_weights(
    matrices: Sequence[Tensor], dtype: torch.dtype, scales: Sequence[Tensor | None], joined: Sequence[int]
) -> list[Tensor]:
    """scale[:, None] * w of each matrix in `dtype`; the next joined[i] of them, row after row, are result i."""
    compute = _compute_dtype(matrices[0].dtype)
    parts = [
        (weight_RC if scale_R is None else scale_R.to(compute)[:, None] * weight_RC.to(compute)).to(dtype)
        for weight_RC, scale_R in zip(matrices, scales, strict=True)
    ]
    return [torch.cat(parts[end - count : end]) for count, end in zip(joined, accumulate(joined), strict=True)]


def quantize_int6(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """scale = fp16(max|w| / 31), 1 where 0, at most 65504; codes = clamp(round(w / scale), -31, 31)."""
    # NaN becomes 0, and an infinity the largest finite number, where scale and code are saturated as well.
    values_RC = torch.nan_to_num(weight_RC.detach().to(_compute_dtype(weight_RC.dtype)))
    rows, columns = values_RC.shape
    largest_R = values_RC.abs().amax(dim=1) if columns else values_RC.new_zeros(rows)
    # By a number, a GPU divides by multiplying with its reciprocal, which is not always the quotient.
    limit_R = torch.full_like(largest_R, INT6_LIMIT)
    scale_R = (largest_R / limit_R).clamp(max=FP16_MAX).to(torch.float16)
    scale_R = torch.where(scale_R == 0, torch.ones_like(scale_R), scale_R)
    levels_RC = torch.round(values_RC / scale_R.to(values_RC.dtype).unsqueeze(1))
    return levels_RC.clamp(-INT6_LIMIT, INT6_LIMIT).to(torch.int8), scale_R


def dequantize_int6(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float32(codes) * float32(scale), cast to `dtype`; the product needs 17 bits, so it is exact."""
    return _cast(codes.to(torch.float32) * scale.to(torch.float32).unsqueeze(1), dtype)


class _FakeQuantizeInt6(torch.autograd.Function):
    """The rounded weight forward, the gradient of a plain cast backward."""

    @staticmethod
    def forward(weight_RC: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantize_int6(*quantize_int6(weight_RC), dtype)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, torch.dtype], output: Tensor
    ) -> None:
        ctx.weight_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_RC: Tensor) -> tuple[Tensor, None]:
        return grad_RC.to(ctx.weight_dtype), None


def fake_quantize_int6(weight_RC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dequantize(quantize(weight)) in `dtype` (the weight's by default); the gradient passes unchanged."""
    return _FakeQuantizeInt6.apply(weight_RC, weight_RC.dtype if dtype is None else dtype)


def pack_int6(codes_RC: Tensor) -> Tensor:
    """Four codes, offset by 32, as one little-endian 24-bit word; code 0 fills the last group."""
    rows, columns = codes_RC.shape
    padded_RC = F.pad(codes_RC.to(torch.int32), (0, -columns % 4))
    first, second, third, fourth = ((padded_RC + 32) & 63).reshape(rows, -(-columns // 4), 4).unbind(-1)
    word_RG = first | second << 6 | third << 12 | fourth << 18
    return torch.stack([word_RG >> shift & 255 for shift in (0, 8, 16)], dim=-1).flatten(1).to(torch.uint8)


def unpack_int6(packed: Tensor, num_columns: int) -> Tensor:
    """The codes that `pack_int6` packed."""
    rows, size = packed.shape
    low, middle, high = packed.to(torch.int32).reshape(rows, size // 3, 3).unbind(-1)
    word_RG = low | middle << 8 | high << 16
    codes_RC = torch.stack([word_RG >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1).flatten(1) - 32
    return codes_RC[:, :num_columns].to(torch.int8)


def coefficients_per_step(coefficients: str | Triple | Sequence[Triple] | None, steps: int) -> tuple[Triple, ...]:
    """One (a, b, c) a step; a named list or a single triple goes on with its last entry."""
    if coefficients is None:
        coefficients = "quintic"
    if isinstance(coefficients, str):
        triples = NAMED_COEFFICIENTS[coefficients]
    elif isinstance(coefficients[0], (int, float)):
        triples = (tuple(coefficients),)
    else:
        triples = tuple(tuple(triple) for triple in coefficients)
    return tuple(triples[min(step, len(triples) - 1)] for step in range(steps))


def newton_schulz(
    matrices: Tensor | Sequence[Tensor],
    *,
    steps: int = 5,
    coefficients: str | Triple | Sequence[Triple] | None = None,
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """X = G / (||G||_F + 1e-7), then A = X X^T, X = a X + (b A + c A^2) X on the short side, `steps` times.

    Matrices of one shape, or of its transpose, are iterated as one batch.
    """
    triples = coefficients_per_step(coefficients, steps)
    if isinstance(matrices, Tensor):
        return _orthogonalize_all([matrices], triples)[0]
    results = _orthogonalize_all(matrices, triples)
    return tuple(results) if isinstance(matrices, tuple) else results


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, in float64."""
    return torch.stack(torch._foreach_norm(tensors)).double().square()


def clip_factors(sums: Tensor, largest: float) -> Tensor:
    """f = min(1, largest / (sqrt(sum_i sums[i]) + 1e-6)) and 1 / f, in float32."""
    factor = (largest / (sums.sum().sqrt() + 1e-6)).clamp(max=1)
    return torch.stack((factor, 1 / factor)).float()


def momentum_newton_schulz_(
    buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool,
    clip: Tensor | None = None,
    steps: int = 5,
    coefficients: str | Triple | Sequence[Triple] | None = None,
) -> list[Tensor]:
    """g = clip * gradient; buffer = momentum * buffer + g, in place; then newton_schulz of g + momentum * buffer, or of
    the buffer."""
    if clip is not None:
        gradients = torch._foreach_mul(gradients, clip)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    ahead = buffers
    if nesterov and isinstance(momentum, Tensor):
        ahead = torch._foreach_add(gradients, torch._foreach_mul(buffers, momentum))
    elif nesterov:
        ahead = torch._foreach_add(gradients, buffers, alpha=momentum)
    return newton_schulz(list(ahead), steps=steps, coefficients=coefficients)


def muon_update_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """weight = (1 - lr * weight_decay) * weight - lr * scale * update, in place."""
    moves = [torch.empty_like(weight) for weight in weights]
    torch._foreach_copy_(moves, list(updates))
    torch._foreach_mul_(moves, list(scales))
    torch._foreach_mul_(moves, lr)
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_sub_(weights, moves)


def _orthogonalize_all(matrices: Sequence[Tensor], triples: Sequence[Triple]) -> list[Tensor]:
    groups: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape[-2:]
        groups.setdefault((min(rows, columns), max(rows, columns), matrix.dtype), []).append(index)
    results: dict[int, Tensor] = {}
    for (short, long, _), indices in groups.items():
        batches = []
        for index in indices:
            matrix = matrices[index]
            wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
            batches.append(wide.reshape(math.prod(wide.shape[:-2]), short, long))
        pieces = _orthogonalize(torch.cat(batches), triples).split([len(batch) for batch in batches])
        for index, piece in zip(indices, pieces, strict=True):
            *leading, rows, columns = matrices[index].shape
            wide = piece.reshape(*leading, short, long)
            results[index] = wide if rows <= columns else wide.mT
    return [results[index] for index in range(len(matrices))]


def _orthogonalize(batch_NSL: Tensor, triples: Sequence[Triple]) -> Tensor:
    product_dtype = torch.float64 if batch_NSL.dtype == torch.float64 else torch.bfloat16
    if batch_NSL.numel() == 0:
        return batch_NSL.to(product_dtype)
    x_NSL = batch_NSL.to(_compute_dtype(batch_NSL.dtype))
    # Squares of entries near the top of the float range overflow: divide by the largest entry where it is
    # above 1, and the 1e-7 with it, which leaves the quotient as it is.
    peak_N11 = torch.linalg.vector_norm(x_NSL, ord=math.inf, dim=(-2, -1), keepdim=True).clamp(min=1)
    x_NSL = x_NSL / peak_N11
    norm_N11 = torch.linalg.vector_norm(x_NSL, dim=(-2, -1), keepdim=True)
    x_NSL = (x_NSL / (norm_N11 + 1e-7 / peak_N11)).to(product_dtype)
    for a, b, c in triples:
        gram_NSS = torch.bmm(x_NSL, x_NSL.mT)
        # With alpha 0, torch 2.13's bfloat16 baddbmm on a CPU leaves beta out, or the result unwritten.
        polynomial_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c) if c else b * gram_NSS
        x_NSL = torch.baddbmm(x_NSL, polynomial_NSS, x_NSL, beta=a)
    return x_NSL
