"""What is measured of the ops: which op, on inputs of which shape and dtype, and how much work that is.

Shapes are written as in `kernels.cases`: smear_gate and add_rms_norm B x T x D, bigram_hash B x T x K,
bigram_hash_embed B x T x K x D, input_stage B x T x V x K x D, qk_norm_rotary B x T x H x G x h, squared_relu_mlp
and squared_relu_mlp_fp8 B x T x D x H, linear_cross_entropy B x T x D x V, newton_schulz B x M x N, the int6 ops R x C.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from bench.tokens import token_batch
from golfmodel.config import resolve
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import Group, Storage, exported_parameters, parameter_specs
from kernels import reference, testing
from kernels.cases import CASES, Case
from kernels.cases import Draw as DrawOfCase
from kernels.newton_schulz_plan import multiplications

Draw = Callable[[torch.device, int], dict[str, Any]]  # (device, seed) -> keyword arguments


@dataclass(frozen=True)
class Subject:
    """One op on inputs of one shape and dtype."""

    op: str  # its name in `kernels`
    shape: str
    dtype: str
    draw: Draw
    function: Callable[..., Any]  # the public op
    definition: Callable[..., Any]  # the reference
    checked_as: str  # subjects of one op, dtype and name of a check stand or fall together
    check: Callable[[torch.device], None]  # raises `kernels.testing.MismatchError`
    differentiable: Sequence[str] = ()
    alike: Sequence[str] = ()  # inputs whose gradient is another's, which depends on their sum alone: no bytes more
    unread: float = 0.0  # bytes of inputs that the backward pass has no use for
    flops: float = 0.0  # forward, and twice that backward; 0 where bytes are what takes the time

    @property
    def directions(self) -> tuple[str, ...]:
        """Always "forward", and "backward" where there is something to do."""
        return ("forward", "backward") if self.differentiable else ("forward",)

    @property
    def label(self) -> str:
        """As a test id."""
        return f"{self.op}-{self.shape}-{self.dtype}"


def subjects(*, on_gpu: bool) -> list[Subject]:
    """All ops at the seed model's shapes and others; a few small shapes where there is no GPU."""
    shapes = _GPU_SHAPES if on_gpu else _CPU_SHAPES
    found = [_of_case(name, shape, _DTYPES[name]) for name, several in shapes.items() for shape in several]
    preset = "seed" if on_gpu else "demo"
    return [*found, *_of_the_model(preset, f"the-{preset}-model")]


