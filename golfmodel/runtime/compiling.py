"""When to hand a function to `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], choice: str, device: torch.device) -> Callable[..., Any]:
    """`function`, compiled as one graph where `choice` is "on", or "auto" on a GPU; as it is otherwise.

    Shapes are static: every caller keeps to one batch shape.
    """
    if choice == "on" or (choice == "auto" and device.type == "cuda"):
        return torch.compile(function, fullgraph=True, dynamic=False)
    return function
