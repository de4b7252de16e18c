from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference
from kernels.checks import INTEGERS

EPS = 2.0**-23

on_every_implementation = pytest.mark.usefixtures("every_implementation")
with_and_without_bigrams = pytest.mark.parametrize(
    ("bigrams", "scaled", "with_starts"),
    [(False, False, False), (False, False, True), (True, False, True), (True, True, False), (True, True, True)],
)


def make(shape, dtype=torch.float32, device="cpu", seed=0, *, bigrams=True, scaled=True, with_starts=True):
    """The arguments for B, T, V, K, D, by name; gate and scale in at least float32."""
    b, t, v, k, d = shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    arguments = {
        "tokens_BT": torch.randint(0, v, (b, t), generator=generator),
        "token_table_VD": (0.1 * normal(v, d)).to(dtype),
        "gate_D": normal(d).to(wide),
        "bigram_table_KD": (0.1 * normal(k, d)).to(dtype) if bigrams else None,
        "scale": torch.tensor(0.7, dtype=wide) if scaled else None,
        "document_start_BT": torch.rand((b, t), generator=generator).lt(0.3) if with_starts else None,
    }
    return {name: value if value is None else value.to(device) for name, value in arguments.items()}


def trainable(arguments):
    """The same with its floating tensors as leaves, and a list of these."""
    arguments = {
        name: value.detach().clone().requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return arguments, [value for value in arguments.values() if value is not None and value.requires_grad]


def with_gradients(arguments, upstream):
    """The result of a call and the gradients of all that has one."""
    arguments, leaves = trainable(arguments)
    y = kernels.input_stage(**arguments)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


def numbers(tensor):
    return tensor.detach().cpu().to(torch.float64).numpy()


def wrap(value):
    """A Python integer as two's complement of 32 bits holds it."""
    return (value + 2**31) % 2**32 - 2**31


def slow_input_stage(tokens_BT, token_table_VD, gate_D, bigram_table_KD, scale, document_start_BT):
    """The equation, position by position in float64; also the size that its rounding errors scale with."""
    token_table, gate = numbers(token_table_VD), numbers(gate_D)
    channels = token_table.shape[1]
    factor = 1.0 if scale is None else scale.item()
    g = 1 / (1 + np.exp(-gate))
    y = np.zeros((*tokens_BT.shape, channels))
    size = np.zeros_like(y)
    for b, tokens in enumerate(tokens_BT.tolist()):
        for i, token in enumerate(tokens):
            starts = i == 0 or (document_start_BT is not None and bool(document_start_BT[b, i]))
            e, terms = token_table[token], abs(token_table[token])
            if bigram_table_KD is not None:
                buckets = len(bigram_table_KD)
                bucket = buckets - 1
                if not starts:
                    bucket = (wrap(36313 * token) ^ wrap(27191 * tokens[i - 1])) % (buckets - 1)
                pair = factor * numbers(bigram_table_KD)[bucket]
                e, terms = e + pair, terms + abs(pair)
            inverse = 1 / np.sqrt((e * e).sum() / channels + EPS)
            n = e * inverse
            # e is good to a unit of its terms, each of its squares is too; a sum of D is off by D / 2 units at
            # most and the root halves that; the quotient and the root itself are good to 4 units.
            blur = np.sqrt((terms * terms).mean()) * inverse
            n_size = terms * inverse + abs(n) * (channels / 4 + 4 + blur)
            if starts:
                n_before, n_size_before = np.zeros_like(n), np.zeros_like(n)
            y[b, i] = (1 - g) * n + g * n_before
            # g is good to 4 units and so is 1 - g (absolutely), products and sum to half a unit each
            size[b, i] = 5 * (abs(n) + g * abs(n_before)) + (1 - g) * n_size + g * n_size_before
            n_before, n_size_before = n, n_size
    return torch.from_numpy(y), torch.from_numpy(size)


@on_every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1), (2, 5, 4, 3, 127), (2, 11, 6, 9, 3), (1, 3, 2, 2, 513)])
@with_and_without_bigrams
def test_follows_the_equation(shape, dtype, bigrams, scaled, with_starts, device):
    arguments = make(shape, dtype, device, bigrams=bigrams, scaled=scaled, with_starts=with_starts)
    y = kernels.input_stage(**arguments)
    assert y.shape == (*shape[:2], shape[4])
    assert y.dtype == dtype
    truth, size = slow_input_stage(**arguments)
    # in float64 the truth is rounded as often as the result
    units = 2 if dtype == torch.float64 else 1
    assert bool(((y.cpu().double() - truth).abs() <= units * torch.finfo(dtype).eps * size).all())