_MATRICES = ((1536, 512), (4096, 4096), (36864, 512))
_SIDES, _BATCHES = (64, 128, 256, 512, 1024, 2048), (1, 8, 64)
_OBLONG = ((1, 512, 128), (16, 256, 512), (1, 512, 1536), (8, 512, 1536), (1, 1024, 2048))
_GPU_SHAPES: dict[str, Sequence[tuple[int, ...]]] = {
    "smear_gate": ((1, 2048, 512), (8, 2048, 512), (48, 2048, 512)),
    "bigram_hash": ((8, 2048, 2048), (48, 2048, 2048)),
    "bigram_hash_embed": ((8, 2048, 2048, 512), (48, 2048, 2048, 512)),
    "input_stage": ((8, 2048, 1024, 2048, 512), (48, 2048, 1024, 2048, 512)),
    "add_rms_norm": ((8, 2048, 512), (48, 2048, 512)),
    "add_rms_norm with skip": ((8, 2048, 512), (48, 2048, 512)),
    "qk_norm_rotary": ((8, 2048, 8, 4, 64), (48, 2048, 8, 4, 64)),
    "squared_relu_mlp": ((8, 2048, 512, 1536), (48, 2048, 512, 1536)),
    "squared_relu_mlp_fp8": ((8, 2048, 512, 1536), (48, 2048, 512, 1536)),
    "linear_cross_entropy": ((8, 2048, 512, 1024), (48, 2048, 512, 1024)),
    "newton_schulz": (*((batch, side, side) for side in _SIDES for batch in _BATCHES), *_OBLONG),
    "quantize_int6": _MATRICES,
    "dequantize_int6": _MATRICES,
    "fake_quantize_int6 to bfloat16": _MATRICES,
    "pack_int6": _MATRICES,
    "unpack_int6": _MATRICES,
}
_CPU_SHAPES: dict[str, Sequence[tuple[int, ...]]] = {
    "smear_gate": ((8, 256, 128),),
    "bigram_hash": ((8, 256, 1024),),
    "bigram_hash_embed": ((8, 256, 1024, 128),),
    "input_stage": ((8, 256, 1024, 1024, 128),),
    "add_rms_norm": ((8, 256, 128),),
    "add_rms_norm with skip": ((8, 256, 128),),
    "qk_norm_rotary": ((8, 256, 4, 2, 32),),
    "squared_relu_mlp": ((8, 256, 128, 384),),
    "squared_relu_mlp_fp8": ((8, 256, 128, 384),),
    "linear_cross_entropy": ((8, 256, 128, 1024),),
    "newton_schulz": ((4, 64, 64),),
    **{name: ((384, 128),) for name in _GPU_SHAPES if "int6" in name},
}
# What the model computes in: 16-bit activations, float32 weights. The others say what goes in.
_DTYPES = {name: torch.float32 if "int6" in name or name == "newton_schulz" else torch.bfloat16 for name in _GPU_SHAPES}
_DTYPE_LABELS = {
    "bigram_hash": "int64",
    "dequantize_int6": "int8-to-float32",
    "fake_quantize_int6": "float32-to-bfloat16",
    "pack_int6": "int8",
    "unpack_int6": "uint8",
}
# Where matrix products are what takes the time, for each product of a shape's numbers. The ceiling is bfloat16's rate,
# which products in float8 may pass.
_FLOPS = {"squared_relu_mlp": 4.0, "squared_relu_mlp_fp8": 4.0, "linear_cross_entropy": 2.0}
# Where two cases of an op are measured at one shape.
_SHAPE_ADDITIONS = {"add_rms_norm with skip": "+skip"}


def _of_case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Subject:
    case = next(case for case in CASES if case.name == name)

    def draw(device: torch.device, seed: int) -> dict[str, Any]:
        arguments = case.draw(shape, dtype, device, seed, generator_device=device)
        if case.op == "dequantize_int6":
            arguments["dtype"] = torch.float32
        if "tokens_BT" in arguments:
            arguments["tokens_BT"] = token_batch(*shape[:2], 1024, device, seed=seed)
        return arguments

    return Subject(
        op=case.op,
        shape="x".join(map(str, shape)) + _SHAPE_ADDITIONS.get(name, ""),
        dtype=_DTYPE_LABELS.get(case.op, str(dtype).removeprefix("torch.")),
        draw=draw,
        function=case.function,
        definition=case.definition,
        checked_as=name,
        check=functools.partial(_check_case, case, dtype),
        # the gradient of a fake quantization is the one it was given
        differentiable=() if case.op == "fake_quantize_int6" else case.differentiable,
        alike=("y_BTD",) if name == "add_rms_norm" else (),
        flops=_flops(case.op, shape),
    )


