"""Every op with a Triton kernel, and how to draw inputs for it: for tests and benchmarks alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import reference
from kernels.checks import FLOATS

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Draw:
    """Makes the inputs of one draw."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator  # on the CPU where every device is to get the same numbers

    def normal(self, *shape: int, dtype: torch.dtype | None = None, size: float = 1.0) -> Tensor:
        """Normal numbers of standard deviation `size`."""
        values = torch.randn(shape, generator=self.generator, device=self.generator.device) * size
        return values.to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from `low` up to, not including, `high`."""
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device, dtype)

    def starts(self, *shape: int) -> Tensor:
        """True for one position in five."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device).lt(0.2).to(self.device)


@dataclass(frozen=True)
class Case:
    """An op, a way to make its inputs for a shape, and how its results are compared."""

    name: str
    op: str  # its name in `kernels` and in `kernels.reference`
    inputs: Callable[..., dict[str, Any]]  # (draw, *shape) -> keyword arguments
    shapes: Sequence[tuple[int, ...]]  # odd and tiny ones
    empty: Sequence[tuple[int, ...]]
    model: tuple[int, ...]  # of the seed's model, 98,304 tokens
    ranges: Sequence[tuple[int, int]]  # of each dimension, for random shapes
    dtypes: Sequence[torch.dtype] = FLOATS
    differentiable: Sequence[str] = ()
    by_element: Sequence[str] = ()  # outputs ("output", "output 1", "grad x_BTD") compared so if of 16 bits
    exact: Sequence[str] = ()  # outputs that have one right value: lookups, rounded exact products
    options: dict[str, Any] = field(default_factory=dict)  # more keyword arguments, none of them tensors

    @property
    def function(self) -> Callable[..., Any]:
        """The public op."""
        return getattr(kernels, self.op)

    @property
    def definition(self) -> Callable[..., Any]:
        """The reference."""
        return getattr(reference, self.op)

    def draw(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        *,
        generator_device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """Keyword arguments for one call; drawn on the CPU, every device gets the same numbers."""
        generator = torch.Generator(generator_device).manual_seed(seed)
        return {**self.inputs(Draw(dtype, device, generator), *shape), **self.options}


def _smear_gate(draw: Draw, b: int, t: int, d: int, *, starts: bool) -> dict[str, Any]:
    inputs = {"x_BTD": draw.normal(b, t, d), "gate_D": draw.normal(d, dtype=_wide(draw.dtype))}
    return {**inputs, "document_start_BT": draw.starts(b, t)} if starts else inputs


def _bigram_hash(draw: Draw, b: int, t: int, k: int, *, starts: bool) -> dict[str, Any]:
    inputs = {"tokens_BT": draw.integers(-(2**31), 2**31, b, t), "num_buckets": k}
    return {**inputs, "document_start_BT": draw.starts(b, t)} if starts else inputs


def _bigram_hash_embed(draw: Draw, b: int, t: int, k: int, d: int, *, scaled: bool, starts: bool) -> dict[str, Any]:
    inputs = {"tokens_BT": draw.integers(0, 8, b, t), "table_KD": draw.normal(k, d)}
    if scaled:
        inputs["scale"] = draw.normal(dtype=_wide(draw.dtype))
    return {**inputs, "document_start_BT": draw.starts(b, t)} if starts else inputs


def _input_stage(
    draw: Draw, b: int, t: int, v: int, k: int, d: int, *, bigrams: bool, scaled: bool, starts: bool
) -> dict[str, Any]:
    inputs = {
        "tokens_BT": draw.integers(0, v, b, t),
        "token_table_VD": draw.normal(v, d, size=0.1),
        "gate_D": draw.normal(d, dtype=_wide(draw.dtype)),
    }
    if bigrams:
        inputs["bigram_table_KD"] = draw.normal(k, d, size=0.1)
    if scaled:
        inputs["scale"] = draw.normal(dtype=_wide(draw.dtype))
    return {**inputs, "document_start_BT": draw.starts(b, t)} if starts else inputs


def _add_rms_norm(draw: Draw, b: int, t: int, d: int, *, scaled: bool, skip: bool) -> dict[str, Any]:
    inputs = {name: draw.normal(b, t, d) for name in ("x_BTD", "y_BTD", *(("skip_BTD",) if skip else ()))}
    if scaled:
        inputs.update({name.replace("BTD", "scale_D"): draw.normal(d, dtype=_wide(draw.dtype)) for name in inputs})
    return inputs


def _qk_norm_rotary(draw: Draw, b: int, t: int, heads: int, kv_heads: int, size: int) -> dict[str, Any]:
    size -= size % 2  # random shapes have odd ones
    frequencies = 1000.0 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64)
    angle_TF = torch.outer(torch.arange(t, dtype=torch.float64), frequencies)
    return {
        "qkv_BTC": draw.normal(b, t, (heads + 2 * kv_heads) * size),
        "gain_H": 1.5 + draw.normal(heads, dtype=_wide(draw.dtype)),
        "cos_TF": angle_TF.cos().to(draw.device, draw.dtype),
        "sin_TF": angle_TF.sin().to(draw.device, draw.dtype),
        "num_kv_heads": kv_heads,
    }


