"""How many bytes and operations a kernel has to do at least, as far as that is known.

- Matrix products and fused attention, from the shapes of the op: inputs and output once, 2 m n k operations; half of
  attention's products under a causal mask, its backward with the scores computed again.
- Inductor's kernels: the bytes that Inductor counts itself.
- This project's Triton kernels: what they say (`kernels.launch`), or the bytes of their arguments, at most what is
  touched once, since a lookup may not need every row of its table.
- Copies and fills on the device.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import flop_counter

from kernels import launch as launching

# Of a product's arguments, which two are multiplied. The third is added, where it comes first.
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
_FUSED_ATTENTION = re.compile(r"aten::_scaled_dot_product_\w+_attention\w*")
_ITEM_BYTES = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8}

Value = tuple[Sequence[int], str, str]  # of an argument: dimensions, type, and what a scalar is


@dataclass(frozen=True)
class Work:
    """What a call has to do at least."""

    bytes: float  # read and written
    flops: float | None = None  # None: not counted


def operation_work(name: str, recorded: Mapping[str, Any]) -> Work | None:
    """What an op has to do: a matrix product or fused attention; None for others, and where the trace does not say.

    Args:
        name: such as "aten::mm".
        recorded: the `args` of its event: "Input Dims", "Input type" and "Concrete Inputs".
    """
    if name not in PRODUCTS and not _FUSED_ATTENTION.fullmatch(name):
        return None
    if not all(key in recorded for key in ("Input Dims", "Input type", "Concrete Inputs")):
        return None
    values = list(zip(recorded["Input Dims"], recorded["Input type"], recorded["Concrete Inputs"], strict=True))
    return _product_work(name, values) if name in PRODUCTS else _attention_work(name, values)


def _product_work(name: str, values: Sequence[Value]) -> Work | None:
    (left, kind, _), (right, _, _) = (values[position] for position in PRODUCTS[name])
    out_kind, added = kind, 0
    if PRODUCTS[name] == (0, 1):
        if len(values) > 2:
            out_kind = values[2][1]  # a given output; a given dtype is a number, of no known type
    elif float(values[3][2]) != 0:  # what beta multiplies is read
        added = math.prod(values[0][0])
    if kind not in _ITEM_BYTES or out_kind not in _ITEM_BYTES:
        return None
    *batch, m, k = left
    count, n = math.prod(batch), right[-1]
    read = (count * (m * k + k * n) + added) * _ITEM_BYTES[kind]
    return Work(read + count * m * n * _ITEM_BYTES[out_kind], 2.0 * count * m * n * k)


def _attention_work(name: str, values: Sequence[Value]) -> Work | None:
    arguments = dict(zip(_argument_names(name), values, strict=False))
    (query, kind, _), (key, _, _), (value, _, _) = (arguments[each] for each in ("query", "key", "value"))
    masked = any(arguments[each][0] for each in ("attn_bias", "attn_mask") if each in arguments)
    causal = arguments["is_causal"][2]
    if masked or causal not in ("True", "False") or kind not in _ITEM_BYTES:
        return None
    batch, heads, length, _ = query
    out = (batch, heads, length, value[-1])
    # torch 2.11's formulas want as many heads of keys as of queries, and give the same number for fewer
    shapes = (query, (batch, heads, *key[2:]), (batch, heads, *value[2:]))
    moved = sum(math.prod(each) for each in (query, key, value, out))
    if "backward" in name:
        flops = flop_counter.sdpa_backward_flop_count(out, *shapes)
        moved *= 2  # the gradients as well
    else:
        flops = flop_counter.sdpa_flop_count(*shapes)
    return Work(moved * _ITEM_BYTES[kind], flops / 2 if causal == "True" else float(flops))


@functools.cache
def _argument_names(operation: str) -> tuple[str, ...]:
    schema = getattr(torch.ops.aten, operation.removeprefix("aten::")).default._schema
    return tuple(argument.name for argument in schema.arguments)


def transfer_work(event: Mapping[str, Any]) -> Work | None:
    """What a "gpu_memcpy" or "gpu_memset" of a trace has to do; None of what comes from the host, at another rate."""
    size, copies = event.get("args", {}).get("bytes"), event["cat"] == "gpu_memcpy"
    if size is None or (copies and "DtoD" not in event["name"]):
        return None
    return Work(float(size) * (2 if copies else 1))


@contextmanager
def watched_launches() -> Iterator[dict[str, list[Work]]]:
    """Yields a dictionary that fills with what each Triton kernel has to do, launch by launch."""
    seen: dict[str, list[Work]] = {}

    def watched(kernel: Any, grid: tuple[int, ...], tensors: tuple, *others: Any, **options: Any) -> None:
        launching.launch(kernel, grid, tensors, *others, **options)
        if 0 in grid:
            return
        if (counted := options.get("counted")) is not None:
            moved, flops = counted()
        else:
            moved, flops = sum(tensor.nbytes for tensor in tensors if tensor is not None), 0.0
        seen.setdefault(kernel.__name__, []).append(Work(float(moved), flops or None))

    # Its own module keeps it: there it calls itself, for the device of the tensors, and would count twice.
    modules = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("kernels.") and module is not launching
        if getattr(module, "launch", None) is launching.launch
    ]
    try:
        for module in modules:
            module.launch = watched
        yield seen
    finally:
        for module in modules:
            module.launch = launching.launch


@contextmanager
def inductor_counts_bytes() -> Iterator[None]:
    """What is compiled meanwhile knows the bytes of its kernels. Inductor names each module it writes on stderr."""
    from torch._functorch import config as functorch_config  # noqa: PLC0415  (a second that --help need not take)
    from torch._inductor import config as inductor_config  # noqa: PLC0415

    # An option of torch 2.13 holds in the thread that sets it, and a backward compiled when it is first needed is
    # compiled in autograd's.
    with inductor_config.patch(benchmark_kernel=True), functorch_config.patch(force_non_lazy_backward_lowering=True):
        yield


def inductor_bytes(modules: Iterable[Any] | None = None) -> dict[str, float | None]:
    """Bytes of a call by kernel, of all that Inductor has loaded; None for a name that stands for several.

    Args:
        modules: to look into, instead of Inductor's.
    """
    if modules is None:
        from torch._inductor.codecache import PyCodeCache  # noqa: PLC0415

        modules = PyCodeCache.modules
    figures: dict[str, set[float]] = {}
    for module in modules:
        for name, value in vars(module).items():
            meta = getattr(value, "inductor_meta", None) if name.startswith("triton_") else None
            if isinstance(meta, dict) and meta.get("kernel_num_gb") is not None:
                figures.setdefault(meta.get("kernel_name", name), set()).add(1e9 * meta["kernel_num_gb"])
    return {name: found.pop() if len(found) == 1 else None for name, found in figures.items()}
