from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 1), (3, 1), (1, 3), (3, 127), (127, 3), (2, 513)]
INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(shape, generator=generator)).to(device, dtype)


def slow_quantize(weight):
    """The definition, element by element; Python's `round` takes halves to even."""
    real = np.float64 if weight.dtype == torch.float64 else np.float32
    codes, scales = [], []
    with np.errstate(over="ignore", divide="ignore"):
        for row in weight.cpu().to(torch.float64).numpy().astype(real):
            largest = max((abs(w) for w in row if not np.isnan(w)), default=real(0))
            scale = np.float16(np.float32(min(largest / real(31), real(65504))))
            if scale == 0:
                scale = np.float16(1)
            scales.append(scale)
            codes.append([])
            for w in row:
                level = float(w / real(scale))
                if math.isnan(level):
                    code = 0
                elif math.isinf(level):
                    code = 31 if level > 0 else -31
                else:
                    code = max(-31, min(31, round(level)))
                codes[-1].append(code)
    return codes, [float(scale) for scale in scales]


def assert_quantizes_by_the_definition(weight):
    codes, scale = reference.quantize_int6(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert (codes.shape, scale.shape) == (weight.shape, weight.shape[:1])
    expected_codes, expected_scale = slow_quantize(weight)
    assert scale.tolist() == expected_scale
    assert codes.tolist() == expected_codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_follows_the_definition(shape, dtype, device):
    assert_quantizes_by_the_definition(make(shape, dtype, device))


def test_scales_are_quotients(device):
    """Of all mantissas, those for which a product with the reciprocal of 31 would give another scale."""
    largest = (np.arange(2**23, dtype=np.uint32) + np.float32(0.125).view(np.uint32)).view(np.float32)
    scale = (largest / np.float32(31)).astype(np.float16)
    differs = (largest * np.float32(1 / 31)).astype(np.float16) != scale
    assert differs.any()
    weight = torch.from_numpy(largest[differs][:, None]).to(device)
    for quantize in (reference.quantize_int6, kernels.quantize_int6):
        assert quantize(weight)[1].tolist() == scale[differs].tolist()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    weight=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(width=32) | st.floats(-1, 1, width=32),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_quantize_follows_the_definition_for_any_floats(weight, dtype, device):
    assert_quantizes_by_the_definition(torch.from_numpy(weight).to(device, dtype))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((dtype, 0.25) for dtype in DTYPES),
        # Multiplying by the reciprocal of these would leave some quotient beside the half that division gives.
        *((dtype, scale) for dtype in (torch.float32, torch.float64) for scale in (0.1, 1 / 3, 0.0123, 1.7, 49.0)),
    ],
)
def test_halves_round_to_even(dtype, scale, device):
    scale = torch.tensor(scale, dtype=torch.float16).item()
    weight = torch.tensor([[31.0, *(level + 0.5 for level in range(-31, 31))]], device=device, dtype=dtype) * scale
    codes, got_scale = kernels.quantize_int6(weight)
    assert got_scale.tolist() == [scale]
    to_even = [level if level % 2 == 0 else level + 1 for level in range(-31, 31)]
    assert codes.tolist() == [[31, *to_even]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("row", "scale", "codes"),
    [
        ([0.0, -0.0, 0.0], 1.0, [0, 0, 0]),
        ([INF, -INF, 1.0], 65504.0, [31, -31, 0]),
        ([NAN, 31.0, -1.0], 1.0, [0, 31, -1]),
        ([NAN, NAN, NAN], 1.0, [0, 0, 0]),
        ([NAN, INF, 60000.0], 65504.0, [0, 31, 1]),
        ([1e-7, -1e-7, 0.0], 1.0, [0, 0, 0]),  # a third of 31 * 2^-25, which alone would still round to 0
    ],
)
def test_special_rows(row, scale, codes, dtype, device):
    weight = torch.tensor([row, [31.0, 1.0, -31.0]], dtype=dtype, device=device)
    got_codes, got_scale = kernels.quantize_int6(weight)
    assert got_scale.tolist() == [scale, 1.0]
    assert got_codes.tolist() == [codes, [31, 1, -31]]