@on_every_implementation
@pytest.mark.parametrize("eps", [0.0, 1e-3, 10.0])
def test_eps_is_added_to_the_mean_square(eps, device):
    arguments = make((1, 1, 1, 2, 2), torch.float64, device, bigrams=False, scaled=False)
    arguments["token_table_VD"] = torch.tensor([[3.0, -4.0]], dtype=torch.float64, device=device)
    arguments["gate_D"] = torch.zeros(2, dtype=torch.float64, device=device)
    y = kernels.input_stage(**arguments, eps=eps)
    expected = np.array([3.0, -4.0]) / 2 / np.sqrt(12.5 + eps)
    np.testing.assert_allclose(numbers(y)[0, 0], expected, rtol=1e-14)


@on_every_implementation
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_dtypes(dtype, device):
    arguments = make((2, 7, 100, 9, 4), device=device)
    expected = kernels.input_stage(**arguments)
    arguments["tokens_BT"] = arguments["tokens_BT"].to(dtype)
    assert torch.equal(kernels.input_stage(**arguments), expected)


@on_every_implementation
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6)])
def test_empty(shape, device):
    arguments, leaves = trainable(make(shape, device=device))
    y = kernels.input_stage(**arguments)
    y.sum().backward()
    assert y.shape == (*shape[:2], 6)
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize(("bigrams", "scaled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("with_starts", [False, True])
def test_gradients(bigrams, scaled, with_starts, device):
    arguments = make((2, 5, 3, 4, 3), torch.float64, device, bigrams=bigrams, scaled=scaled, with_starts=with_starts)
    arguments, leaves = trainable(arguments)
    names = [name for name, value in arguments.items() if value is not None and value.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *values: reference.input_stage(**{**arguments, **dict(zip(names, values, strict=True))}), leaves
    )


@on_every_implementation
def test_gradients_of_every_argument_against_differences(device):
    """The op itself in float64, a step along each argument at a time."""
    arguments = make((2, 4, 3, 4, 3), torch.float64, device)
    upstream = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    _, *gradients = with_gradients(arguments, upstream)
    names = [name for name, value in arguments.items() if value.is_floating_point()]
    for name, gradient in zip(names, gradients, strict=True):
        value = arguments[name]
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
        ends = [kernels.input_stage(**{**arguments, name: value + step * direction}) for step in (1e-6, -1e-6)]
        slope = ((ends[0] - ends[1]) * upstream).sum() / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-7)


@on_every_implementation
def test_a_document_start_hears_nothing_from_before(device):
    arguments = make((1, 5, 6, 9, 4), device=device)
    arguments["document_start_BT"] = torch.tensor([[False, False, True, False, False]], device=device)
    for tokens in ([3, 4, 0, 1, 2], [5, 3, 0, 1, 2]):
        arguments["tokens_BT"] = torch.tensor([tokens], device=device)
        for table in ("token_table_VD", "bigram_table_KD"):
            arguments[table] = arguments[table].detach().requires_grad_()
        y = kernels.input_stage(**arguments)
        later = {name: arguments[name][:, 2:] for name in ("tokens_BT", "document_start_BT")}
        assert torch.equal(y[:, 2:], kernels.input_stage(**{**arguments, **later}))
        grad_tokens, grad_pairs = torch.autograd.grad(
            y[0, 2:].sum(), (arguments["token_table_VD"], arguments["bigram_table_KD"])
        )
        assert torch.equal(grad_tokens[3:], torch.zeros_like(grad_tokens[3:]))
        # three pairs: the start's, and two that no token before it has a part in
        buckets = {8} | {(wrap(36313 * token) ^ wrap(27191 * before)) % 8 for before, token in ((0, 1), (1, 2))}
        assert set(grad_pairs.abs().sum(dim=1).nonzero().flatten().tolist()) == buckets


@on_every_implementation
def test_the_first_row_of_a_sequence_hears_nothing_from_the_one_before(device):
    arguments = make((3, 4, 6, 9, 5), device=device, with_starts=False)
    y = kernels.input_stage(**arguments)
    for b in range(3):
        alone = kernels.input_stage(**{**arguments, "tokens_BT": arguments["tokens_BT"][b : b + 1]})
        assert torch.equal(y[b : b + 1], alone)


OUTSIDE = (6, -1, 2**31 - 1, -(2**31))  # of a vocabulary of 6


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("token", OUTSIDE)
@pytest.mark.parametrize("bigrams", [False, True])
@pytest.mark.parametrize("started_after", [False, True])
def test_a_token_outside_gives_nan_in_its_own_row(token, bigrams, started_after, device):
    arguments = make((2, 9, 6, 5, 3), device=device, bigrams=bigrams, scaled=bigrams, with_starts=False)
    arguments["tokens_BT"][0, 4] = token
    arguments["document_start_BT"] = torch.zeros((2, 9), dtype=torch.bool, device=device)
    arguments["document_start_BT"][0, 5] = started_after
    expected = torch.zeros((2, 9, 3), dtype=torch.bool)
    expected[0, 4] = True
    expected[0, 5] = not started_after
    assert torch.equal(kernels.input_stage(**arguments).isnan().cpu(), expected)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("token", [2**32 + 3, -(2**32) + 3, 2**32])
def test_a_token_beyond_32_bits_gives_nan(token, device):
    arguments = make((1, 3, 6, 5, 3), device=device)
    arguments["tokens_BT"][0, 2] = token
    assert bool(kernels.input_stage(**arguments)[0, 2].isnan().all())


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("token", OUTSIDE)
def test_a_token_outside_has_no_part_in_the_gradient_of_the_token_table(token, device):
    arguments = make((2, 9, 6, 5, 3), device=device, bigrams=False, scaled=False)
    arguments["tokens_BT"] %= 5
    upstream = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1)).to(device)
    gradients = []
    for stand_in in (5, token):  # row 5 is the stand-in's alone
        arguments["tokens_BT"][0, 4] = stand_in
        gradients.append(with_gradients(arguments, upstream)[1])
    assert bool(gradients[0][5].any())
    assert torch.equal(gradients[1][:5], gradients[0][:5])
    assert gradients[1][5].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.usefixtures("every_implementation")
