"""Muon's step around Newton-Schulz. In place, unlike the public ops: it moves momentum and weights.

Shapes: M, N a matrix; Z matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.addresses import KeptTables, Pieces, Tensors, as_tensors, kept_tables, table_on, typed_pointer
from kernels.launch import cdiv, launch, number_of, tensor_and_number, tl, triton
from kernels.newton_schulz_tiles import Momentum, orthogonalize
from kernels.reference import Triple, coefficients_per_step
from kernels.registration import is_traced

CHUNK = 4096  # elements of a weight that one program updates
VECTOR = 4  # elements that a lane takes at a time: 16 bytes of float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["LR", "DECAY"])
def muon_update_kernel(
    p_first_weight, p_first_update, p_lr, p_chunks, p_matrices, p_scales, LR, DECAY,
    VECTOR: tl.constexpr, b_E: tl.constexpr,
):  # fmt: skip
    """w = (1 - lr * decay) * w - lr * scale * u. The b_E elements of one chunk of one matrix a program.

    `p_chunks` is int32 [., 2]: matrix, number of the chunk in it; `p_matrices` int64 [Z, 3]: the weight's address, the
    update's, both at multiples of VECTOR elements, and the size; `p_scales` float32 [Z].
    """
    matrix = tl.load(p_chunks + 2 * tl.program_id(0))
    p_matrix = p_matrices + 3 * matrix
    p_weight = typed_pointer(p_first_weight, p_matrix, VECTOR)
    p_update = typed_pointer(p_first_update, p_matrix + 1, VECTOR)
    r_E = tl.load(p_chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * b_E + tl.arange(0, b_E)
    mask = r_E < tl.load(p_matrix + 2)
    lr = number_of(p_lr, LR)
    weight = tl.load(p_weight + r_E, mask=mask, other=0).to(tl.float32)
    update = tl.load(p_update + r_E, mask=mask, other=0).to(tl.float32)
    weight = (1 - lr * DECAY) * weight - lr * tl.load(p_scales + matrix) * update
    tl.store(p_weight + r_E, weight.to(p_first_weight.dtype.element_ty), mask=mask)


def momentum_newton_schulz_(
    buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool,
    clip: Tensor | None = None,
    steps: int = 5,
    coefficients: str | Triple | Sequence[Triple] | None = None,
) -> Sequence[Tensor]:
    """buffer = momentum * buffer + clip * gradient, in place; then `newton_schulz` of what lies ahead of it.

    Args:
        buffers, gradients: [M, N] each, a buffer like its gradient.
        momentum: a number, or a tensor `[]` where the buffers are.
        nesterov: whether clip * gradient + momentum * buffer is orthogonalized, or the buffer.
        clip: float32 `[]` where the buffers are; None for 1.
        steps, coefficients: as for `newton_schulz`.

    Returns:
        What `newton_schulz` returns for the list; of the kernel's results each is made when it is asked for.
    """
    if not gradients:
        return []
    run = reference.momentum_newton_schulz_
    if not is_traced((momentum, buffers, gradients)):
        run = dispatch.implementation("momentum_newton_schulz_", gradients[0])
    options = {"momentum": momentum, "nesterov": nesterov, "clip": clip}
    return run(buffers, gradients, **options, steps=steps, coefficients=coefficients)


def muon_update_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """weight = (1 - lr * weight_decay) * weight - lr * scale * update, in place and computed in float32.

    Args:
        weights, updates: of equal shapes.
        scales: one for each.
        lr: a number, or a tensor `[]` where the weights are.
    """
    if not weights:
        return
    run = reference.muon_update_
    if not is_traced((lr, weights, updates)):
        run = dispatch.implementation("muon_update_", weights[0])
    run(weights, updates, scales, lr=lr, weight_decay=weight_decay)


def _can_run(tensors: Tensors | Pieces, factor: float | Tensor) -> bool:
    """Whether all are contiguous, aligned, not empty, of one dtype, and where the factor is."""
    dtype, addresses = tensors.dtypes[0], tensors.addresses
    if dtype not in DTYPES or (isinstance(factor, Tensor) and factor.device != tensors.like.device):
        return False
    return addresses is not None and 0 not in addresses and tensors.dtypes.count(dtype) == len(tensors)


@dispatch.register_triton("momentum_newton_schulz_")
def _momentum_newton_schulz_(
    buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool,
    clip: Tensor | None,
    steps: int,
    coefficients: str | Triple | Sequence[Triple] | None,
) -> Sequence[Tensor]:
    if len(buffers) != len(gradients):
        raise ValueError(f"{len(buffers)} buffers for {len(gradients)} gradients: as many are needed")
    buffers, gradients = as_tensors(buffers), as_tensors(gradients)
    if gradients.dtypes != buffers.dtypes or not (_can_run(gradients, momentum) and _can_run(buffers, momentum)):
        options = {"momentum": momentum, "nesterov": nesterov, "clip": clip}
        return reference.momentum_newton_schulz_(buffers, gradients, **options, steps=steps, coefficients=coefficients)
    triples = coefficients_per_step(coefficients, steps)
    addresses = (*gradients.addresses, *buffers.addresses)
    results = orthogonalize(gradients, triples, Momentum(buffers, addresses, momentum, nesterov, clip))
    torch.autograd.graph.increment_version(buffers)
    return results


class _Work(NamedTuple):
    """Tables for `muon_update_kernel`."""

    chunks: Tensor
    matrices: Tensor
    scales: Tensor
    programs: int
    size: int  # elements of all matrices


_works = KeptTables()


@kept_tables
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    chunks = [(matrix, chunk) for matrix, size in enumerate(sizes) for chunk in range(cdiv(size, CHUNK))]
    return table_on(device, chunks, torch.int32)


@dispatch.register_triton("muon_update_")
def _muon_update_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    weights, updates, scales = as_tensors(weights), as_tensors(updates), tuple(scales)
    if not (_can_run(weights, lr) and _can_run(updates, lr)):
        reference.muon_update_(weights, updates, scales, lr=lr, weight_decay=weight_decay)
        return
    first, device = weights[0], weights[0].device
    addresses, update_addresses, shapes = weights.addresses, updates.addresses, updates.shapes
    torch.autograd.graph.increment_version(weights)  # so that a graph that kept them notices

    def make() -> _Work:
        sizes = tuple(map(math.prod, shapes))
        if sizes != tuple(map(Tensor.numel, weights)):
            raise ValueError("weights and updates differ in size: each weight needs an update of its own shape")
        chunks = _chunks(sizes, device)
        rows = list(zip(addresses, update_addresses, sizes, strict=True))
        matrices, factors = table_on(device, rows, torch.int64), table_on(device, scales, torch.float32)
        return _Work(chunks, matrices, factors, len(chunks), sum(sizes))

    work = _works.get(device, (addresses, update_addresses, shapes, scales), make)
    tensor, number = tensor_and_number(lr)
    launch(
        muon_update_kernel,
        (work.programs,),
        (first, updates.like, tensor, work.chunks, work.matrices, work.scales),
        (number, float(weight_decay)),
        (VECTOR, CHUNK),
        num_warps=8,
        counted=lambda: (work.size * (2 * first.itemsize + updates.like.itemsize), 0.0),
    )
