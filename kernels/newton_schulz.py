"""Newton-Schulz: orthogonalizes a matrix, or all matrices of a model, by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.checks import FLOATS, check_device, check_dtype, check_integer
from kernels.newton_schulz_tiles import orthogonalize
from kernels.reference import NAMED_COEFFICIENTS, Triple, coefficients_per_step
from kernels.registration import is_traced


def _run(matrices: Sequence[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    """Of tensors [..., M, N], none of them empty or float64; the coefficients of all steps in one row."""
    triples = tuple(zip(*[iter(coefficients)] * 3, strict=True))
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_dtype.setdefault(matrix.dtype, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in by_dtype.values():
        batches = []
        for index in indices:
            *leading, rows, columns = matrices[index].shape
            batches.append(matrices[index].detach().contiguous().view(math.prod(leading), rows, columns))
        for index, result in zip(indices, orthogonalize(batches, triples), strict=True):
            results[index] = result.view(matrices[index].shape)
    return [results[index] for index in range(len(matrices))]


@torch.library.custom_op("golf::newton_schulz", mutates_args=())
def _traced(matrices: Sequence[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    """`_run` where something traces: there no result may share memory with another."""
    return [result.clone(memory_format=torch.contiguous_format) for result in _run(matrices, coefficients)]


@_traced.register_fake
def _fake(matrices: Sequence[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    return [torch.empty(matrix.shape, dtype=torch.bfloat16, device=matrix.device) for matrix in matrices]


@dispatch.register_triton("newton_schulz")
def _op(
    matrices: Tensor | Sequence[Tensor],
    *,
    steps: int,
    coefficients: str | Triple | Sequence[Triple] | None,
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    if isinstance(matrices, Tensor):
        return _op([matrices], steps=steps, coefficients=coefficients)[0]
    if torch.is_grad_enabled() and any([matrix.requires_grad for matrix in matrices]):
        return reference.newton_schulz(matrices, steps=steps, coefficients=coefficients)
    ours = [index for index, matrix in enumerate(matrices) if matrix.numel() and matrix.dtype != torch.float64]
    flat = [float(number) for triple in coefficients_per_step(coefficients, steps) for number in triple]
    run = _traced if is_traced(matrices) else _run
    results = dict(zip(ours, run([matrices[index] for index in ours], flat), strict=True)) if ours else {}
    rest = [index for index in range(len(matrices)) if index not in results]
    others = reference.newton_schulz([matrices[index] for index in rest], steps=steps, coefficients=coefficients)
    results.update(zip(rest, others, strict=True))
    return type(matrices)([results[index] for index in range(len(matrices))])


def newton_schulz(
    matrices: Tensor | Sequence[Tensor],
    *,
    steps: int = 5,
    coefficients: str | Triple | Sequence[Triple] | None = None,
) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """Pushes every singular value of each matrix towards 1 and keeps the singular vectors.

        X = G / (||G||_F + 1e-7)
        `steps` times:   A = X X^T,   X = a X + (b A + c A A) X

    for M <= N; a taller matrix is transposed before and after. G = U S V^T becomes U p(S / ||G||_F) V^T,
    p being the odd polynomials x -> a x + b x^3 + c x^5 of all steps, one after another. The norm and the
    division are computed in float32, the products take and give bfloat16 and sum in float32; a float64
    matrix is float64 throughout.

    Coefficients by name: "quintic" is (3.4445, -4.7750, 2.0315) at every step. Five steps take singular
    values from 0.01 of the norm up to between 0.68 and 1.14, from 0.002 up to between 0.68 and 1.21, and
    smaller ones to at most 485 times what they were. "polar_express" has a triple of its own for each
    step and converges to 1: five steps take singular values from 0.001 up to between 0.84 and 1.13, eight
    to 1. Its published safety factor of 1.01 is part of its first seven triples; the eighth repeats.

    Args:
        matrices: one tensor [..., M, N], or a list or tuple of such tensors of any shapes, done together;
            float32, bfloat16, float16 or float64, on one device. Any dimension may be 0.
        steps: how many iterations, at least 1.
        coefficients: None for "quintic", a name, one triple (a, b, c) for every step, or `steps` triples.

    Returns:
        Tensors of the inputs' shapes, in the structure they came in; bfloat16, or float64 for float64. None
        shares memory with an input; they need not be contiguous, and those of a list may share one piece of
        memory. Zeros give zeros; a NaN or an infinity anywhere in a matrix makes that whole matrix NaN.

        A matrix's result does not depend on what else is in the list. The kernel rounds a matrix to bfloat16 before it
        divides by the norm, and takes long ones by their Gram matrix (`kernels.newton_schulz_plan`), so its result is
        not the reference's to the bit. Where a gradient is asked for, and for float64, the reference runs.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a tensor has fewer than two dimensions, the devices differ, `steps` is below 1, or the
            coefficients are an unknown name, not triples, or not as many as the steps.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; for Polar Express,
    Amsel et al. 2025, arXiv:2505.16932.
    """
    check_integer("steps", steps, 1)
    if coefficients is not None:
        _check_coefficients(coefficients, steps)
    if isinstance(matrices, Tensor):
        _check_matrix("matrices", matrices, matrices)
        first = matrices
    elif isinstance(matrices, (list, tuple)):
        if not matrices:
            return matrices[:]
        first = matrices[0]
        for index, matrix in enumerate(matrices):
            _check_matrix(f"matrices[{index}]", matrix, first)
    else:
        raise TypeError(f"matrices must be a tensor or a list or tuple of them, not {type(matrices)}")
    return dispatch.implementation("newton_schulz", first)(matrices, steps=steps, coefficients=coefficients)


def _check_matrix(name: str, value: object, first: Tensor) -> None:
    check_dtype(name, value, FLOATS)
    if value.dim() < 2:
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [..., M, N]")
    check_device(name, value, "matrices[0]", first)


def _check_coefficients(value: object, steps: int) -> None:
    if isinstance(value, str):
        if value not in NAMED_COEFFICIENTS:
            raise ValueError(f"coefficients is {value!r}; it may be one of {', '.join(NAMED_COEFFICIENTS)}")
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"coefficients must be None, a name, a triple or a list of triples, not {type(value).__name__}")
    if _is_triple(value):
        return
    if not all(_is_triple(entry) for entry in value):
        raise ValueError(f"coefficients is {value!r}; it may be a triple of numbers or a list of those")
    if len(value) != steps:
        raise ValueError(f"coefficients has {len(value)} triples; for steps {steps} it must have {steps}")


def _is_triple(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    return all(isinstance(number, (int, float)) for number in value)