def _squared_relu_mlp(draw: Draw, b: int, t: int, d: int, h: int, *, added: bool) -> dict[str, Any]:
    inputs = {
        "x_BTD": draw.normal(b, t, d),
        "up_HD": draw.normal(h, d, size=max(d, 1) ** -0.5),
        "down_DH": draw.normal(d, h, size=max(h, 1) ** -0.5),
    }
    return {**inputs, "residual_BTD": draw.normal(b, t, d)} if added else inputs


def _linear_cross_entropy(draw: Draw, b: int, t: int, d: int, v: int) -> dict[str, Any]:
    return {
        "x_BTD": draw.normal(b, t, d),
        "weight_VD": draw.normal(v, d, size=4 * max(d, 1) ** -0.5),
        "targets_BT": draw.integers(0, v, b, t),
    }


def _weight(draw: Draw, r: int, c: int) -> dict[str, Any]:
    return {"weight_RC": draw.normal(r, c, size=0.04)}


def _codes_and_scale(draw: Draw, r: int, c: int) -> dict[str, Any]:
    scale_R = draw.normal(r, dtype=torch.float16).abs()
    return {"codes": draw.integers(-31, 32, r, c, dtype=torch.int8), "scale": scale_R, "dtype": draw.dtype}


def _codes(draw: Draw, r: int, c: int) -> dict[str, Any]:
    return {"codes_RC": draw.integers(-32, 32, r, c, dtype=torch.int8)}


