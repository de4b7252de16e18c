"""What each parameter is: how the artifact stores it and which optimizer group trains it.

A module declares its parameters with `declare`; everyone else asks `parameter_specs`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BACKWARD_PARTS = 3


class Storage(enum.Enum):
    """How a parameter is written to the artifact."""

    INT6 = "int6"  # codes in [-31, 31], one fp16 scale a row
    INT8 = "int8"  # codes in [-127, 127], one fp16 scale a row, clipped at a quantile
    FP16 = "fp16"
    FP32 = "fp32"
    NONE = "none"  # used in training only


class Group(enum.Enum):
    """Which optimizer group trains a parameter."""

    MATRIX = "matrix"  # Muon
    EMBEDDING = "embedding"  # AdamW at TIED_EMBED_LR, or EMBED_LR when the head is untied
    HEAD = "head"  # Adam without decay at HEAD_LR
    SCALAR = "scalar"  # AdamW at SCALAR_LR


@dataclass(frozen=True)
class ParameterSpec:
    """What a module declares of one of its parameters."""

    storage: Storage
    group: Group


def declare(module: nn.Module, name: str, value: Tensor, storage: Storage, group: Group) -> None:
    """Registers `value` as the parameter `name` of `module`, with its spec."""
    module.register_parameter(name, nn.Parameter(value))
    specs = module.__dict__.setdefault("_parameter_specs", {})
    specs[name] = ParameterSpec(storage, group)


def backward_parts(sizes: Sequence[int]) -> list[int]:
    """Matrices, by their sizes in the model's order, shared out to parts of about equal size: 0 is the last ones'.

    Backward comes to the last matrices first. What ranks send each other of one part travels while it computes the
    next: the optimizer sends by these parts, and the model has the gradients of one before it begins with the next.
    """
    total, before = sum(sizes), 0
    parts = []
    for size in reversed(sizes):
        parts.append(min(before * BACKWARD_PARTS // max(total, 1), BACKWARD_PARTS - 1))
        before += size
    return parts[::-1]


def parameter_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """Every parameter's spec by its full name, in the order of `model.named_parameters()`.

    Raises:
        KeyError: a parameter was registered without `declare`.
    """
    specs = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            declared = module.__dict__.get("_parameter_specs", {})
            if name not in declared:
                raise KeyError(f"parameter {name!r} of {type(module).__name__} has no declared storage and group")
            specs[f"{prefix}.{name}" if prefix else name] = declared[name]
    return specs


def exported_parameters(model: nn.Module) -> dict[str, tuple[torch.Tensor, Storage]]:
    """The parameters that the artifact holds, by name: each with the way it is stored."""
    specs = parameter_specs(model)
    return {
        name: (parameter.detach(), specs[name].storage)
        for name, parameter in model.named_parameters()
        if specs[name].storage is not Storage.NONE
    }
