"""When to hand a function to `torch.compile`."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], choice: str, device: torch.device, *, gains: bool) -> Callable[..., Any]:
    """`function`, compiled as one graph where `choice` is "on", or "auto" on a GPU and it gains; as it is otherwise.

    On a host without a C compiler, which torch.compile needs for its GPU launchers, "auto" warns and does without.

    Shapes are static: every caller keeps to one batch shape.

    Args:
        gains: whether compiling makes the function faster on a GPU by enough to be worth the wait.
    """
    wanted = choice == "on" or (choice == "auto" and device.type == "cuda" and gains)
    if wanted and choice == "auto" and not _has_c_compiler():
        warnings.warn("no C compiler found (CC, gcc or clang): running without torch.compile, slower", stacklevel=2)
        return function
    return torch.compile(function, fullgraph=True, dynamic=False) if wanted else function


def _has_c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