def _packed(draw: Draw, r: int, c: int) -> dict[str, Any]:
    return {"packed": draw.integers(0, 256, r, 3 * -(-c // 4), dtype=torch.uint8), "num_columns": c}


def _weights(draw: Draw, r: int, c: int, *, scaled: bool) -> dict[str, Any]:
    wide = _wide(draw.dtype)
    shapes = ((r, c), (r + 2, c), (r, c + 3), (r + 1, c))
    scales = [draw.normal(rows, dtype=wide) if scaled and rows != r + 2 else None for rows, _ in shapes]
    matrices = [draw.normal(*shape, dtype=wide, size=0.04) for shape in shapes]
    return {"matrices": matrices, "dtype": draw.dtype, "scales": scales, "joined": [2, 1, 1]}


def _matrix(draw: Draw, *shape: int) -> dict[str, Any]:
    return {"matrices": draw.normal(*shape, size=0.02)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of the parameters that stay in float32 beside 16-bit activations."""
    return torch.float32 if dtype in HALVES else dtype


_FEW_ROWS = ((1, 1, 1, 2, 1), (2, 2, 3, 4, 127))
_MANY_ROWS = ((1, 2, 9, 5, 64), (1, 131, 3, 4, 67), (3, 5, 60, 40, 513))
_MANY_ROWS_RANGES = ((1, 3), (1, 30), (1, 20), (2, 20), (64, 200))
_RESULTS = ("output", "output 1", "output 2")
_MATRICES = {
    "shapes": ((1, 1), (3, 127), (127, 3), (5, 513), (16, 512), (2, 8200)),
    "empty": ((0, 4), (4, 0)),
    "model": (1536, 512),
    "ranges": ((1, 40), (1, 700)),
}

CASES: tuple[Case, ...] = (
    *(
        Case(
            name=name,
            op="smear_gate",
            inputs=functools.partial(_smear_gate, starts=starts),
            shapes=((1, 1, 1), (2, 3, 127), (3, 127, 3), (1, 2, 513), (1, 150, 200)),
            empty=((0, 3, 4), (2, 0, 4), (2, 3, 0)),
            model=(48, 2048, 512),
            ranges=((1, 3), (1, 60), (1, 300)),
            differentiable=("x_BTD", "gate_D"),
            by_element=("output", "grad x_BTD"),
        )
        for name, starts in (("smear_gate", False), ("smear_gate with document starts", True))
    ),
    *(
        Case(
            name=name,
            op="bigram_hash",
            inputs=functools.partial(_bigram_hash, starts=starts),
            shapes=((1, 1, 2), (3, 127, 3), (2, 513, 2048), (1, 3, 2**31)),
            empty=((0, 3, 5), (3, 0, 5)),
            model=(48, 2048, 2048),
            ranges=((1, 4), (1, 900), (2, 5000)),
            dtypes=(torch.float32,),
        )
        for name, starts in (("bigram_hash", False), ("bigram_hash with document starts", True))
    ),
    *(
        Case(
            name=name,
            op="bigram_hash_embed",
            inputs=functools.partial(_bigram_hash_embed, scaled=scaled, starts=starts),
            shapes=((1, 1, 2, 1), (2, 3, 7, 127), (3, 127, 5, 3), (1, 5, 4, 513)),
            empty=((0, 3, 4, 5), (2, 0, 4, 5)),
            model=(48, 2048, 2048, 512),
            ranges=((1, 3), (1, 20), (2, 20), (1, 100)),
            differentiable=("table_KD", "scale") if scaled else ("table_KD",),
            by_element=("output",),
            exact=() if scaled else ("output",),
        )
        for name, scaled, starts in (
            ("bigram_hash_embed", True, False),
            ("bigram_hash_embed without scale", False, False),
            ("bigram_hash_embed with document starts", False, True),
        )
    ),
    *(
        Case(
            name=name,
            op="input_stage",
            inputs=functools.partial(_input_stage, bigrams=bigrams, scaled=scaled, starts=starts),
            shapes=shapes,
            empty=((0, 3, 4, 5, 6), (2, 0, 4, 5, 6)),
            model=(48, 2048, 1024, 2048, 512),
            ranges=ranges,
            differentiable=(
                *("token_table_VD", "gate_D"),
                *(("bigram_table_KD",) if bigrams else ()),
                *(("scale",) if scaled else ()),
            ),
        )
        for name, bigrams, scaled, starts, shapes, ranges in (
            # a scale's gradient is one number, so this case takes many draws: of few rows
            ("input_stage", True, True, False, _FEW_ROWS, ((1, 2), (1, 2), (1, 3), (2, 4), (1, 200))),
            ("input_stage with document starts", True, False, True, _MANY_ROWS, _MANY_ROWS_RANGES),
            ("input_stage without bigrams", False, False, False, _MANY_ROWS, _MANY_ROWS_RANGES),
        )
    ),
    *(
        Case(
            name=name,
            op="add_rms_norm",
            inputs=functools.partial(_add_rms_norm, scaled=scaled, skip=skip),
            # in one or two channels a gradient is a difference that cancels: the op's own tests have those
            shapes=((1, 1, 3), (2, 3, 127), (3, 127, 3), (1, 2, 513), (1, 150, 200)),
            empty=((0, 3, 4), (2, 0, 4)),
            model=(48, 2048, 512),
            ranges=((1, 3), (1, 60), (3, 300)),
            differentiable=(
                *("x_BTD", "y_BTD"),
                *(("skip_BTD",) if skip else ()),
                *(("x_scale_D", "y_scale_D") if scaled else ()),
                *(("skip_scale_D",) if scaled and skip else ()),
            ),
            by_element=("output", "output 1"),
            exact=() if scaled else ("output",),
        )
        for name, scaled, skip in (
            ("add_rms_norm", False, False),
            ("add_rms_norm with scales", True, False),
            ("add_rms_norm with skip", True, True),
        )
    ),
    Case(
        name="qk_norm_rotary",
        op="qk_norm_rotary",
        inputs=_qk_norm_rotary,
        shapes=((1, 1, 1, 1, 2), (2, 5, 8, 4, 64), (3, 7, 6, 4, 6), (1, 67, 3, 1, 48), (1, 35, 32, 32, 40)),
        empty=((0, 3, 4, 2, 8), (2, 0, 4, 2, 8)),
        model=(48, 2048, 8, 4, 64),
        ranges=((1, 2), (1, 20), (6, 12), (1, 5), (2, 100)),
        differentiable=("qkv_BTC", "gain_H"),
        by_element=("output", "output 1"),
        exact=("output 2",),
    ),
    *(
        Case(
            name=name,
            op="squared_relu_mlp",
            inputs=functools.partial(_squared_relu_mlp, added=added),
            shapes=((1, 1, 1, 1), (2, 3, 8, 16), (1, 127, 24, 520), (3, 5, 513, 127), (1, 300, 72, 264)),
            empty=((0, 3, 4, 5), (2, 0, 8, 8), (2, 3, 0, 4), (2, 3, 4, 0)),
            model=(48, 2048, 512, 1536),
            ranges=((1, 3), (1, 60), (1, 100), (1, 200)),
            dtypes=(torch.bfloat16, torch.float32, torch.float16, torch.float64),  # the kernels' first
            differentiable=("x_BTD", "up_HD", "down_DH", *(("residual_BTD",) if added else ())),
        )
        for name, added in (("squared_relu_mlp", True), ("squared_relu_mlp without residual", False))
    ),
    *(
        Case(
            name=name,
            op="squared_relu_mlp_fp8",
            inputs=functools.partial(_squared_relu_mlp, added=added),
            shapes=((1, 1, 1, 1), (2, 3, 16, 32), (1, 127, 48, 528), (3, 5, 513, 127), (1, 300, 80, 272)),
            empty=((0, 3, 4, 5), (2, 0, 16, 16), (2, 3, 0, 4), (2, 3, 4, 0)),
            model=(48, 2048, 512, 1536),
            ranges=((1, 3), (1, 60), (1, 100), (1, 200)),
            dtypes=(torch.bfloat16, torch.float32, torch.float16, torch.float64),  # the kernels' first
            differentiable=("x_BTD", "up_HD", "down_DH", *(("residual_BTD",) if added else ())),
        )
        for name, added in (("squared_relu_mlp_fp8", True), ("squared_relu_mlp_fp8 without residual", False))
    ),
    *(
        Case(
            name=name,
            op="linear_cross_entropy",
            inputs=_linear_cross_entropy,
            shapes=((1, 1, 1, 2), (2, 3, 8, 127), (3, 7, 5, 513)),
            empty=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 4)),
            model=(48, 2048, 512, 1024),
            ranges=((1, 3), (1, 9), (1, 40), (2, 300)),
            differentiable=("x_BTD", "weight_VD"),
            options=options,
        )
        for name, options in (
            ("linear_cross_entropy", {"soft_cap": 5.0}),
            ("linear_cross_entropy without cap", {}),
            ("linear_cross_entropy without reduction", {"soft_cap": 5.0, "reduction": "none"}),
        )
    ),
    Case(name="quantize_int6", op="quantize_int6", inputs=_weight, exact=("output", "output 1"), **_MATRICES),
    Case(name="dequantize_int6", op="dequantize_int6", inputs=_codes_and_scale, exact=("output",), **_MATRICES),
    Case(
        name="fake_quantize_int6",
        op="fake_quantize_int6",
        inputs=_weight,
        differentiable=("weight_RC",),
        exact=("output", "grad weight_RC"),
        **_MATRICES,
    ),
    Case(
        name="fake_quantize_int6 to bfloat16",
        op="fake_quantize_int6",
        inputs=_weight,
        dtypes=(torch.float32,),
        differentiable=("weight_RC",),
        exact=("output", "grad weight_RC"),
        options={"dtype": torch.bfloat16},
        **_MATRICES,
    ),
    *(
        Case(
            name=name,
            op="cast_weights",
            inputs=functools.partial(_weights, scaled=scaled),
            shapes=((1, 1), (3, 127), (127, 3), (5, 513), (16, 512)),
            empty=((0, 4), (4, 0)),
            model=(1536, 512),
            ranges=((1, 40), (1, 700)),
            differentiable=("matrices", "scales") if scaled else ("matrices",),
            by_element=_RESULTS,
            exact=() if scaled else (*_RESULTS, *(f"grad matrices[{index}]" for index in range(4))),
        )
        for name, scaled in (("cast_weights", True), ("cast_weights without scales", False))
    ),
    Case(
        name="newton_schulz",
        op="newton_schulz",
        inputs=_matrix,
        shapes=((1, 1), (3, 127), (127, 3), (130, 129), (1, 513)),
        empty=((0, 4), (4, 0)),
        model=(1536, 512),
        ranges=((1, 150), (1, 300)),
    ),
    Case(name="pack_int6", op="pack_int6", inputs=_codes, dtypes=(torch.float32,), **_MATRICES),
    Case(name="unpack_int6", op="unpack_int6", inputs=_packed, dtypes=(torch.float32,), **_MATRICES),
)


def random_shapes(case: Case, count: int, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """Shapes within the case's ranges."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield tuple(int(torch.randint(low, high + 1, (), generator=generator)) for low, high in case.ranges)