def test_float16_gradients_have_room_on_their_way_to_the_tables(device):
    # 1 / rms(e) is about 1,000 here: a float16 gradient of e would be infinite, its product with the scale is not.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (2, 40), generator=generator).to(device)
    table, bigrams = (torch.randn(n, 16, generator=generator).mul(1e-3).half().to(device) for n in (6, 5))
    gate, scale = torch.zeros(16, device=device), torch.tensor(0.05, device=device)
    bigrams.requires_grad_()
    y = kernels.input_stage(tokens, table, gate, bigrams, scale)
    upstream = torch.randn(y.shape, generator=generator).mul(90).to(y)
    (gradient,) = torch.autograd.grad(y, bigrams, upstream)
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [("x", TypeError, "eps must be a number, not str"), (-1.0, ValueError, "eps is -1.0; it must be at least 0")],
)
def test_bad_eps(eps, error, message, device):
    with pytest.raises(error, match=message):
        kernels.input_stage(**{**make((1, 2, 3, 4, 5), device=device), "eps": eps})


def same_token_gradient(row, gate, upstream):
    """d<upstream, y> / d row, where every position looks up `row`, no bigrams: the sum over all positions."""
    g = 1 / (1 + np.exp(-gate))
    inverse = 1 / np.sqrt((row * row).mean() + EPS)
    total = np.zeros_like(row)
    for i, gradient in enumerate(upstream):
        after = upstream[i + 1] if i + 1 < len(upstream) else np.zeros_like(row)
        grad_n = (1 - g) * gradient + g * after
        n = row * inverse
        total += inverse * (grad_n - n * (grad_n * n).mean())
    return total


