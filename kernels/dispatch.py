"""The one rule that picks an op's Triton kernel or its reference, read from the environment at each call.

`GOLF_KERNELS` is
- `auto`, the default: the kernel where the op has one and the tensor is on a CUDA device, or on the CPU with
  `TRITON_INTERPRET=1`; the reference otherwise;
- `reference`: always the reference;
- `triton`: always the kernel; an op without one, or a tensor where none can run, is an error.

Under `torch.compile` the environment is read when the graph is traced; a change after that may go unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from torch import Tensor

from kernels import reference

CHOICES = ("auto", "reference", "triton")

_triton_kernels: dict[str, Callable] = {}


def register_triton(name: str) -> Callable[[Callable], Callable]:
    """Decorates the function that runs op `name` in Triton; its signature is the reference's."""

    def register(function: Callable) -> Callable:
        _triton_kernels[name] = function
        return function

    return register


def chosen() -> str:
    """What `GOLF_KERNELS` says.

    Raises:
        ValueError: it is none of its choices.
    """
    choice = os.environ.get("GOLF_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"GOLF_KERNELS is {choice!r}; it may be one of {', '.join(CHOICES)}")
    return choice


def without_kernel(names: Iterable[str]) -> list[str]:
    """Those of the ops `names` that have no Triton kernel."""
    return [name for name in names if name not in _triton_kernels]


def implementation(name: str, tensor: Tensor) -> Callable:
    """The function that runs op `name` on `tensor` and others like it.

    Raises:
        ValueError: `GOLF_KERNELS` is none of its choices.
        RuntimeError: `GOLF_KERNELS=triton`, and the op has no kernel or `tensor` is where none can run.
    """
    choice = chosen()
    kernel = None if choice == "reference" else _triton_kernels.get(name)
    runnable = tensor.is_cuda or (tensor.is_cpu and os.environ.get("TRITON_INTERPRET") == "1")
    if kernel is not None and runnable:
        return kernel
    if choice == "triton":
        if kernel is None:
            raise RuntimeError(f"GOLF_KERNELS=triton, but {name} has no Triton kernel; use auto or reference")
        raise RuntimeError(
            f"GOLF_KERNELS=triton, but {name} was given a tensor on {tensor.device}; Triton needs one on a "
            "CUDA device, or on the CPU with TRITON_INTERPRET=1"
        )
    return getattr(reference, name)
