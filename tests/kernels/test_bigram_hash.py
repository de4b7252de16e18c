from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference
from kernels.checks import INTEGERS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW, HIGH = -(2**31), 2**31 - 1
EXTREMES = (LOW, LOW + 1, -1024, -1, 0, 1, 1023, 65535, HIGH - 1, HIGH)

pytestmark = pytest.mark.usefixtures("every_implementation")


def wrap(value):
    """A Python integer as two's complement of 32 bits holds it."""
    return (value + 2**31) % 2**32 - 2**31


def slow_hash(tokens, num_buckets, starts=None):
    """The definition in Python integers, whose modulus rounds down."""
    buckets = []
    for b, row in enumerate(tokens):
        buckets.append([])
        for i, token in enumerate(row):
            if i == 0 or (starts is not None and starts[b][i]):
                buckets[b].append(num_buckets - 1)
            else:
                buckets[b].append((wrap(36313 * token) ^ wrap(27191 * row[i - 1])) % (num_buckets - 1))
    return buckets


def make(batch, time, device="cpu", seed=0, low=0, high=1024):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, high, (batch, time), generator=generator, dtype=torch.int64).to(device)
    starts = torch.rand((batch, time), generator=generator).lt(0.3).to(device)
    return tokens, starts


@pytest.mark.parametrize("num_buckets", [2, 3, 2048, 4096, 5003, 2**31])
def test_every_pair_of_extremes(num_buckets, device):
    pairs = [[before, token] for before in EXTREMES for token in EXTREMES]
    tokens = torch.tensor(pairs, dtype=torch.int32, device=device)
    buckets = kernels.bigram_hash(tokens, num_buckets)
    assert buckets.dtype == torch.int64
    assert buckets.tolist() == slow_hash(pairs, num_buckets)


def test_a_negative_product_lands_in_a_bucket_of_its_own_sign(device):
    # 36313 * 60000 wraps to -2116187296, and no token before it: floor and truncated remainders differ.
    assert wrap(36313 * 60000) == -2116187296
    assert kernels.bigram_hash(torch.tensor([[0, 60000]], device=device), 2048).tolist() == [[2047, -2116187296 % 2047]]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(tokens=st.lists(st.integers(LOW, HIGH), min_size=1, max_size=8), num_buckets=st.integers(2, 2**31))
@example(tokens=[LOW, LOW, HIGH, HIGH, LOW], num_buckets=2**31)
def test_every_int32_pair(tokens, num_buckets, device):
    for dtype in (torch.int32, torch.int64):
        buckets = kernels.bigram_hash(torch.tensor([tokens], dtype=dtype, device=device), num_buckets)
        assert buckets.tolist() == slow_hash([tokens], num_buckets)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(tokens=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=8))
def test_of_wider_tokens_the_low_32_bits_count(tokens, device):
    buckets = kernels.bigram_hash(torch.tensor([tokens], device=device), 4096)
    assert buckets.tolist() == slow_hash([[wrap(token) for token in tokens]], 4096)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_dtypes(dtype, device):
    tokens = [[0, 1, 127, 5, 100]]
    buckets = kernels.bigram_hash(torch.tensor(tokens, dtype=dtype, device=device), 4096)
    assert buckets.dtype == torch.int64
    assert buckets.tolist() == slow_hash(tokens, 4096)


@pytest.mark.parametrize(("batch", "time"), [(1, 1), (3, 2), (2, 127), (1, 513)])
@pytest.mark.parametrize("with_starts", [False, True])
def test_shapes_and_document_starts(batch, time, with_starts, device):
    tokens, starts = make(batch, time, device)
    starts = starts if with_starts else None
    buckets = kernels.bigram_hash(tokens, 2048, starts)
    assert buckets.tolist() == slow_hash(tokens.tolist(), 2048, starts)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(shape, device):
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    starts = tokens.bool()
    table = torch.ones(8, 3, device=device, requires_grad=True)
    assert kernels.bigram_hash(tokens, 8, starts).shape == shape
    rows = kernels.bigram_hash_embed(tokens, table, None, starts)
    rows.sum().backward()
    assert rows.shape == (*shape, 3)
    assert torch.equal(table.grad, torch.zeros_like(table))


