"""One way to register an op: `torch.ops.golf.<name>` where something traces, a direct call everywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def _sources_digest() -> str:
    """Of this package's code."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# What torch.compile keeps on disk calls a derivative's ops as they were when it was compiled, and knows them by name
# alone. Without this, what one version of this package has left there would be run with the ops of the next.
torch.compiler.config.cache_key_tag += f" golf {_sources_digest()}"

_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # any other tensor stands in for one without data, or wraps one


def is_traced(arguments: Iterable[Any]) -> bool:
    """Whether something records the ops on these arguments, so that they need a registered op."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any([_stands_in(argument) for argument in arguments if type(argument) not in _PLAIN])


def _stands_in(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        # a list of tensors is asked for its types at once: that takes the host least
        return not _PLAIN.issuperset(map(type, argument)) and is_traced(argument)
    return isinstance(argument, Tensor)


def register(
    name: str,
    run: Callable,
    fake: Callable,
    *,
    differentiate: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """A function with `run`'s arguments that compiles and differentiates; `torch.func` transforms are not supported.

    A registered op can be compiled, exported, faked and checked (`torch.library.opcheck`), but costs the host
    most, then an `autograd.Function`, and `run` alone nothing. So the op is for tensors that something traces, the
    Function for gradients, and `run` for the rest.

    Args:
        name: the op's name in `torch.ops.golf`.
        run: the launcher; annotated, and its results share no memory with its arguments.
        fake: the same for tensors without data: shapes and dtypes only.
        differentiate, setup_context: as the backward and setup_context of `torch.library.register_autograd` and
            `torch.autograd.Function`.
    """
    op = torch.library.custom_op(f"golf::{name}", run, mutates_args=())
    op.register_fake(fake)
    function = None
    if differentiate is not None:
        op.register_autograd(differentiate, setup_context=setup_context)

        # `forward` and `setup_context` in one: apart, they cost the host three times as much
        class function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = run(*arguments)
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                return differentiate(ctx, *gradients)

    def call(*arguments: Any) -> Any:
        if is_traced(arguments):
            return op(*arguments)
        if function is not None and torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return function.apply(*arguments)
        return run(*arguments)

    return call