@on_every_implementation
@pytest.mark.parametrize("count", [1, 64, 65, 130])
def test_the_gradient_of_a_row_is_the_sum_over_its_occurrences(count, device):
    arguments = make((1, count, 3, 2, 5), torch.float64, device, bigrams=False, scaled=False, with_starts=False)
    arguments["tokens_BT"].fill_(1)
    upstream = torch.randn(1, count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, gradient, _ = with_gradients(arguments, upstream.to(device))
    row, gate = numbers(arguments["token_table_VD"])[1], numbers(arguments["gate_D"])
    truth = same_token_gradient(row, gate, upstream[0].numpy())
    # a few roundings of numbers that come to 10 / |row| a position at most
    assert np.abs(numbers(gradient)[1] - truth).max() <= 1e-13 * count / np.abs(row).max()
    assert np.abs(truth).max() > 0.1


@on_every_implementation
def test_the_gradient_of_a_bucket_is_the_sum_over_its_occurrences(device):
    """70 positions of one token; a document starts at each, so all take the last bucket and hear nothing."""
    arguments = make((1, 70, 3, 4, 5), torch.float64, device)
    arguments["tokens_BT"].fill_(1)
    arguments["document_start_BT"].fill_(True)
    upstream = torch.randn(1, 70, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, grad_tokens, _, grad_pairs, grad_scale = with_gradients(arguments, upstream.to(device))
    pair, factor = numbers(arguments["bigram_table_KD"])[3], arguments["scale"].item()
    row = numbers(arguments["token_table_VD"])[1] + factor * pair
    gate = numbers(arguments["gate_D"])
    kept = upstream[0].numpy() / (1 + np.exp(gate))  # (1 - g) upstream, as if there were no gate
    truth = same_token_gradient(row, np.full(5, -700.0), kept)
    bound = 1e-13 * 70 / np.abs(row).max()
    assert np.abs(numbers(grad_tokens)[1] - truth).max() <= bound
    assert np.abs(numbers(grad_pairs)[3] - factor * truth).max() <= bound
    assert abs(grad_scale.item() - (truth * pair).sum()) <= bound
    assert not grad_pairs[:3].any()


@on_every_implementation
def test_the_gradient_of_a_16_bit_table_is_summed_in_float32(device):
    """400 times the same gradient: in bfloat16, their sum would be off by a sixth and more."""
    arguments = make((1, 400, 2, 2, 4), torch.bfloat16, device, bigrams=False, scaled=False)
    arguments["tokens_BT"].fill_(0)
    arguments["document_start_BT"].fill_(True)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5], device=device).bfloat16().expand(1, 400, 4)
    _, all_of_them, _ = with_gradients(arguments, upstream)
    for name in ("tokens_BT", "document_start_BT"):
        arguments[name] = arguments[name][:, :1]
    _, one_of_them, _ = with_gradients(arguments, upstream[:, :1])
    ratio = numbers(all_of_them)[0] / numbers(one_of_them)[0]
    # three roundings to bfloat16, two of them where a result is, which Triton's interpreter cuts off
    assert np.abs(ratio / 400 - 1).max() <= 3 * torch.finfo(torch.bfloat16).eps


@on_every_implementation
@pytest.mark.usefixtures("poisoned_outputs")
def test_rows_that_are_never_looked_up_get_no_gradient(device):
    arguments = make((2, 30, 40, 50, 3), device=device)
    arguments["tokens_BT"] = arguments["tokens_BT"] % 2 * 7 + 11
    upstream = torch.tensor([1.0, -2.0, 3.0], device=device).expand(2, 30, 3)
    _, grad_tokens, _, grad_pairs, _ = with_gradients(arguments, upstream)
    pairs = [(before, token) for before in (11, 18) for token in (11, 18)]
    buckets = {49} | {(wrap(36313 * token) ^ wrap(27191 * before)) % 49 for before, token in pairs}
    for gradient, used in ((grad_tokens, {11, 18}), (grad_pairs, buckets)):
        for row, values in enumerate(gradient.tolist()):
            assert (values == [0.0, 0.0, 0.0]) == (row not in used)