def make_table(num_buckets, channels, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    return torch.randn((num_buckets, channels), generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.05])
def test_embed_follows_the_equation(dtype, scale, device):
    tokens, starts = make(2, 127, device)
    table = make_table(31, 3, dtype, device)
    scale_tensor = None if scale is None else torch.tensor(scale, device=device)
    rows = reference.bigram_hash_embed(tokens, table, scale_tensor, starts)
    assert rows.dtype == dtype
    exact = table.double().cpu().numpy()
    factor = 1.0 if scale is None else float(np.float32(scale))
    truth = torch.from_numpy(exact[np.array(slow_hash(tokens.tolist(), 31, starts))] * factor)
    # One rounding in the computing dtype and one in the output's; none without a scale.
    units = 0 if scale is None else torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps
    assert bool(((rows.cpu().double() - truth).abs() <= units * truth.abs()).all())


def test_embed_gradients(device):
    tokens, starts = make(2, 9, device)
    table = make_table(5, 3, torch.float64, device).requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda table, scale: reference.bigram_hash_embed(tokens, table, scale, starts), (table, scale)
    )
    assert torch.autograd.gradcheck(lambda table: reference.bigram_hash_embed(tokens, table), (table,))


def test_table_gradient_against_a_loop(device):
    tokens, starts = make(2, 127, device)
    table = make_table(17, 4, device=device).requires_grad_()
    upstream = torch.randn(2, 127, 4, generator=torch.Generator().manual_seed(1))
    kernels.bigram_hash_embed(tokens, table, None, starts).backward(upstream.to(device))
    truth = np.zeros((17, 4))
    size = np.zeros((17, 4))
    for b, row in enumerate(slow_hash(tokens.tolist(), 17, starts)):
        for i, bucket in enumerate(row):
            truth[bucket] += upstream[b, i].double().numpy()
            size[bucket] += upstream[b, i].abs().double().numpy()
    # A float32 sum of n terms in any order is off by at most n / 2 units of the sum of their sizes.
    bound = 254 / 2 * torch.finfo(torch.float32).eps * size
    assert (np.abs(table.grad.cpu().double().numpy() - truth) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_table_gradient_is_summed_in_float32(dtype, device):
    # 4,096 ones in one bucket: a bfloat16 sum would stop at 256, a float16 one at 2,048.
    tokens = torch.zeros((1, 4097), dtype=torch.int64, device=device)
    table = torch.zeros((2, 1), dtype=dtype, device=device, requires_grad=True)
    kernels.bigram_hash_embed(tokens, table).sum().backward()
    assert table.grad.dtype == dtype
    assert table.grad.tolist() == [[4096.0], [1.0]]


def test_gradients_are_bitwise_repeatable(device):
    tokens, starts = make(4, 513, device)
    upstream = torch.randn(4, 513, 33, device=device)
    runs = []
    for _ in range(3):
        table = make_table(9, 33, device=device).requires_grad_()
        scale = torch.tensor(0.3, device=device, requires_grad=True)
        rows = kernels.bigram_hash_embed(tokens, table, scale, starts)
        runs.append((rows, *torch.autograd.grad(rows, (table, scale), upstream)))
    assert all(map(torch.equal, runs[0], runs[1]))
    assert all(map(torch.equal, runs[0], runs[2]))


def test_non_contiguous_inputs(device):
    tokens, starts = make(5, 7, device)
    table = make_table(12, 6, device=device)
    expected = kernels.bigram_hash_embed(tokens, table, None, starts)
    strided = [tensor.mT.contiguous().mT for tensor in (tokens, table, starts)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(kernels.bigram_hash_embed(strided[0], strided[1], None, strided[2]), expected)
    buckets = kernels.bigram_hash(tokens, 12, starts)
    assert torch.equal(kernels.bigram_hash(strided[0], 12, strided[2]), buckets)


def test_inputs_are_left_alone(device):
    tokens, starts = make(2, 9, device)
    inputs = (tokens, make_table(12, 6, device=device), torch.tensor(0.1, device=device), starts)
    copies = [tensor.clone() for tensor in inputs]
    kernels.bigram_hash(tokens, 12, starts)
    kernels.bigram_hash_embed(*inputs)
    assert all(map(torch.equal, inputs, copies))


def test_the_result_is_no_view_of_the_table(device):
    table = make_table(12, 6, device=device)
    rows = kernels.bigram_hash_embed(make(2, 9, device)[0], table)
    assert rows.untyped_storage().data_ptr() != table.untyped_storage().data_ptr()


@pytest.mark.parametrize("with_starts", [False, True])
def test_compiled_equals_eager(with_starts, device, compiled):
    tokens, starts = make(2, 33, device, low=LOW, high=HIGH)
    starts = starts if with_starts else None
    upstream = torch.randn(2, 33, 6, device=device)
    assert torch.equal(compiled(kernels.bigram_hash)(tokens, 2048, starts), kernels.bigram_hash(tokens, 2048, starts))
    results = []
    for function in (kernels.bigram_hash_embed, compiled(kernels.bigram_hash_embed)):
        table = make_table(12, 6, torch.bfloat16, device).requires_grad_()
        scale = torch.tensor(0.1, device=device, requires_grad=True)
        rows = function(tokens, table, scale, starts)
        results.append((rows, *torch.autograd.grad(rows, (table, scale), upstream.bfloat16())))
    assert all(map(torch.equal, *results))


def test_compiled_with_symbolic_shapes(device, compiled):
    hashed = compiled(kernels.bigram_hash, dynamic=True)
    for batch, time, num_buckets in ((2, 5, 64), (3, 9, 99)):
        tokens, _ = make(batch, time, device)
        assert torch.equal(hashed(tokens, num_buckets), kernels.bigram_hash(tokens, num_buckets))


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        tokens = torch.empty(2, 5, dtype=torch.int32)
        buckets = kernels.bigram_hash(tokens, 9)
        rows = kernels.bigram_hash_embed(tokens, torch.empty(9, 4, dtype=torch.float16), torch.empty(()))
    assert (buckets.shape, buckets.dtype) == ((2, 5), torch.int64)
    assert (rows.shape, rows.dtype) == ((2, 5, 4), torch.float16)


TOKENS, STARTS = make(2, 3)
TABLE = make_table(5, 4)
SCALE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], 8), TypeError, "tokens_BT must be a tensor, not list"),
        ((TOKENS.float(), 8), TypeError, "tokens_BT is torch.float32; it may be torch.int64 or"),
        ((TOKENS.bool(), 8), TypeError, "tokens_BT is torch.bool"),
        ((TOKENS[0], 8), ValueError, r"tokens_BT has shape \[3\]; it must be \[B, T\]"),
        ((TOKENS, 8.0), TypeError, "num_buckets must be an integer, not float"),
        ((TOKENS, True), TypeError, "num_buckets must be an integer, not bool"),
        ((TOKENS, 1), ValueError, "num_buckets is 1; it must be from 2 to 2147483648"),
        ((TOKENS, -4), ValueError, "num_buckets is -4"),
        ((TOKENS, 2**31 + 1), ValueError, "num_buckets is 2147483649"),
        ((TOKENS, 8, STARTS.int()), TypeError, "document_start_BT is torch.int32; it may be torch.bool"),
        ((TOKENS, 8, STARTS[:, :2]), ValueError, r"document_start_BT has shape \[2, 2\]; .* \[2, 3\]"),
        ((TOKENS, 8, STARTS.to("meta")), ValueError, "document_start_BT is on meta; it must be on cpu"),
    ],
)
def test_bad_arguments_to_the_hash(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.bigram_hash(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TOKENS.float(), TABLE), TypeError, "tokens_BT is torch.float32"),
        ((TOKENS[0], TABLE), ValueError, r"tokens_BT has shape \[3\]; it must be \[B, T\]"),
        ((TOKENS, TABLE.int()), TypeError, "table_KD is torch.int32; it may be torch.float32 or"),
        ((TOKENS, TABLE[0]), ValueError, r"table_KD has shape \[4\]; it must be \[K, D\]"),
        ((TOKENS, TABLE[:1]), ValueError, "table_KD's number of rows is 1; it must be from 2"),
        ((TOKENS, TABLE.to("meta")), ValueError, "table_KD is on meta; it must be on cpu, as tokens_BT is"),
        ((TOKENS, TABLE, 0.5), TypeError, "scale must be a tensor, not float"),
        ((TOKENS, TABLE, SCALE.int()), TypeError, "scale is torch.int32"),
        ((TOKENS, TABLE, SCALE[None]), ValueError, r"scale has shape \[1\]; it must be \[\]"),
        ((TOKENS, TABLE, SCALE.to("meta")), ValueError, "scale is on meta; it must be on cpu"),
        ((TOKENS, TABLE, SCALE, [True]), TypeError, "document_start_BT must be a tensor, not list"),
        ((TOKENS, TABLE, None, STARTS[:1]), ValueError, r"document_start_BT has shape \[1, 3\]"),
        ((TOKENS, TABLE, None, STARTS.to("meta")), ValueError, "document_start_BT is on meta"),
    ],
)
def test_bad_arguments_to_the_embedding(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.bigram_hash_embed(*arguments)
