"""What "equal" means, for tests and benchmarks alike; `kernels.cases` has the inputs.

The truth is the reference in float64. A kernel passes if `|kernel - truth| <= 2 |eager - truth| + 1 ulp`, where
eager is the reference in the kernel's own dtypes and an ulp is the spacing of the output's dtype at the truth:
element by element for lookups and what is rounded once to 16 bits, else in root mean square over all draws of the
tensor (one of few elements is a noisy sample, so more are drawn). Integers are equal or wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.cases import HALVES, Case, Draw

POOL = 32  # numbers of a result, at least, that a root mean square is taken over: a few are a noisy sample


class MismatchError(AssertionError):
    """A result that breaks the error rule; names the op, the tensor and by how much."""


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_of(entry)


def for_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of a tensor, or a list of it for each tensor of a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [for_tensors(function, entry) for entry in value]
    return function(value) if isinstance(value, Tensor) else value


def results(
    case: Case, function: Callable[..., Any], arguments: dict[str, Any], upstream: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of one call by name: "output", "output 1", "grad x_BTD", and of a list "grad scales[0]".

    `upstream` are the gradients of the outputs, cast to their dtypes; None for no gradients.
    """
    trained = case.differentiable if upstream else ()
    leaves = {name: for_tensors(lambda x: x.detach().requires_grad_(), arguments[name]) for name in trained}
    outputs = list(tensors_of(function(**{**arguments, **leaves})))
    named = {f"output {index}" if index else "output": output.detach() for index, output in enumerate(outputs)}
    if leaves:
        grad_outputs = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
        gradients = iter(torch.autograd.grad(outputs, list(tensors_of(leaves)), grad_outputs))
        for name, leaf in leaves.items():
            if isinstance(leaf, Tensor):
                named[f"grad {name}"] = next(gradients)
            else:
                named.update({f"grad {name}[{index}]": next(gradients) for index, _ in enumerate(tensors_of(leaf))})
    return named


def upstream_of(
    case: Case, arguments: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor] | None:
    """A random gradient for every output, with the numbers that `dtype` has; None where the op has no gradient."""
    if not case.differentiable:
        return None
    outputs = tensors_of(case.definition(**arguments))
    draw = Draw(dtype, device, torch.Generator().manual_seed(2**31 + seed))
    return [draw.normal(*output.shape, dtype=output.dtype) for output in outputs]


def check(
    case: Case,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    function: Callable[..., Any] | None = None,
    seed: int = 0,
) -> None:
    """Holds `function`, the public op by default, to the error rule for inputs of one shape.

    `GOLF_KERNELS` decides what the public op runs.

    Raises:
        MismatchError: an output or a gradient is too far from the truth, or of another shape or dtype.
    """
    function = case.function if function is None else function
    pools: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    draws, number = 1, 0
    while number < draws:
        arguments = case.draw(shape, dtype, device, seed + number)
        upstream = upstream_of(case, arguments, dtype, device, seed + number)
        ours = results(case, function, arguments, upstream)
        eager = results(case, case.definition, arguments, upstream)
        doubles = {name: in_float64(value) for name, value in arguments.items()}
        truth = results(case, case.definition, doubles, upstream)
        for name, value in ours.items():
            pools.setdefault(name, []).append((value, eager[name], truth[name]))
            if value.is_floating_point() and value.numel() and name not in case.exact:
                draws = max(draws, -(-POOL // value.numel()))
        number += 1
    for name, pool in pools.items():
        label = f"{case.name} {list(shape)} {dtype}: {name}"
        compare(label, pool, by_element=name in case.by_element and dtype in HALVES, exact=name in case.exact)


def compare(
    name: str, pool: Sequence[tuple[Tensor, Tensor, Tensor]], *, by_element: bool = False, exact: bool = False
) -> None:
    """Holds results (kernel, eager, truth) of several draws to the error rule, or kernel and eager to the same bits.

    Raises:
        MismatchError: they break it; names `name`.
    """
    for ours, eager, _ in pool:
        if (ours.shape, ours.dtype, ours.device) != (eager.shape, eager.dtype, eager.device):
            found, wanted = ([list(x.shape), x.dtype, x.device] for x in (ours, eager))
            raise MismatchError(f"{name} is {found}; it must be {wanted}")
    dtype = pool[0][0].dtype
    # Triton's interpreter cuts bfloat16 off where hardware rounds: there, one ulp more
    cut_off = dtype == torch.bfloat16 and _interpreted(pool[0][0])
    ours, eager, truth = (torch.cat([value.flatten() for value in values]) for values in zip(*pool, strict=True))
    if not dtype.is_floating_point or (exact and not cut_off):
        if count := int(((ours != eager) & ~(ours.isnan() & eager.isnan())).sum()):
            raise MismatchError(f"{name}: {count} of {ours.numel()} differ, and none may")
        return
    ours, eager, truth = ours.double(), eager.double(), truth.double()
    special = ~(eager.isfinite() & ours.isfinite())
    if bool(special.any()) and not torch.allclose(ours[special], eager[special], rtol=0, atol=0, equal_nan=True):
        raise MismatchError(f"{name}: NaN or infinity where the reference has none, or the other way round")
    ours, eager, truth = ours[~special], eager[~special], truth[~special]
    error, allowed, unit = (ours - truth).abs(), 2 * (eager - truth).abs(), ulp(truth, dtype)
    if cut_off:
        unit = 2 * unit
    if dtype == torch.float64:
        # Then the truth is as rounded as the kernel. What can be told is that nothing went through float32.
        unit = torch.full_like(truth, 2.0**-40) * truth.square().mean().sqrt().clamp(min=1e-300)
    if not (by_element or exact):
        error, allowed, unit = (x.square().mean().sqrt() for x in (error, allowed, unit))
    excess = error - (allowed + unit)
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        raise MismatchError(
            f"{name}: error {error.flatten()[worst]:.3e} at {worst if error.dim() else 'root mean square'}; twice "
            f"eager's and one ulp allow {(allowed + unit).flatten()[worst]:.3e}"
        )


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype`'s numbers at x (float64), in x's shape."""
    finfo = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(min=finfo.smallest_normal, max=finfo.max))
    return torch.ldexp(torch.full_like(x, finfo.eps), exponent - 1)


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two sets of results are the same, bit for bit: NaN equals itself, and -0 is not 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return ours.keys() == theirs.keys() and all(
        torch.equal(*(x.contiguous().view(integers[x.element_size()]) for x in (ours[name], theirs[name])))
        for name in ours
    )


def in_float64(value: Any) -> Any:
    """An argument for the truth: float64 for floating-point tensors and for dtypes, anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return for_tensors(lambda x: x.double() if x.is_floating_point() else x, value)


def _interpreted(tensor: Tensor) -> bool:
    return tensor.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"