@on_every_implementation
@pytest.mark.parametrize(
    ("gate_dtype", "scale_dtype"),
    [(torch.float32, torch.float32), (torch.float64, torch.bfloat16), (torch.bfloat16, torch.float64)],
)
def test_gate_and_scale_may_have_other_dtypes(gate_dtype, scale_dtype, device):
    arguments = make((2, 5, 4, 5, 8), torch.bfloat16, device)
    # numbers that every dtype has
    arguments["gate_D"] = arguments["gate_D"].bfloat16().to(gate_dtype)
    arguments["scale"] = torch.tensor(0.75, dtype=scale_dtype, device=device)
    upstream = torch.ones((2, 5, 8), dtype=torch.bfloat16, device=device)
    y, grad_tokens, grad_gate, grad_pairs, grad_scale = with_gradients(arguments, upstream)
    dtypes = [tensor.dtype for tensor in (y, grad_tokens, grad_gate, grad_pairs, grad_scale)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, gate_dtype, torch.bfloat16, scale_dtype]
    floats = {name: value.float() if value.is_floating_point() else value for name, value in arguments.items()}
    y_float, _, grad_gate_float, _, grad_scale_float = with_gradients(floats, upstream.float())
    # rounded once at the end: half a unit, or a whole one where it is cut off
    unit = torch.finfo(torch.bfloat16).eps
    assert bool(((y.float() - y_float).abs() <= unit * y_float.abs()).all())
    torch.testing.assert_close(grad_gate.float(), grad_gate_float, rtol=unit, atol=1e-5)
    # the reference rounds no gradient on its way to the scale, and neither do the kernels
    torch.testing.assert_close(grad_scale.float(), grad_scale_float, rtol=unit, atol=1e-5)


@on_every_implementation
def test_fake_tensors(device):
    with FakeTensorMode(), device:
        tokens = torch.empty(2, 3, dtype=torch.int32)
        tables = [torch.empty(rows, 4, dtype=torch.bfloat16) for rows in (7, 5)]
        alone = kernels.input_stage(tokens, tables[0], torch.empty(4))
        starts = torch.empty(2, 3, dtype=torch.bool)
        y = kernels.input_stage(tokens, tables[0], torch.empty(4), tables[1], torch.empty(()), starts)
    assert (alone.shape, alone.dtype) == ((2, 3, 4), torch.bfloat16)
    assert (y.shape, y.dtype) == ((2, 3, 4), torch.bfloat16)


TOKENS, TABLE, GATE, PAIRS, SCALE, STARTS = make((2, 3, 7, 5, 4)).values()


