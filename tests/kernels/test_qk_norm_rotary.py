from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 2.0**-23
SHAPES = [(1, 1, 1, 1, 2), (2, 5, 8, 4, 64), (2, 3, 3, 2, 6), (1, 67, 6, 4, 24)]  # B, T, H, G, h

on_every_implementation = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    """The arguments for B, T, H, G, h, by name; the gain in at least float32."""
    b, t, heads, kv_heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    angle = torch.outer(torch.arange(t), torch.rand(size // 2, generator=generator))
    return {
        "qkv_BTC": torch.randn(b, t, (heads + 2 * kv_heads) * size, generator=generator).to(device, dtype),
        "gain_H": (1 + torch.rand(heads, generator=generator)).to(device, torch.promote_types(dtype, torch.float32)),
        "cos_TF": angle.cos().to(device, dtype),
        "sin_TF": angle.sin().to(device, dtype),
        "num_kv_heads": kv_heads,
    }


def upstream_of(outputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def with_gradients(function, arguments, upstream=None):
    """The outputs of a call, and the gradients of projection and gain."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("qkv_BTC", "gain_H")}
    outputs = function(**{**arguments, **leaves})
    upstream = upstream_of(outputs) if upstream is None else upstream
    return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, list(leaves.values()), upstream)


def numbers(tensor):
    return tensor.detach().cpu().to(torch.float64).numpy()


def slow_qk_norm_rotary(qkv_BTC, gain_H, cos_TF, sin_TF, num_kv_heads):
    """The equation in float64, a pair as a complex number; also the size that its rounding errors scale with."""
    gain = numbers(gain_H)
    heads, size = len(gain), 2 * cos_TF.shape[1]
    x = numbers(qkv_BTC).reshape(*qkv_BTC.shape[:2], heads + 2 * num_kv_heads, size)
    n = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    turned = (n[..., : size // 2] + 1j * n[..., size // 2 :]) * (numbers(cos_TF) - 1j * numbers(sin_TF))[:, None]
    turned = np.concatenate((turned.real, turned.imag), axis=-1)
    # A sum of h squares is off by h / 2 units at most and the root halves that; the quotient and the root are good to
    # 4 units; the products and their sum to half a unit each, and the gain's likewise.
    length = np.abs(n[..., : size // 2]) + np.abs(n[..., size // 2 :])
    blur = (size / 4 + 6) * np.concatenate((length, length), axis=-1)
    gain = gain[:, None]
    parts = slice(0, heads), slice(heads, heads + num_kv_heads), slice(heads + num_kv_heads, None)
    q, k, v = parts
    truths = gain * turned[:, :, q], turned[:, :, k], x[:, :, v]
    sizes = np.abs(gain) * blur[:, :, q], blur[:, :, k], 0 * x[:, :, v]
    return [(torch.from_numpy(truth), torch.from_numpy(size)) for truth, size in zip(truths, sizes, strict=True)]


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_equation(shape, dtype, device):
    b, t, heads, kv_heads, size = shape
    arguments = make(shape, dtype, device)
    outputs = kernels.qk_norm_rotary(**arguments)
    # in float64 the truth is rounded as often as the result
    computing = 2 * torch.finfo(torch.float64).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
    output = torch.finfo(dtype)
    counts = (heads, kv_heads, kv_heads)
    for y, (truth, blur), count in zip(outputs, slow_qk_norm_rotary(**arguments), counts, strict=True):
        assert y.shape == (b, t, count, size)
        assert y.dtype == dtype
        assert y.is_contiguous()
        # rounded once at the end: half a unit, or a whole one where Triton's interpreter cuts it off
        bound = computing * blur + output.eps * truth.abs() + output.smallest_normal * output.eps
        assert bool(((y.cpu().double() - truth).abs() <= bound).all())


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_a_copy(dtype, device):
    arguments = make((2, 5, 3, 2, 6), dtype, device)
    before = arguments["qkv_BTC"].clone()
    *_, v = kernels.qk_norm_rotary(**arguments)
    assert torch.equal(v.flatten(2), before[..., -2 * 6 :])
    v.zero_()
    assert torch.equal(arguments["qkv_BTC"], before)


@on_every_implementation
def test_keys_have_the_length_of_a_root_mean_square_of_one(device):
    arguments = make((2, 9, 4, 2, 16), torch.float64, device)
    q, k, _ = kernels.qk_norm_rotary(**arguments)
    torch.testing.assert_close(k.norm(dim=-1), torch.full_like(k[..., 0], 4.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.norm(dim=-1), 4 * arguments["gain_H"].expand(q.shape[:3]), rtol=1e-6, atol=0)


@on_every_implementation
@pytest.mark.parametrize("eps", [0.0, 1e-3, 10.0])
def test_eps_is_added_to_the_mean_square(eps, device):
    arguments = make((1, 1, 1, 1, 2), torch.float64, device)
    arguments["qkv_BTC"][0, 0] = torch.tensor([1.0, 2.0, 3.0, -4.0, 5.0, 6.0])
    _, k, _ = kernels.qk_norm_rotary(**arguments, eps=eps)  # position 0 is not turned
    np.testing.assert_allclose(numbers(k)[0, 0, 0], np.array([3.0, -4.0]) / np.sqrt(12.5 + eps), rtol=1e-14)


@on_every_implementation
def test_scores_depend_on_the_distance_alone(device):
    arguments = make((1, 12, 1, 1, 8), torch.float64, device)
    arguments["qkv_BTC"] = arguments["qkv_BTC"][:, :1].repeat(1, 12, 1)
    frequencies = torch.rand(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    angle = torch.outer(torch.arange(12).double(), frequencies)
    arguments.update(cos_TF=angle.cos().to(device), sin_TF=angle.sin().to(device))
    q, k, _ = kernels.qk_norm_rotary(**arguments)
    scores = q[0, :, 0] @ k[0, :, 0].mT
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert not torch.allclose(scores[1:, :-1], scores[:-1, 1:])


def separate_steps(qkv_BTC, gain_H, cos_TF, sin_TF, num_kv_heads):
    """As a model writes it: each part by itself, norm, rotary embedding and gain one after another."""
    heads, size = len(gain_H), 2 * cos_TF.shape[1]
    parts = qkv_BTC.split((heads * size, num_kv_heads * size, num_kv_heads * size), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, size)) for part in parts)

    def rotated(x):
        first, second = F.rms_norm(x, (size,), eps=EPS).chunk(2, dim=-1)
        cos, sin = cos_TF[:, None, :], sin_TF[:, None, :]
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)

    return rotated(q) * gain_H[:, None], rotated(k), v


@on_every_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_separate_steps(shape, device):
    arguments = make(shape, torch.float64, device)
    ours = with_gradients(kernels.qk_norm_rotary, arguments)
    theirs = with_gradients(separate_steps, arguments)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_gradients(device):
    arguments = make((2, 3, 3, 2, 4), torch.float64, device)
    qkv, gain = (arguments.pop(name).requires_grad_() for name in ("qkv_BTC", "gain_H"))
    assert torch.autograd.gradcheck(lambda qkv, gain: reference.qk_norm_rotary(qkv, gain, **arguments), (qkv, gain))


@on_every_implementation
def test_a_gain_is_summed_over_more_rows_than_a_program_has(device):
    """Of heads of one pair, whose tiles have the most rows, 2,048: 9 tiles, and 8 are a program's."""
    arguments = make((2, 9000, 1, 1, 2), torch.float64, device)
    *_, gradient = with_gradients(kernels.qk_norm_rotary, arguments)
    *_, expected = with_gradients(separate_steps, arguments)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0)


@on_every_implementation
@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_alone_has_gradients(used, device):
    arguments = make((2, 5, 4, 2, 6), torch.float64, device)
    zeros = [torch.zeros_like(output) for output in kernels.qk_norm_rotary(**arguments)]
    upstream = [output if index == used else zeros[index] for index, output in enumerate(upstream_of(zeros))]
    *_, grad_qkv, grad_gain = with_gradients(kernels.qk_norm_rotary, arguments, upstream)
    qkv, gain = (arguments.pop(name).requires_grad_() for name in ("qkv_BTC", "gain_H"))
    alone = kernels.qk_norm_rotary(qkv, gain, **arguments)[used]
    gradients = torch.autograd.grad(alone, (qkv, gain), upstream[used], materialize_grads=True)
    assert all(map(torch.equal, gradients, (grad_qkv, grad_gain)))
    touched = grad_qkv.unflatten(-1, (8, 6)).abs().sum(dim=(0, 1, 3)) > 0
    assert touched.tolist() == [(0, 0, 0, 0, 1, 1, 2, 2)[head] == used for head in range(8)]
    assert bool(grad_gain.any()) == (used == 0)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_zeros(dtype, device):
    arguments = make((1, 4, 2, 1, 8), dtype, device)
    arguments["qkv_BTC"][0, 1] = 0
    q, k, v, grad_qkv, grad_gain = with_gradients(kernels.qk_norm_rotary, arguments)
    for output in (q, k, v):
        assert not output[0, 1].any()
    assert bool(grad_qkv.isfinite().all())
    assert bool(grad_qkv[0, 1].any())
    assert bool(grad_gain.isfinite().all())


@on_every_implementation
def test_without_eps_the_gain_hears_nothing_of_rows_that_are_not_there(device):
    """The last tile is not full, and what it reads past the end is zeros, whose rms is 0."""
    arguments = {**make((1, 5, 2, 2, 8), torch.float64, device), "eps": 0.0}
    *_, gradient = with_gradients(kernels.qk_norm_rotary, arguments)
    assert bool(gradient.isfinite().all())


@on_every_implementation
@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 8), (2, 0, 4, 2, 8)])
def test_empty(shape, device):
    outputs = with_gradients(kernels.qk_norm_rotary, make(shape, device=device))
    b, t, heads, kv_heads, size = shape
    assert [output.shape[2:] for output in outputs[:3]] == [(heads, size), (kv_heads, size), (kv_heads, size)]
    assert outputs[3].shape == (b, t, 64)
    assert torch.equal(outputs[4], torch.zeros(heads, device=device))