def _check_case(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    for shape in case.shapes:
        testing.check(case, shape, dtype, device)


def _of_the_model(preset: str, shape: str) -> list[Subject]:
    """The ops that take lists, on all the matrices of a preset's model in one call."""
    with torch.device("meta"):
        model = GPT(resolve(["--preset", preset], {}))
    stored = [tuple(t.shape) for t, storage in exported_parameters(model).values() if storage is Storage.INT6]
    specs = parameter_specs(model)
    trained = [tuple(p.shape) for name, p in model.named_parameters() if specs[name].group is Group.MATRIX]

    def matrices(shapes: Sequence[tuple[int, int]], device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [0.04 * torch.randn(each, generator=generator, device=device) for each in shapes]

    def codes(device: torch.device, seed: int) -> list[tuple[Tensor, Tensor]]:
        return [reference.quantize_int6(weight) for weight in matrices(stored, device, seed)]

    def each(definition: Callable[..., Any]) -> Callable[..., list]:
        return lambda **lists: [definition(*entries) for entries in zip(*lists.values(), strict=True)]

    draws: dict[str, Draw] = {
        "quantize_int6": lambda device, seed: {"weight_RC": matrices(stored, device, seed)},
        "dequantize_int6": lambda device, seed: dict(
            zip(("codes", "scale"), map(list, zip(*codes(device, seed), strict=True)), strict=True)
        ),
        "pack_int6": lambda device, seed: {"codes_RC": [code for code, _ in codes(device, seed)]},
    }
    found = []
    for op, draw in draws.items():
        function, definition = getattr(kernels, op), each(getattr(reference, op))
        check = functools.partial(_check_exact, op, draw, function, definition)
        dtype = _DTYPE_LABELS.get(op, "float32")
        found.append(Subject(op, shape, dtype, draw, function, definition, f"{op} of a list", check))
    orthogonalised = {
        "draw": lambda device, seed: {"matrices": matrices(trained, device, seed)},
        "function": kernels.newton_schulz,
        "definition": reference.newton_schulz,
    }
    found.append(
        Subject(
            op="newton_schulz",
            shape=shape,
            dtype="float32",
            checked_as="newton_schulz of a list",
            check=functools.partial(_check_sums, "newton_schulz", *orthogonalised.values()),
            flops=sum(newton_schulz_flops(*each) for each in trained),
            **orthogonalised,
        )
    )
    return [*found, _of_the_model_casts(model, shape)]


def _of_the_model_casts(model: GPT, shape: str) -> Subject:
    """`cast_weights` of every matrix that a step of the model casts, in one call."""
    bigram = () if model.input.bigram is None else (model.input.bigram,)
    sources = [source for module in (*model.blocks, *bigram) for source in module.sources()]
    parts = [(tuple(each.weight.shape), source.scale_O is not None) for source in sources for each in source.matrices]

    def inputs(draw: DrawOfCase) -> dict[str, Any]:
        return {
            "matrices": [draw.normal(*each, dtype=torch.float32, size=0.04) for each, _ in parts],
            "dtype": draw.dtype,
            "scales": [draw.normal(each[0], dtype=torch.float32) if scaled else None for each, scaled in parts],
            "joined": [len(source.matrices) for source in sources],
        }

    case = Case(
        name="cast_weights of the model",
        op="cast_weights",
        inputs=inputs,
        shapes=((),),  # the model's, which `inputs` knows
        empty=(),
        model=(),
        ranges=(),
        dtypes=(torch.bfloat16,),
        differentiable=("matrices", "scales"),
    )
    return Subject(
        op="cast_weights",
        shape=shape,
        dtype="float32-to-bfloat16",
        draw=lambda device, seed: case.draw((), torch.bfloat16, device, seed, generator_device=device),
        function=case.function,
        definition=case.definition,
        checked_as="cast_weights of a list",
        check=functools.partial(_check_case, case, torch.bfloat16),
        differentiable=case.differentiable,
        unread=sum(4.0 * math.prod(each) for each, scaled in parts if not scaled),
    )


def _flops(op: str, shape: tuple[int, ...]) -> float:
    if op == "newton_schulz":
        return shape[0] * newton_schulz_flops(*shape[1:])
    return _FLOPS.get(op, 0.0) * math.prod(shape)


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> float:
    """Of the products, each in full: for m <= n, steps * (2 m^2 n + 2 m^3 + 2 m^2 n)."""
    return 2.0 * steps * multiplications(rows, columns)


def _check_exact(op: str, draw: Draw, function: Callable, definition: Callable, device: torch.device) -> None:
    arguments = draw(device, 1)
    ours, theirs = (testing.tensors_of(each(**arguments)) for each in (function, definition))
    for index, (result, wanted) in enumerate(zip(ours, theirs, strict=True)):
        testing.compare(f"{op}: tensor {index} of the list", [(result, wanted, wanted)], exact=True)


def _check_sums(op: str, draw: Draw, function: Callable, definition: Callable, device: torch.device) -> None:
    arguments = draw(device, 1)
    doubles = {name: [tensor.double() for tensor in several] for name, several in arguments.items()}
    ours, eager, truth = (function(**arguments), definition(**arguments), definition(**doubles))
    for index, results in enumerate(zip(ours, eager, truth, strict=True)):
        testing.compare(f"{op}: matrix {index} of the list", [results])
