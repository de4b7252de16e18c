"""Argument checks that the ops share: each names the argument, what it was and what it may be.

They look at types, shapes, dtypes and devices only, never at values, so they neither wait for a GPU nor break
a compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def check_dtype(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """`value` must be a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}; it may be {_listed(dtypes)}")


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], dims: str) -> None:
    """`value` must be a tensor of one of `dtypes`, with one dimension for each letter of `dims`."""
    if isinstance(value, Tensor) and value.dtype in dtypes and value.dim() == len(dims):
        return
    check_dtype(name, value, dtypes)
    if value.dim() != len(dims):
        wanted = f"[{', '.join(dims)}]" if dims else "[] (no dimensions)"
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {wanted}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """`value` must have `shape`, which follows from the shape of `other`."""
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; beside {other_name} of shape {list(other.shape)} "
            f"it must be {list(shape)}"
        )


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` must be where `other` is."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {other.device}, as {other_name} is")


def check_matrices(name: str, matrices: Sequence, dtypes: tuple[torch.dtype, ...]) -> None:
    """Each of `matrices` must be a tensor [R, C] of one of `dtypes`, where the first is."""
    for index, matrix in enumerate(matrices):
        check_tensor(f"{name}[{index}]", matrix, dtypes, "RC")
        check_device(f"{name}[{index}]", matrix, f"{name}[0]", matrices[0])


def check_length(name: str, value: object, other_name: str, other: Sequence) -> None:
    """`value` must be a list or tuple with an entry for each of `other`."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple, as {other_name} is, not {type(value).__name__}")
    if len(value) != len(other):
        raise ValueError(f"{name} has length {len(value)}; it must have length {len(other)}, as {other_name} has")


def check_document_start(value: object, other_name: str, other: Tensor) -> None:
    """`value` must be None, or a bool [B, T] where `other` is, whose first two dimensions these are."""
    if value is not None:
        check_tensor("document_start_BT", value, (torch.bool,), "BT")
        check_shape("document_start_BT", value, other.shape[:2], other_name, other)
        check_device("document_start_BT", value, other_name, other)


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """`value` must be a whole number, symbolic or not, from `low` to `high`, both included."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value}; it must be {wanted}")


def check_eps(value: object) -> None:
    """`value` must be a number that a mean square can have added to it: not negative."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"eps must be a number, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"eps is {value}; it must be at least 0")


def check_float_dtype(name: str, value: object) -> None:
    """`value` must be one of the floating dtypes that the ops take and give."""
    if value not in FLOATS:
        raise TypeError(f"{name} is {value!r}; it may be {_listed(FLOATS)}")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