@on_every_implementation
@pytest.mark.parametrize(("gain_dtype", "table_dtype"), [(torch.float64, torch.float16), (torch.bfloat16, DTYPES[0])])
def test_gain_and_tables_may_have_other_dtypes(gain_dtype, table_dtype, device):
    arguments = make((2, 5, 4, 2, 8), torch.bfloat16, device)
    # numbers that every dtype has
    arguments["gain_H"] = torch.tensor([0.5, 1.5, 2.0, 3.0], device=device)
    for name in ("cos_TF", "sin_TF"):
        arguments[name] = (arguments[name].float() * 64).round() / 64
    expected = with_gradients(kernels.qk_norm_rotary, arguments)
    arguments["gain_H"] = arguments["gain_H"].to(gain_dtype)
    arguments.update({name: arguments[name].to(table_dtype) for name in ("cos_TF", "sin_TF")})
    results = with_gradients(kernels.qk_norm_rotary, arguments)
    assert all(map(torch.equal, results[:4], expected[:4]))
    assert results[4].dtype == gain_dtype
    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(results[4].float(), expected[4], rtol=unit, atol=0)


@pytest.mark.usefixtures("triton_kernels")
def test_non_contiguous_inputs_and_gradients(device):
    arguments = make((4, 6, 4, 2, 8), device=device)
    expected = with_gradients(kernels.qk_norm_rotary, arguments)
    for name in ("cos_TF", "sin_TF"):
        arguments[name] = arguments[name].mT.contiguous().mT
    arguments["gain_H"] = torch.stack((arguments["gain_H"], arguments["gain_H"]), dim=1)[:, 0]
    # as attention gives them: heads before time
    upstream = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in upstream_of(expected[:3])]
    qkv = arguments["qkv_BTC"]
    for strided in (qkv.transpose(0, 2).contiguous().transpose(0, 2), torch.stack((qkv, qkv), dim=-1)[..., 0]):
        assert not strided.is_contiguous()
        results = with_gradients(kernels.qk_norm_rotary, {**arguments, "qkv_BTC": strided}, upstream)
        assert all(map(torch.equal, results, expected))