@pytest.mark.parametrize(
    ("row", "scale", "codes"),
    [
        ([3e38, -3e38, 65504.0, 1e30], 65504.0, [31, -31, 1, 31]),
        ([1e-40, -1e-45, 0.0, 0.0], 1.0, [0, 0, 0, 0]),  # float32 denormals
        ([31 * 2.0**-25, 0.0, 0.0, 0.0], 1.0, [0, 0, 0, 0]),  # halfway to fp16's least value: to even, 0
        ([31 * 2.0**-24, 2.0**-24, 1.5 * 2.0**-24, 0.0], 2.0**-24, [31, 1, 2, 0]),
        ([44 * 2.0**-24, -44 * 2.0**-24, 2.0**-24, 0.0], 2.0**-24, [31, -31, 1, 0]),  # scale 1.42 least values
    ],
)
def test_rows_at_the_ends_of_the_fp16_range(row, scale, codes, device):
    for dtype in (torch.float32, torch.float64):
        got_codes, got_scale = kernels.quantize_int6(torch.tensor([row], dtype=dtype, device=device))
        assert got_scale.tolist() == [scale]
        assert got_codes.tolist() == [codes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_at_most_half_a_level(dtype, device):
    weight = make((64, 127), dtype, device)
    codes, scale = kernels.quantize_int6(weight)
    error = (kernels.dequantize_int6(codes, scale, torch.float64) - weight.double()).abs()
    # Half a level, which a float32 quotient of at most 31 blurs by 31 * 2^-24. The row's maximum, which the
    # rounding of the scale can put at level 31 * (1 + 2^-11) = 31.015, is well inside.
    assert bool((error <= (0.5 + 31 * 2.0**-24) * scale.double()[:, None]).all())


def test_quantizing_twice_changes_nothing(device):
    codes, scale = kernels.quantize_int6(make((64, 127), device=device))
    again = kernels.quantize_int6(kernels.dequantize_int6(codes, scale, torch.float32))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


def test_quantize_does_not_differentiate(device):
    codes, scale = kernels.quantize_int6(make((2, 3), device=device).requires_grad_())
    assert not codes.requires_grad
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_exact_product_rounded_once(dtype, device):
    codes = torch.arange(-32, 32, dtype=torch.int8, device=device).repeat(6, 1)
    scale = torch.tensor([1.0, 0.1, 2.0**-24, 1.0009765625, 2047.0, 65504.0], dtype=torch.float16)
    weight = kernels.dequantize_int6(codes, scale.to(device), dtype)
    product = torch.from_numpy(codes.cpu().double().numpy() * scale.double().numpy()[:, None])
    assert weight.dtype == dtype
    testing.compare("dequantize_int6", [(weight.cpu(), product.to(dtype), product)], exact=True)
    assert torch.equal(kernels.dequantize_int6(codes, scale.to(device)).cpu(), product.float())


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty(shape, device):
    weight = torch.empty(shape, device=device, requires_grad=True)
    codes, scale = kernels.quantize_int6(weight)
    assert codes.shape == shape
    assert scale.tolist() == [1.0] * shape[0]
    assert kernels.dequantize_int6(codes, scale, torch.bfloat16).shape == shape
    packed = kernels.pack_int6(codes)
    assert packed.shape == (shape[0], 3 * -(-shape[1] // 4))
    assert kernels.unpack_int6(packed, shape[1]).shape == shape
    kernels.fake_quantize_int6(weight).sum().backward()
    assert weight.grad.shape == shape


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_fake_quantize_is_the_round_trip_with_identity_gradient(weight_dtype, dtype, device):
    weight = make((5, 13), weight_dtype, device).requires_grad_()
    fake = kernels.fake_quantize_int6(weight, dtype)
    expected_dtype = weight_dtype if dtype is None else dtype
    assert fake.dtype == expected_dtype
    assert torch.equal(fake, kernels.dequantize_int6(*kernels.quantize_int6(weight), expected_dtype))
    upstream = make((5, 13), expected_dtype, device, seed=1)
    (gradient,) = torch.autograd.grad(fake, weight, upstream)
    assert gradient.dtype == weight_dtype
    assert torch.equal(gradient, upstream.to(weight_dtype))


def test_fake_quantize_passes_the_gradient_of_saturated_and_special_values(device):
    weight = torch.tensor([[INF, NAN, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], device=device, requires_grad=True)
    fake = kernels.fake_quantize_int6(weight)
    assert fake.tolist() == [[31 * 65504.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    upstream = make((2, 4), device=device)
    fake.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def slow_pack(codes):
    """Three bytes from four codes by way of a string of 24 binary digits, the last code first."""
    packed = []
    for row in codes:
        packed.append([])
        for start in range(0, len(row), 4):
            group = [*row[start : start + 4], 0, 0, 0][:4]
            bits = "".join(f"{code + 32:06b}" for code in reversed(group))
            packed[-1] += [int(bits[16:], 2), int(bits[8:16], 2), int(bits[:8], 2)]
    return packed


def test_every_code_in_every_position(device):
    others = (-32, -1, 0, 31)
    codes = [
        [code if position == place else other for position in range(4)]
        for place, code, other in itertools.product(range(4), range(-32, 32), others)
    ]
    tensor = torch.tensor(codes, dtype=torch.int8, device=device)
    packed = kernels.pack_int6(tensor)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes)
    assert torch.equal(kernels.unpack_int6(packed, 4), tensor)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 6, 7, 8, 127, 513])
def test_ragged_columns(columns, device):
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-32, 32, (3, columns), generator=generator, dtype=torch.int8).to(device)
    packed = kernels.pack_int6(codes)
    assert packed.shape == (3, 3 * math.ceil(columns / 4))
    assert packed.tolist() == slow_pack(codes.tolist())
    unpacked = kernels.unpack_int6(packed, columns)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(codes=hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(-32, 31)))
def test_any_codes_pack_and_unpack(codes, device):
    tensor = torch.from_numpy(codes).to(device)
    packed = kernels.pack_int6(tensor)
    assert packed.tolist() == slow_pack(codes.tolist())
    assert torch.equal(kernels.unpack_int6(packed, codes.shape[1]), tensor)


def test_a_code_out_of_range_stays_in_its_own_six_bits(device):
    codes = torch.tensor([[5, 32, -33, 7], [5, 127, -128, 7]], dtype=torch.int8, device=device)
    unpacked = kernels.unpack_int6(kernels.pack_int6(codes), 4)
    assert unpacked.tolist() == [[5, -32, 31, 7], [5, -1, 0, 7]]


def test_non_contiguous_inputs(device):
    def strided(tensor):
        copy = tensor.mT.contiguous().mT if tensor.dim() == 2 else torch.stack((tensor, tensor), 1)[:, 0]
        assert not copy.is_contiguous()
        return copy

    weight = make((5, 11), device=device)
    codes, scale = kernels.quantize_int6(weight)
    packed = kernels.pack_int6(codes)
    assert all(map(torch.equal, kernels.quantize_int6(strided(weight)), (codes, scale)))
    assert torch.equal(
        kernels.dequantize_int6(strided(codes), strided(scale), torch.float32),
        kernels.dequantize_int6(codes, scale, torch.float32),
    )
    assert torch.equal(kernels.fake_quantize_int6(strided(weight)), kernels.fake_quantize_int6(weight))
    assert torch.equal(kernels.pack_int6(strided(codes)), packed)
    assert torch.equal(kernels.unpack_int6(strided(packed), 11), codes)


def test_inputs_are_left_alone_and_not_returned(device):
    weight = torch.tensor([[31.0, 1.0, -4.0, NAN], [0.0, INF, 0.0, 1.0]], device=device)
    codes, scale = kernels.quantize_int6(weight)
    packed = kernels.pack_int6(codes)
    inputs = (weight, codes, scale, packed)
    copies = [tensor.clone() for tensor in inputs]
    results = (
        *kernels.quantize_int6(weight),
        kernels.dequantize_int6(codes, scale, torch.float32),
        kernels.fake_quantize_int6(weight),
        kernels.pack_int6(codes),
        kernels.unpack_int6(packed, 4),
    )
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert storages.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_compiled_fake_quantize_equals_eager(weight_dtype, dtype, device, compiled):
    weight = make((5, 13), weight_dtype, device)
    upstream = make((5, 13), dtype, device, seed=1)
    results = []
    for function in (kernels.fake_quantize_int6, compiled(kernels.fake_quantize_int6)):
        leaf = weight.clone().requires_grad_()
        fake = function(leaf, dtype)
        results.append((fake, *torch.autograd.grad(fake, leaf, upstream)))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[1][1], upstream.to(weight_dtype))


