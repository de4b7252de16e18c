"""The second half of a gradient that every row adds to: the sum of what each program added up, always in one order.

Shapes: P programs, D channels.
"""

from __future__ import annotations

from kernels.launch import tl, triton


@triton.jit
def column_sums(p_sums, r_D, P, D: tl.constexpr, COMPUTE: tl.constexpr, b_P: tl.constexpr, b_D: tl.constexpr):
    """The sums [b_D] of the columns r_D of `sums` [P, D]."""
    r_P = tl.arange(0, b_P)
    total = tl.zeros((b_P, b_D), COMPUTE)
    for first in range(0, P, b_P):
        m_PD = (r_P < P - first)[:, None] & (r_D < D)[None, :]
        total += tl.load(p_sums + (first + r_P).to(tl.int64)[:, None] * D + r_D[None, :], mask=m_PD, other=0)
    return tl.sum(total, axis=0)