@on_every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, device, compiled):
    arguments = make((2, 7, 4, 2, 16), dtype, device)
    results = [with_gradients(f, arguments) for f in (kernels.qk_norm_rotary, compiled(kernels.qk_norm_rotary))]
    assert all(map(torch.equal, *results))


@on_every_implementation
def test_fake_tensors(device):
    with FakeTensorMode(), device:
        qkv = torch.empty(2, 3, 64, dtype=torch.bfloat16)
        q, k, v = kernels.qk_norm_rotary(qkv, torch.empty(4), torch.empty(3, 4), torch.empty(3, 4), 2)
    assert [output.shape for output in (q, k, v)] == [(2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8)]
    assert {output.dtype for output in (q, k, v)} == {torch.bfloat16}


QKV, GAIN, COS, SIN, _ = make((2, 3, 4, 2, 8)).values()


@on_every_implementation
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], GAIN, COS, SIN, 2), TypeError, "qkv_BTC must be a tensor, not list"),
        ((QKV.int(), GAIN, COS, SIN, 2), TypeError, "qkv_BTC is torch.int32; it may be torch.float32 or"),
        ((QKV[0], GAIN, COS, SIN, 2), ValueError, r"qkv_BTC has shape \[3, 64\]; it must be \[B, T, C\]"),
        ((QKV, 1.5, COS, SIN, 2), TypeError, "gain_H must be a tensor, not float"),
        ((QKV, GAIN.int(), COS, SIN, 2), TypeError, "gain_H is torch.int32; it may be torch.float32 or"),
        ((QKV, GAIN[None], COS, SIN, 2), ValueError, r"gain_H has shape \[1, 4\]; it must be \[H\]"),
        ((QKV, GAIN[:0], COS, SIN, 2), ValueError, "gain_H's number of heads is 0; it must be at least 1"),
        ((QKV, GAIN.to("meta"), COS, SIN, 2), ValueError, "gain_H is on meta; it must be on cpu, as qkv_BTC is"),
        ((QKV, GAIN, None, SIN, 2), TypeError, "cos_TF must be a tensor, not NoneType"),
        ((QKV, GAIN, COS.bool(), SIN, 2), TypeError, "cos_TF is torch.bool; it may be torch.float32 or"),
        ((QKV, GAIN, COS[0], SIN, 2), ValueError, r"cos_TF has shape \[4\]; it must be \[T, F\]"),
        ((QKV, GAIN, COS[:, :0], SIN, 2), ValueError, "cos_TF's number of columns is 0; it must be from 1 to"),
        (
            (QKV, GAIN, COS[:2], SIN, 2),
            ValueError,
            r"cos_TF has shape \[2, 4\]; beside qkv_BTC of shape \[2, 3, 64\] it must be \[3, 4\]",
        ),
        ((QKV, GAIN, COS.to("meta"), SIN, 2), ValueError, "cos_TF is on meta; it must be on cpu, as qkv_BTC is"),
        ((QKV, GAIN, COS, [SIN], 2), TypeError, "sin_TF must be a tensor, not list"),
        ((QKV, GAIN, COS, SIN.long(), 2), TypeError, "sin_TF is torch.int64; it may be torch.float32 or"),
        ((QKV, GAIN, COS, SIN[None], 2), ValueError, r"sin_TF has shape \[1, 3, 4\]; it must be \[T, F\]"),
        (
            (QKV, GAIN, COS, SIN[:, :1], 2),
            ValueError,
            r"sin_TF has shape \[3, 1\]; beside cos_TF of shape \[3, 4\] it must be \[3, 4\]",
        ),
        ((QKV, GAIN, COS, SIN.to("meta"), 2), ValueError, "sin_TF is on meta; it must be on cpu, as qkv_BTC is"),
        ((QKV, GAIN, COS, SIN, 2.0), TypeError, "num_kv_heads must be an integer, not float"),
        ((QKV, GAIN, COS, SIN, True), TypeError, "num_kv_heads must be an integer, not bool"),
        ((QKV, GAIN, COS, SIN, 0), ValueError, "num_kv_heads is 0; it must be at least 1"),
        (
            (QKV, GAIN, COS, SIN, 1),
            ValueError,
            "qkv_BTC has 64 channels; for 4 query, 1 key and 1 value heads of size 8 it must have 48",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.qk_norm_rotary(*arguments)


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [("x", TypeError, "eps must be a number, not str"), (-1.0, ValueError, "eps is -1.0; it must be at least 0")],
)
def test_bad_eps(eps, error, message):
    with pytest.raises(error, match=message):
        kernels.qk_norm_rotary(QKV, GAIN, COS, SIN, 2, eps=eps)