@on_every_implementation
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], TABLE, GATE), TypeError, "tokens_BT must be a tensor, not list"),
        ((TOKENS.float(), TABLE, GATE), TypeError, "tokens_BT is torch.float32; it may be torch.int64 or"),
        ((TOKENS.bool(), TABLE, GATE), TypeError, "tokens_BT is torch.bool; it may be torch.int64 or"),
        ((TOKENS[0], TABLE, GATE), ValueError, r"tokens_BT has shape \[3\]; it must be \[B, T\]"),
        ((TOKENS.to("meta"), TABLE, GATE), ValueError, "token_table_VD is on cpu; it must be on meta, as tokens_BT is"),
        ((TOKENS, None, GATE), TypeError, "token_table_VD must be a tensor, not NoneType"),
        ((TOKENS, TABLE.int(), GATE), TypeError, "token_table_VD is torch.int32; it may be torch.float32 or"),
        ((TOKENS, TABLE[0], GATE), ValueError, r"token_table_VD has shape \[4\]; it must be \[V, D\]"),
        (
            (TOKENS, TABLE[:, :0], GATE[:0]),
            ValueError,
            "token_table_VD's number of columns is 0; it must be from 1 to",
        ),
        ((TOKENS, TABLE.to("meta"), GATE), ValueError, "token_table_VD is on meta; it must be on cpu, as tokens_BT is"),
        ((TOKENS, TABLE, 0.5), TypeError, "gate_D must be a tensor, not float"),
        ((TOKENS, TABLE, GATE.int()), TypeError, "gate_D is torch.int32; it may be torch.float32 or"),
        ((TOKENS, TABLE, GATE[None]), ValueError, r"gate_D has shape \[1, 4\]; it must be \[D\]"),
        (
            (TOKENS, TABLE, GATE[:1]),
            ValueError,
            r"gate_D has shape \[1\]; beside token_table_VD of shape \[7, 4\] it must be \[4\]",
        ),
        ((TOKENS, TABLE, GATE.to("meta")), ValueError, "gate_D is on meta; it must be on cpu, as tokens_BT is"),
        ((TOKENS, TABLE, GATE, [PAIRS]), TypeError, "bigram_table_KD must be a tensor, not list"),
        (
            (TOKENS, TABLE, GATE, PAIRS.double()),
            TypeError,
            "bigram_table_KD is torch.float64; it may be torch.float32$",
        ),
        (
            (TOKENS, TABLE.bfloat16(), GATE, PAIRS),
            TypeError,
            "bigram_table_KD is torch.float32; it may be torch.bfloat16$",
        ),
        ((TOKENS, TABLE, GATE, PAIRS[0]), ValueError, r"bigram_table_KD has shape \[4\]; it must be \[K, D\]"),
        (
            (TOKENS, TABLE, GATE, PAIRS[:, :3]),
            ValueError,
            r"bigram_table_KD has shape \[5, 3\]; beside token_table_VD of shape \[7, 4\] it must be \[5, 4\]",
        ),
        (
            (TOKENS, TABLE, GATE, PAIRS[:1]),
            ValueError,
            "bigram_table_KD's number of rows is 1; it must be from 2 to 2147483648",
        ),
        ((TOKENS, TABLE, GATE, PAIRS[:0]), ValueError, "bigram_table_KD's number of rows is 0; it must be from 2"),
        (
            (TOKENS, TABLE, GATE, PAIRS.to("meta")),
            ValueError,
            "bigram_table_KD is on meta; it must be on cpu, as tokens_BT is",
        ),
        (
            (TOKENS, TABLE, GATE, None, SCALE),
            ValueError,
            "scale is given without bigram_table_KD, the table that it scales",
        ),
        ((TOKENS, TABLE, GATE, PAIRS, 0.5), TypeError, "scale must be a tensor, not float"),
        ((TOKENS, TABLE, GATE, PAIRS, SCALE.int()), TypeError, "scale is torch.int32; it may be torch.float32 or"),
        (
            (TOKENS, TABLE, GATE, PAIRS, SCALE[None]),
            ValueError,
            r"scale has shape \[1\]; it must be \[\] \(no dimensions\)",
        ),
        (
            (TOKENS, TABLE, GATE, PAIRS, SCALE.to("meta")),
            ValueError,
            "scale is on meta; it must be on cpu, as tokens_BT is",
        ),
        ((TOKENS, TABLE, GATE, PAIRS, SCALE, True), TypeError, "document_start_BT must be a tensor, not bool"),
        (
            (TOKENS, TABLE, GATE, PAIRS, SCALE, STARTS.int()),
            TypeError,
            "document_start_BT is torch.int32; it may be torch.bool",
        ),
        (
            (TOKENS, TABLE, GATE, PAIRS, SCALE, STARTS[0]),
            ValueError,
            r"document_start_BT has shape \[3\]; it must be \[B, T\]",
        ),
        (
            (TOKENS, TABLE, GATE, PAIRS, SCALE, STARTS[:, :2]),
            ValueError,
            r"document_start_BT has shape \[2, 2\]; beside tokens_BT of shape \[2, 3\] it must be \[2, 3\]",
        ),
        (
            (TOKENS, TABLE, GATE, None, None, STARTS.to("meta")),
            ValueError,
            "document_start_BT is on meta; it must be on cpu, as tokens_BT is",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.input_stage(*arguments)