@pytest.mark.parametrize("columns", [0, 13])
def test_compiled_round_trip_equals_eager(columns, device, compiled):
    def round_trip(weight):
        codes, scale = kernels.quantize_int6(weight)
        packed = kernels.pack_int6(codes)
        return codes, scale, packed, kernels.dequantize_int6(kernels.unpack_int6(packed, columns), scale)

    weight = make((5, columns), device=device)
    assert all(map(torch.equal, compiled(round_trip)(weight), round_trip(weight)))


def test_compiled_with_symbolic_shapes(device, compiled):
    def round_trip(weight):
        codes, scale = kernels.quantize_int6(weight)
        return kernels.dequantize_int6(kernels.unpack_int6(kernels.pack_int6(codes), codes.shape[1]), scale)

    function = compiled(round_trip, dynamic=True)
    for shape in ((5, 13), (4, 8), (7, 22)):
        weight = make(shape, device=device)
        assert torch.equal(function(weight), kernels.fake_quantize_int6(weight))


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        codes, scale = kernels.quantize_int6(torch.empty(5, 7, dtype=torch.bfloat16))
        packed = kernels.pack_int6(codes)
        results = (
            codes,
            scale,
            packed,
            kernels.unpack_int6(packed, 7),
            kernels.dequantize_int6(codes, scale, torch.float16),
            kernels.fake_quantize_int6(torch.empty(5, 7), torch.bfloat16),
        )
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in results] == [
        ((5, 7), torch.int8),
        ((5,), torch.float16),
        ((5, 6), torch.uint8),
        ((5, 7), torch.int8),
        ((5, 7), torch.float16),
        ((5, 7), torch.bfloat16),
    ]


