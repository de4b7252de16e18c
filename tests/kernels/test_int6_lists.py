"""A list of matrices in one call: what calling the op for each of them gives, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

import kernels

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(device):
    """Matrices of mixed shapes, dtypes and layouts, some with special values."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    weights = [
        *(normal(5, 127), normal(16, 64), normal(0, 8), normal(3, 0), normal(1, 1), normal(2, 8200)),
        *(normal(7, 33, dtype=torch.bfloat16), normal(4, 64, dtype=torch.float16), normal(3, 9, dtype=torch.float64)),
        normal(12, 6).mT,
        normal(161)[1:].view(10, 16),
    ]
    weights[0][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    weights[1][2] = 0
    return weights


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert torch.equal(a, b)


def test_quantize_and_back(device):
    weights = make(device)
    quantized = kernels.quantize_int6(weights)
    assert isinstance(quantized, list)
    codes, scales = zip(*quantized, strict=True)
    expected = [kernels.quantize_int6(weight) for weight in weights]
    same(codes, [code for code, _ in expected])
    same(scales, [scale for _, scale in expected])
    for dtype in (torch.float32, torch.bfloat16):
        again = [kernels.dequantize_int6(*pair, dtype) for pair in expected]
        same(kernels.dequantize_int6(list(codes), list(scales), dtype), again)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fake_quantize(dtype, device):
    weights = make(device)
    same(kernels.fake_quantize_int6(weights, dtype), [kernels.fake_quantize_int6(w, dtype) for w in weights])


def test_pack_and_unpack(device):
    codes = [code for code, _ in kernels.quantize_int6(make(device))]
    packed = kernels.pack_int6(codes)
    same(packed, [kernels.pack_int6(code) for code in codes])
    same(kernels.unpack_int6(packed, [code.shape[1] for code in codes]), codes)


def test_gradients_reach_those_that_want_one(device):
    weights = [weight.detach().requires_grad_(index % 2 == 0) for index, weight in enumerate(make(device)[:5])]
    fakes = kernels.fake_quantize_int6(weights, torch.bfloat16)
    assert [fake.requires_grad for fake in fakes] == [True, False, True, False, True]
    upstream = [torch.randn_like(fake) for fake in fakes]
    torch.autograd.backward([fakes[i] for i in (0, 2, 4)], [upstream[i] for i in (0, 2, 4)])
    for i in (0, 2, 4):
        assert torch.equal(weights[i].grad, upstream[i].float())
    assert weights[1].grad is None


def test_a_later_call_sees_the_values_of_then(device):
    weights = make(device)[:2]
    kernels.quantize_int6(weights)
    for round_ in range(3):
        weights[1].normal_()
        weights[0] = torch.randn(5 + round_, 127, device=device)
        expected = [kernels.quantize_int6(weight) for weight in weights]
        for ours, theirs in zip(kernels.quantize_int6(weights), expected, strict=True):
            same(ours, theirs)


def test_the_structure_is_kept(device):
    weights = tuple(make(device)[:2])
    assert isinstance(kernels.quantize_int6(weights), tuple)
    assert isinstance(kernels.fake_quantize_int6(weights), tuple)
    for empty in ([], ()):
        assert kernels.quantize_int6(empty) == empty
        assert kernels.fake_quantize_int6(empty) == empty
        assert kernels.pack_int6(empty) == empty
        assert kernels.dequantize_int6(empty, empty) == empty
        assert kernels.unpack_int6(empty, empty) == empty


def test_compiled_equals_eager(device, compiled):
    weights = make(device)[:2]
    expected = kernels.fake_quantize_int6(weights, torch.float32)
    same(compiled(lambda *weights: kernels.fake_quantize_int6(list(weights), torch.float32))(*weights), expected)


WEIGHT, CODES, SCALE = torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, dtype=torch.half)
PACKED = torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        ("quantize_int6", ([WEIGHT, WEIGHT[0]],), ValueError, r"weight_RC\[1\] has shape \[4\]; it must be \[R, C\]"),
        ("quantize_int6", ([WEIGHT, CODES],), TypeError, r"weight_RC\[1\] is torch.int8"),
        ("quantize_int6", ([WEIGHT, WEIGHT.to("meta")],), ValueError, r"weight_RC\[1\] is on meta"),
        ("fake_quantize_int6", ([WEIGHT, 1.0],), TypeError, r"weight_RC\[1\] must be a tensor, not float"),
        ("pack_int6", ([CODES, WEIGHT],), TypeError, r"codes_RC\[1\] is torch.float32"),
        ("dequantize_int6", ([CODES, CODES], [SCALE]), ValueError, "scale has length 1; it must have length 2"),
        ("dequantize_int6", ([CODES], SCALE), TypeError, "scale must be a list or tuple, as codes is"),
        ("dequantize_int6", ([CODES], [SCALE[:1]]), ValueError, r"scale\[0\] has shape \[1\]"),
        ("unpack_int6", ([PACKED], [4, 4]), ValueError, "num_columns has length 2; it must have length 1"),
        ("unpack_int6", ([PACKED], [5]), ValueError, r"packed\[0\] has shape \[2, 3\]; for num_columns\[0\] 5"),
    ],
)
def test_bad_lists(op, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(kernels, op)(*arguments)
