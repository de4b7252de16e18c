"""BigramHash: a hashed embedding of the last two tokens.

Shapes: B batch, T time, K buckets, D channels.
"""

from __future__ import annotations

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
        table_KD: [K, D] with K >= 2, float32, bfloat16, float16 or float64.
        scale: [] (no dimensions), any of the same dtypes, not necessarily the table's; None for 1.
        document_start_BT: [B, T] bool, true at the first token of each document; None: position 0 alone.

    Returns:
        [B, T, D] in the table's dtype; the product and the gradients are computed in float32 (float64 for a
        float64 table) and rounded once. Differentiable in table and scale.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of those above.
        ValueError: a shape does not fit, K is below 2, or the tensors are on different devices.

    Source: as for `bigram_hash`.
    """
    check_tensor("tokens_BT", tokens_BT, INTEGERS, "BT")
    check_tensor("table_KD", table_KD, FLOATS, "KD")
    check_integer("table_KD's number of rows", table_KD.shape[0], 2, 2**31)
    check_device("table_KD", table_KD, "tokens_BT", tokens_BT)
    if scale is not None:
        check_tensor("scale", scale, FLOATS, "")
        check_device("scale", scale, "tokens_BT", tokens_BT)
    check_document_start(document_start_BT, "tokens_BT", tokens_BT)
    embed = dispatch.implementation("bigram_hash_embed", table_KD)
    return embed(tokens_BT, table_KD, scale, document_start_BT)