WEIGHT = make((2, 5))
CODES, SCALE = reference.quantize_int6(WEIGHT)
PACKED = reference.pack_int6(CODES)


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        (kernels.quantize_int6, ([[1.0]],), TypeError, "weight_RC must be a tensor, not list"),
        (kernels.quantize_int6, (CODES,), TypeError, "weight_RC is torch.int8; it may be torch.float32 or"),
        (kernels.quantize_int6, (SCALE,), ValueError, r"weight_RC has shape \[2\]; it must be \[R, C\]"),
        (kernels.fake_quantize_int6, (1.0,), TypeError, "weight_RC must be a tensor, not float"),
        (kernels.fake_quantize_int6, (CODES,), TypeError, "weight_RC is torch.int8"),
        (kernels.fake_quantize_int6, (WEIGHT[None],), ValueError, r"weight_RC has shape \[1, 2, 5\]"),
        (kernels.fake_quantize_int6, (WEIGHT, torch.int8), TypeError, "dtype is torch.int8; it may be torch.fl"),
        (kernels.fake_quantize_int6, (WEIGHT, "bfloat16"), TypeError, "dtype is 'bfloat16'"),
        (kernels.dequantize_int6, (None, SCALE), TypeError, "codes must be a tensor, not NoneType"),
        (kernels.dequantize_int6, (WEIGHT, SCALE), TypeError, "codes is torch.float32; it may be torch.int8"),
        (kernels.dequantize_int6, (CODES[0], SCALE), ValueError, r"codes has shape \[5\]; it must be \[R, C\]"),
        (kernels.dequantize_int6, (CODES, SCALE.float()), TypeError, "scale is torch.float32; .* torch.float16"),
        (kernels.dequantize_int6, (CODES, SCALE[None]), ValueError, r"scale has shape \[1, 2\]"),
        (kernels.dequantize_int6, (CODES, SCALE[:1]), ValueError, r"scale has shape \[1\]; .* must be \[2\]"),
        (kernels.dequantize_int6, (CODES, SCALE.to("meta")), ValueError, "scale is on meta; it must be on cpu"),
        (kernels.dequantize_int6, (CODES, SCALE, torch.int32), TypeError, "dtype is torch.int32; it may be"),
        (kernels.pack_int6, (CODES.tolist(),), TypeError, "codes_RC must be a tensor, not list"),
        (kernels.pack_int6, (CODES.int(),), TypeError, "codes_RC is torch.int32; it may be torch.int8"),
        (kernels.pack_int6, (CODES[0],), ValueError, r"codes_RC has shape \[5\]; it must be \[R, C\]"),
        (kernels.unpack_int6, (b"abc", 4), TypeError, "packed must be a tensor, not bytes"),
        (kernels.unpack_int6, (PACKED.char(), 5), TypeError, "packed is torch.int8; it may be torch.uint8"),
        (kernels.unpack_int6, (PACKED[0], 5), ValueError, r"packed has shape \[6\]; it must be \[R, C\]"),
        (kernels.unpack_int6, (PACKED, 5.0), TypeError, "num_columns must be an integer, not float"),
        (kernels.unpack_int6, (PACKED, -1), ValueError, "num_columns is -1; it must be at least 0"),
        (kernels.unpack_int6, (PACKED, 4), ValueError, r"packed has shape \[2, 6\]; for num_columns 4 .* \[R, 3\]"),
        (kernels.unpack_int6, (PACKED, 9), ValueError, r"packed has shape \[2, 6\]; for num_columns 9 .* \[R, 9\]"),
    ],
)
def test_bad_arguments(op, arguments, error, message):
    with pytest.raises(error, match=message):
        op(*arguments)
