"""Schemes against their definitions in plain numpy loops, their errors, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golfmodel.artifact.quantize import dequantize_parameters, quantize_int8, quantize_parameters
from golfmodel.artifact.stored import StoredTensor
from golfmodel.model.parameters import Storage
from golfmodel.runtime.errors import ArtifactError

SHAPES = [(1, 1), (1, 3), (3, 1), (5, 127), (4, 513), (64, 64)]


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    size = 10.0 ** (6 * torch.rand(rows, 1, generator=generator) - 4)
    return torch.randn(rows, columns, generator=generator) * size


def codes_by_loop(weight: np.ndarray, scale: np.float16, limit: int) -> list[int]:
    """Every code of a row from its rounded scale: float32 division, half to even, clamped."""
    codes = []
    for value in weight:
        level = float(np.float32(value) / np.float32(scale))
        codes.append(max(-limit, min(limit, round(level))))
    return codes


def store(weight: torch.Tensor, storage: Storage) -> StoredTensor:
    return quantize_parameters({"w": (weight, storage)})["w"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int6_is_its_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_matrix(*shape).to(dtype)
    stored = store(weight, Storage.INT6)
    assert stored.values.dtype == torch.int8
    assert stored.scale_R.dtype == torch.float16
    for row, codes, scale in zip(weight.float().numpy(), stored.values, stored.scale_R.numpy(), strict=True):
        expected = np.float16(np.float32(np.abs(row).max()) / np.float32(31))
        assert scale == (expected if expected != 0 else np.float16(1))
        assert codes.tolist() == codes_by_loop(row, scale, 31)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_its_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_matrix(*shape).to(dtype)
    stored = store(weight, Storage.INT8)
    for row, codes, scale in zip(weight.float().numpy(), stored.values, stored.scale_R.numpy(), strict=True):
        clip = np.quantile(np.abs(row).astype(np.float64), 0.9999984)
        expected = np.float16(clip / 127)
        # The quantile is interpolated in float32, which may move the rounding to fp16 by one place.
        assert abs(float(scale) - float(expected)) <= float(np.spacing(expected))
        assert codes.tolist() == codes_by_loop(row, scale, 127)


def test_int8_clips_a_long_row_at_its_quantile() -> None:
    row = torch.linspace(0, 1, 2**20)
    row[::2] *= -1
    row[12345], row[54321] = 100.0, -50.0
    codes, scale = quantize_int8(row[None])
    ordered = row.abs().sort().values
    # (2^20 - 1) * 0.0000016 = 1.68 places below the largest: between the second and third largest values.
    assert ordered[-3] < float(scale) * 127 < ordered[-2]
    assert float(scale) * 127 == pytest.approx(50 - 0.68 * 49, rel=0.05)
    assert codes[0, 12345] == 127
    assert codes[0, 54321] == -127


def test_int8_codes_never_reach_minus_128() -> None:
    # fp16 rounds this scale down, so that the largest weights lie beyond 127 steps.
    weight = torch.full((1, 4), -127 * 1.00048)
    codes, scale = quantize_int8(weight)
    assert float(scale) < 1.00048
    assert codes.tolist() == [[-127] * 4]
    weight[0, 0] = -1e6
    weight[0, 1] = 70000 * 127
    assert quantize_int8(weight)[0].abs().max() == 127


@pytest.mark.parametrize("storage", [Storage.INT6, Storage.INT8])
def test_ties_round_to_even(storage: Storage) -> None:
    limit = {Storage.INT6: 31, Storage.INT8: 127}[storage]
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, float(limit), float(limit)]])
    stored = store(halves, storage)
    assert stored.scale_R.tolist() == [1.0]
    assert stored.values.tolist() == [[0, 2, 2, 0, -2, -2, limit, limit]]


@pytest.mark.parametrize("storage", [Storage.INT6, Storage.INT8])
def test_scales_stay_positive_and_finite(storage: Storage) -> None:
    weight = torch.tensor([[0.0, -0.0], [1e-9, -1e-9], [3e38, -3e38], [2e-6, 1e-6]])
    stored = store(weight, storage)
    assert stored.problem() is None
    limit = {Storage.INT6: 31, Storage.INT8: 127}[storage]
    assert stored.scale_R[:3].tolist() == [1.0, 1.0, 65504.0]
    assert stored.values[:3].tolist() == [[0, 0], [0, 0], [limit, -limit]]


def test_fp16_and_fp32_round_once() -> None:
    weight = torch.tensor([1.0, 1 / 3, -65504.0, 2.0**-24, 2.0**-26])
    assert store(weight, Storage.FP16).values.numpy().tobytes() == weight.numpy().astype(np.float16).tobytes()
    assert torch.equal(store(weight, Storage.FP32).values, weight)
    assert store(weight.double(), Storage.FP32).values.dtype == torch.float32


def test_round_trip_keeps_names_shapes_and_precision() -> None:
    parameters = {
        "six": (random_matrix(9, 33), Storage.INT6),
        "eight": (random_matrix(9, 33, seed=1), Storage.INT8),
        "half": (random_matrix(3, 5), Storage.FP16),
        "full": (torch.tensor(0.1), Storage.FP32),
    }
    stored = quantize_parameters(parameters)
    weights = dequantize_parameters(stored)
    assert list(weights) == list(parameters)
    for name, (weight, _) in parameters.items():
        assert weights[name].shape == weight.shape
        assert weights[name].dtype == torch.float32
    for name in ("six", "eight"):
        error = (weights[name] - parameters[name][0]).abs()
        # Half a step, and as much again as the largest code falls short by the rounding of scale and quantile.
        assert bool((error <= 0.6 * stored[name].scale_R.float()[:, None]).all())
        assert error.max() > 0
    assert torch.equal(weights["half"], parameters["half"][0].half().float())
    assert torch.equal(weights["full"], parameters["full"][0])


@pytest.mark.parametrize("storage", [Storage.INT6, Storage.INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_codes_times_scale(storage: Storage, dtype: torch.dtype) -> None:
    stored = store(random_matrix(7, 20), storage)
    exact = stored.values.numpy().astype(np.float64) * stored.scale_R.numpy().astype(np.float64)[:, None]
    weights = dequantize_parameters({"w": stored}, dtype=dtype)["w"]
    assert weights.dtype == dtype
    assert torch.equal(weights, torch.from_numpy(exact).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-7, 4),
)
def test_int6_of_its_own_weights_changes_nothing(rows: int, columns: int, seed: int, exponent: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    first = store(weight, Storage.INT6)
    second = store(dequantize_parameters({"w": first})["w"], Storage.INT6)
    # A row whose largest code is 31 has 31 * scale as its largest weight, and so the same scale again. Every row with a
    # normal fp16 scale is one: rounding moves max / scale by 2^-11 at most. Subnormal scales round more coarsely.
    full = (first.values.abs() == 31).any(dim=1)
    assert full[(first.scale_R >= 2.0**-14) & (first.values != 0).any(dim=1)].all()
    assert torch.equal(first.values[full], second.values[full])
    assert torch.equal(first.scale_R[full], second.scale_R[full])


def test_layout_and_gradients_make_no_difference() -> None:
    weight = random_matrix(12, 8)
    for storage in (Storage.INT6, Storage.INT8, Storage.FP16, Storage.FP32):
        plain = store(weight, storage)
        other = store(weight.t().contiguous().t().requires_grad_(), storage)
        assert torch.equal(plain.values, other.values)
        assert not other.values.requires_grad
        if plain.scale_R is not None:
            assert torch.equal(plain.scale_R, other.scale_R)


@pytest.mark.parametrize("storage", [Storage.INT6, Storage.INT8, Storage.FP16, Storage.FP32])
def test_nothing_shares_memory(storage: Storage) -> None:
    weight = torch.ones(4, 4, dtype=torch.float16 if storage is Storage.FP16 else torch.float32)
    stored = store(weight, storage)
    weight.zero_()
    weights = dequantize_parameters({"w": stored}, dtype=torch.float32)["w"]
    assert weights.sum() == pytest.approx(16, rel=1e-3)
    before = stored.values.clone()
    weights.zero_()
    assert torch.equal(stored.values, before)


@pytest.mark.parametrize("storage", [Storage.INT6, Storage.INT8, Storage.FP16, Storage.FP32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_and_counted(storage: Storage, bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = weight[2, 3] = bad
    with pytest.raises(ArtifactError, match=r"'blocks\.0\.w' holds 2 of 12 values that are not finite"):
        quantize_parameters({"fine": (torch.ones(2, 2), storage), "blocks.0.w": (weight, storage)})


def test_float64_beyond_float32_is_not_finite() -> None:
    with pytest.raises(ArtifactError, match="1 of 1 values that are not finite"):
        store(torch.tensor([1e300], dtype=torch.float64), Storage.FP32)


def test_fp16_overflow_is_an_error() -> None:
    assert store(torch.tensor([65504.0, -65504.0]), Storage.FP16).values.tolist() == [65504.0, -65504.0]
    with pytest.raises(ArtifactError, match=r"'w' holds 2 of 3 values beyond 65504"):
        store(torch.tensor([65505.0, 1.0, -70000.0]), Storage.FP16)


@pytest.mark.parametrize(
    ("weight", "storage", "message"),
    [
        (torch.ones(4), Storage.INT6, r"'w' has shape \[4\]; int6 stores two dimensions"),
        (torch.ones(2, 2, 2), Storage.INT8, r"'w' has shape \[2, 2, 2\]; int8 stores two dimensions"),
        (torch.tensor(1.0), Storage.INT8, r"'w' has shape \[\]; int8 stores two dimensions"),
        (torch.ones(0, 4), Storage.INT6, r"'w' is empty: shape \[0, 4\]"),
        (torch.ones(4, 0), Storage.INT8, r"'w' is empty: shape \[4, 0\]"),
        (torch.ones(0), Storage.FP16, r"'w' is empty: shape \[0\]"),
        (torch.ones(2, 2), Storage.NONE, r"'w' has scheme 'none', which the artifact never stores"),
    ],
)
def test_what_cannot_be_stored_is_named(weight: torch.Tensor, storage: Storage, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        store(weight, storage)


def test_progress_counts_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {name: (torch.ones(2, 2), Storage.INT6) for name in "abc"}
    quantize_parameters(parameters)
    assert capsys.readouterr().err == ""
    quantize_parameters(parameters, show_progress=True)
    assert "quantizing: 3/3 tensor" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", [Storage.INT6, Storage.INT8, Storage.FP16, Storage.FP32])
def test_a_gpu_gives_the_same_bits(storage: Storage) -> None:
    weight = random_matrix(64, 513)
    here, there = store(weight, storage), store(weight.cuda(), storage)
    assert there.values.device.type == "cpu"
    assert torch.equal(here.values, there.values)
    assert here.scale_R is None or torch.equal(here.scale_R, there.scale_R)
    back = dequantize_parameters({"w": there}, device="cuda")["w"]
    assert back.is_cuda
    assert torch.equal(back.cpu(), dequantize_parameters({"w": here})["w"])
