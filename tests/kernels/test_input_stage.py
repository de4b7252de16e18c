from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference

EPS = 2.0**-23

pytestmark = pytest.mark.usefixtures("every_implementation")


def wrap(value):
    """A Python integer as two's complement of 32 bits holds it."""
    return (value + 2**31) % 2**32 - 2**31


def slow_input_stage(tokens, table, gate, bigrams=None, scale=1.0, starts=None):
    """The equation, position by position, in Python floats."""
    width, rows = len(gate), []
    for b, row in enumerate(tokens):
        normed = []
        for i, token in enumerate(row):
            begins = i == 0 or (starts is not None and starts[b][i])
            e = list(table[token])
            if bigrams is not None:
                last = len(bigrams) - 1
                bucket = last if begins else (wrap(36313 * token) ^ wrap(27191 * row[i - 1])) % last
                e = [x + scale * y for x, y in zip(e, bigrams[bucket], strict=True)]
            root = math.sqrt(sum(x * x for x in e) / width + EPS)
            normed.append(([x / root for x in e], begins))
        mix = [1 / (1 + math.exp(-g)) for g in gate]
        zeros = [0.0] * width
        rows.append(
            [
                [(1 - g) * x + g * y for g, x, y in zip(mix, n, zeros if begins else normed[i - 1][0], strict=True)]
                for i, (n, begins) in enumerate(normed)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def make(batch, time, vocabulary, buckets, width, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    tokens = torch.randint(0, vocabulary, (batch, time), generator=generator).to(device)
    starts = torch.rand((batch, time), generator=generator).lt(0.3).to(device)
    return tokens, normal(vocabulary, width), normal(width), normal(buckets, width), normal(), starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("bigrams", ["none", "unscaled", "scaled"])
def test_follows_the_equation(bigrams, with_starts, dtype, device):
    tokens, table, gate, pairs, scale, starts = make(2, 9, 5, 4, 7, dtype, device)
    starts = starts if with_starts else None
    pairs = None if bigrams == "none" else pairs
    scale = scale if bigrams == "scaled" else None
    y = kernels.input_stage(tokens, table, gate, pairs, scale, starts, eps=EPS)
    expected = slow_input_stage(
        tokens.tolist(),
        table.tolist(),
        gate.tolist(),
        None if pairs is None else pairs.tolist(),
        1.0 if scale is None else scale.item(),
        None if starts is None else starts.tolist(),
    )
    assert y.dtype == dtype
    # An element is at most sqrt(7) after the norm; some ten roundings of that size in the computing dtype.
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=30 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("with_starts", [False, True])
def test_gradients_of_the_definition(with_starts, device):
    tokens, *floats, starts = make(2, 5, 4, 3, 3, torch.float64, device)
    floats = [tensor.requires_grad_() for tensor in floats]
    starts = starts if with_starts else None
    assert torch.autograd.gradcheck(lambda *floats: reference.input_stage(tokens, *floats, starts), floats)


def test_a_document_start_hears_nothing_from_before(device):
    tokens, table, gate, pairs, scale, _ = make(1, 6, 5, 4, 8, device=device)
    starts = torch.tensor([[False, False, False, True, False, False]], device=device)
    tokens[0, 2] = 4
    tokens[0, 3:] = torch.tensor([1, 2, 3])
    table[4] = math.nan
    y = kernels.input_stage(tokens, table, gate, pairs, scale, starts)
    assert y[0, 2].isnan().all()
    assert torch.equal(y[:, 3:], kernels.input_stage(tokens[:, 3:], table, gate, pairs, scale))


def test_an_unknown_token_gives_nan_and_no_stray_read(device, triton_kernels):
    tokens, table, gate, pairs, scale, starts = make(1, 6, 5, 4, 8, device=device)
    starts.zero_()
    starts[0, 5] = True
    for unknown in (-1, 5, 2**31 - 1, -(2**31)):
        tokens[0] = torch.tensor([0, 1, unknown, 2, unknown, 3])
        y = kernels.input_stage(tokens, table, gate, pairs, scale, starts)
        # its own row and the one it is smeared into; a document start takes nothing over
        assert y.isnan().all(dim=2)[0].tolist() == [False, False, True, True, True, False]
        assert y[0, [0, 1, 5]].isfinite().all()
        leaf = table.clone().requires_grad_()
        kernels.input_stage(tokens, leaf, gate, None, None, starts).nan_to_num().sum().backward()
        assert leaf.grad.shape == table.shape


def test_a_frequent_token_gets_the_sum_over_all_its_places(device):
    """More places than one program sums, in a table with rows that nobody looks up."""
    time = 300
    tokens = torch.full((1, time), 2, device=device)
    _, table, gate, *_ = make(1, 1, 5, 3, 16, device=device)
    table.requires_grad_()
    upstream = torch.randn(1, time, 16, device=device)
    (gradient,) = torch.autograd.grad(kernels.input_stage(tokens, table, gate), table, upstream)
    doubles = table.detach().double().requires_grad_()
    expected = torch.autograd.grad(reference.input_stage(tokens, doubles, gate.double()), doubles, upstream.double())[0]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient[[0, 1, 3, 4]], torch.zeros_like(gradient[[0, 1, 3, 4]]))


def test_parameters_may_have_another_dtype_than_the_tables(device):
    tokens, table, gate, pairs, scale, starts = make(2, 5, 5, 4, 8, torch.bfloat16, device)
    y = kernels.input_stage(tokens, table, gate.float(), pairs, scale.float(), starts)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, kernels.input_stage(tokens, table, gate, pairs, scale, starts))


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        tokens = torch.empty(2, 5, dtype=torch.int32)
        table = torch.empty(9, 4, dtype=torch.float16)
        y = kernels.input_stage(tokens, table, torch.empty(4), torch.empty(3, 4, dtype=torch.float16), torch.empty(()))
    assert (y.shape, y.dtype) == ((2, 5, 4), torch.float16)


TOKENS, TABLE, GATE, PAIRS, SCALE, STARTS = make(2, 3, 5, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TOKENS.float(), TABLE, GATE), TypeError, "tokens_BT is torch.float32"),
        ((TOKENS[0], TABLE, GATE), ValueError, r"tokens_BT has shape \[3\]; it must be \[B, T\]"),
        ((TOKENS, TABLE.int(), GATE), TypeError, "token_table_VD is torch.int32"),
        ((TOKENS, TABLE[0], GATE), ValueError, r"token_table_VD has shape \[6\]; it must be \[V, D\]"),
        (
            (TOKENS, TABLE[:, :0], GATE[:0]),
            ValueError,
            "token_table_VD's number of columns is 0; it must be at least 1",
        ),
        ((TOKENS, TABLE.to("meta"), GATE), ValueError, "token_table_VD is on meta; it must be on cpu"),
        ((TOKENS, TABLE, 0.5), TypeError, "gate_D must be a tensor, not float"),
        ((TOKENS, TABLE, GATE[:1]), ValueError, r"gate_D has shape \[1\]; beside token_table_VD .* it must be \[6\]"),
        ((TOKENS, TABLE, GATE.to("meta")), ValueError, "gate_D is on meta; it must be on cpu"),
        ((TOKENS, TABLE, GATE, PAIRS.half()), TypeError, "bigram_table_KD is torch.float16; it may be torch.float32"),
        ((TOKENS, TABLE, GATE, PAIRS[:, :2]), ValueError, r"bigram_table_KD has shape \[4, 2\]; .* must be \[4, 6\]"),
        ((TOKENS, TABLE, GATE, PAIRS[:1]), ValueError, "bigram_table_KD's number of rows is 1; it must be from 2"),
        ((TOKENS, TABLE, GATE, PAIRS.to("meta")), ValueError, "bigram_table_KD is on meta"),
        ((TOKENS, TABLE, GATE, None, SCALE), ValueError, "scale is given without bigram_table_KD"),
        ((TOKENS, TABLE, GATE, PAIRS, 0.5), TypeError, "scale must be a tensor, not float"),
        ((TOKENS, TABLE, GATE, PAIRS, SCALE[None]), ValueError, r"scale has shape \[1\]; it must be \[\]"),
        ((TOKENS, TABLE, GATE, PAIRS, SCALE.to("meta")), ValueError, "scale is on meta"),
        ((TOKENS, TABLE, GATE, PAIRS, SCALE, STARTS[:1]), ValueError, r"document_start_BT has shape \[1, 3\]"),
        ((TOKENS, TABLE, GATE, None, None, STARTS.int()), TypeError, "document_start_BT is torch.int32"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.input_stage(*arguments)
