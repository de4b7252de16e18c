from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 127), (0, 4), (16, 512), (1, 1), (4, 0), (2, 8200), (8, 16), (5, 13), (0, 0), (127, 3))
INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(shape, generator=generator)).to(device, dtype)


def misaligned(matrix, elements):
    """A copy that begins so many elements past the start of an allocation."""
    storage = torch.empty(matrix.numel() + elements, dtype=matrix.dtype, device=matrix.device)
    return storage[elements:].view(matrix.shape).copy_(matrix)


def spread(matrix):
    """A copy whose elements lie apart."""
    return torch.stack((matrix, matrix), dim=-1)[..., 0]


def odd_weights(device):
    """Every shape and dtype in one list, and members that begin askew, have gaps or hold special values."""
    weights = [make(shape, DTYPES[seed % 4], device, seed) for seed, shape in enumerate(SHAPES * 2)]
    weights += [
        make((6, 16), torch.float32, device, 50).mT,
        spread(make((5, 11), torch.bfloat16, device, 51)),
        make((9, 20), torch.float64, device, 52)[::2, 3:],
        make((1, 24), torch.float32, device, 53).expand(3, 24),
    ]
    for elements, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float16), (1, torch.float64)):
        weights.append(misaligned(make((4, 32), dtype, device, 60), elements))
    special = [[INF, -INF, 1.0], [NAN, 31.0, -1.0], [NAN] * 3, [0.0, -0.0, 0.0], [1e-7, -1e-7, 0.0], [NAN, INF, 6e4]]
    return weights + [torch.tensor(special, dtype=dtype, device=device) for dtype in DTYPES]


def odd_codes(device):
    """Codes in whole words and not, that begin at a word, within one, and with gaps."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape):
        return torch.randint(-32, 32, shape, generator=generator, dtype=torch.int8).to(device)

    matrices = [codes(*shape) for shape in SHAPES]
    matrices += [misaligned(codes(4, 32), elements) for elements in (1, 2, 4, 8)]
    return [*matrices, codes(16, 8).mT, spread(codes(4, 12)), codes(1, 16).expand(4, 16)]


def assert_same_bits(got, expected):
    """Of two tensors, or two nests of them with the same structure."""
    if not isinstance(expected, torch.Tensor):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)
        return
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert got.is_contiguous() == expected.is_contiguous()
    # as bytes, so that NaN equals itself and -0 is not 0
    assert torch.equal(*(x.detach().contiguous().flatten().view(torch.uint8) for x in (got, expected)))


def test_quantize_equals_one_by_one(device):
    weights = odd_weights(device)
    pairs = kernels.quantize_int6(weights)
    assert all(type(pair) is tuple and len(pair) == 2 for pair in pairs)
    assert_same_bits(pairs, [kernels.quantize_int6(weight) for weight in weights])


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_fake_quantize_equals_one_by_one(dtype, device):
    weights = odd_weights(device)
    fakes = kernels.fake_quantize_int6(weights, dtype)
    assert [fake.dtype for fake in fakes] == [dtype or weight.dtype for weight in weights]
    assert_same_bits(fakes, [kernels.fake_quantize_int6(weight, dtype) for weight in weights])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_one_by_one(dtype, device):
    codes = odd_codes(device)
    scales = [make(matrix.shape[:1], torch.float16, device, seed) for seed, matrix in enumerate(codes)]
    scales[0], scales[2] = spread(scales[0]), misaligned(scales[2], 3)
    weights = kernels.dequantize_int6(codes, scales, dtype)
    assert_same_bits(weights, [kernels.dequantize_int6(*pair, dtype) for pair in zip(codes, scales, strict=True)])


def test_dequantize_gives_float32_by_default(device):
    codes, scale = kernels.quantize_int6(make((3, 4), device=device))
    assert kernels.dequantize_int6([codes], [scale])[0].dtype == torch.float32


def test_pack_equals_one_by_one(device):
    codes = odd_codes(device)
    assert_same_bits(kernels.pack_int6(codes), [kernels.pack_int6(matrix) for matrix in codes])


def test_unpack_equals_one_by_one_and_gives_the_codes_back(device):
    codes = odd_codes(device)
    columns = [matrix.shape[1] for matrix in codes]
    packed = [reference.pack_int6(matrix) for matrix in codes]
    packed[0], packed[2], packed[6] = spread(packed[0]), misaligned(packed[2], 1), misaligned(packed[6], 4)
    unpacked = kernels.unpack_int6(packed, columns)
    assert_same_bits(unpacked, [kernels.unpack_int6(*pair) for pair in zip(packed, columns, strict=True)])
    assert all(map(torch.equal, unpacked, codes))


def test_matrices_of_no_elements_alone(device):
    weights = [torch.empty(shape, device=device) for shape in ((0, 4), (4, 0), (0, 0))]
    pairs = kernels.quantize_int6(weights)
    assert [scale.tolist() for _, scale in pairs] == [[], [1.0] * 4, []]
    codes, scales = zip(*pairs, strict=True)
    assert [tuple(x.shape) for x in kernels.dequantize_int6(codes, scales)] == [(0, 4), (4, 0), (0, 0)]
    packed = kernels.pack_int6(codes)
    assert [tuple(x.shape) for x in packed] == [(0, 3), (4, 0), (0, 0)]
    assert [tuple(x.shape) for x in kernels.unpack_int6(packed, [4, 0, 0])] == [(0, 4), (4, 0), (0, 0)]


def test_every_op_keeps_the_structure(device):
    weights = [make((3, 5), device=device), make((2, 8), device=device)]
    for structure in (list, tuple):
        for count in (0, 1, 2):
            some = structure(weights[:count])
            pairs = kernels.quantize_int6(some)
            codes, scales = structure(c for c, _ in pairs), [s for _, s in pairs]
            packed = kernels.pack_int6(codes)
            columns = [matrix.shape[1] for matrix in some]
            results = (
                *(pairs, kernels.fake_quantize_int6(some), kernels.dequantize_int6(codes, scales)),
                *(packed, kernels.unpack_int6(packed, columns), kernels.unpack_int6(packed, tuple(columns))),
                kernels.dequantize_int6(codes, tuple(scales)),
            )
            assert [(type(result), len(result)) for result in results] == [(structure, count)] * len(results)


def test_an_empty_list_is_not_returned_itself():
    weights = []
    assert kernels.quantize_int6(weights) is not weights


def test_the_kernels_do_a_list_in_one_allocation(device):
    """What tells that the other tests see the kernels for lists."""
    weights = [make(shape, device=device) for shape in ((3, 5), (2, 8), (4, 16))]
    codes, scales = zip(*kernels.quantize_int6(weights), strict=True)
    packed = kernels.pack_int6(codes)
    allocations = 1 if dispatch.chosen() == "triton" else 3
    for results in (
        *(codes, scales, packed, kernels.fake_quantize_int6(weights), kernels.dequantize_int6(codes, scales)),
        kernels.unpack_int6(packed, [5, 8, 16]),
    ):
        assert len({result.untyped_storage().data_ptr() for result in results}) == allocations
        assert all(result.data_ptr() % 16 == 0 for result in results)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_equal_one_by_one(dtype, device):
    weights = [
        make(shape, DTYPES[seed % 4], device, seed) for seed, shape in enumerate(((3, 5), (2, 8), (0, 4), (4, 0)))
    ]
    weights.append(make((4, 6), device=device).mT)
    leaves = [weight.detach().requires_grad_() for weight in weights]
    fakes = kernels.fake_quantize_int6(leaves, dtype)
    upstream = [make(fake.shape, fake.dtype, device, seed=9) for fake in fakes]
    gradients = torch.autograd.grad(fakes, leaves, upstream)
    for gradient, weight, grad in zip(gradients, weights, upstream, strict=True):
        assert gradient.dtype == weight.dtype
        assert torch.equal(gradient, grad.to(weight.dtype))
    alone = [kernels.fake_quantize_int6(leaf, dtype) for leaf in leaves]
    assert_same_bits(fakes, alone)
    assert all(map(torch.equal, gradients, torch.autograd.grad(alone, leaves, upstream)))


def test_only_members_that_require_grad_get_one(device):
    weights = [make((3, 5), device=device, seed=seed) for seed in range(5)]
    for index in (1, 3, 4):
        weights[index].requires_grad_()
    fakes = kernels.fake_quantize_int6(weights)
    assert [fake.requires_grad for fake in fakes] == [False, True, False, True, True]
    upstream = make((3, 5), device=device, seed=9)
    (fakes[1] * upstream + fakes[0] * fakes[2]).sum().backward()
    assert torch.equal(weights[1].grad, upstream)
    # those that took no part have none, rather than zeros
    assert all(weights[index].grad is None for index in (0, 2, 3, 4))


def test_gradients_reach_what_a_member_was_computed_from(device):
    leaf = make((3, 5), device=device).requires_grad_()
    fakes = kernels.fake_quantize_int6([leaf * 2, leaf.bfloat16(), leaf], torch.float32)
    sum(fakes).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 4))


def test_one_tensor_twice(device):
    weight = make((3, 5), device=device).requires_grad_()
    fakes = kernels.fake_quantize_int6([weight, weight])
    assert_same_bits(fakes, [kernels.fake_quantize_int6(weight)] * 2)
    (fakes[0] + 3 * fakes[1]).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 4))


def test_no_gradients_where_none_are_asked_for(device):
    weights = [make((3, 5), device=device).requires_grad_(), make((2, 4), device=device)]
    with torch.no_grad():
        assert not any(fake.requires_grad for fake in kernels.fake_quantize_int6(weights))
    assert not any(tensor.requires_grad for pair in kernels.quantize_int6(weights) for tensor in pair)


def test_parameters(device):
    weights = torch.nn.ParameterList([make((3, 5), device=device), make((2, 8), device=device)])
    fakes = kernels.fake_quantize_int6(list(weights))
    assert all(type(fake) is torch.Tensor for fake in fakes)
    assert_same_bits(fakes, [kernels.fake_quantize_int6(weight) for weight in weights])
    sum(fake.sum() for fake in fakes).backward()
    assert all(torch.equal(weight.grad, torch.ones_like(weight)) for weight in weights)


def round_trip(weights):
    """Every op's results for a list."""
    pairs = kernels.quantize_int6(weights)
    codes, scales = [codes for codes, _ in pairs], [scale for _, scale in pairs]
    packed = kernels.pack_int6(codes)
    unpacked = kernels.unpack_int6(packed, [matrix.shape[1] for matrix in codes])
    return (
        *(pairs, packed, unpacked, kernels.dequantize_int6(unpacked, scales)),
        *(kernels.fake_quantize_int6(weights), kernels.fake_quantize_int6(weights, torch.float64)),
    )


def round_trip_one_by_one(weights):
    """The same as `round_trip` from the ops for one matrix, of the reference."""
    pairs = [reference.quantize_int6(weight) for weight in weights]
    return (
        *(pairs, [reference.pack_int6(codes) for codes, _ in pairs], [codes for codes, _ in pairs]),
        [reference.dequantize_int6(codes, scale) for codes, scale in pairs],
        *([reference.fake_quantize_int6(w, d or w.dtype) for w in weights] for d in (None, torch.float64)),
    )


def test_a_second_call_sees_what_was_changed_in_place(device):
    weights = [make(shape, device=device) for shape in ((3, 127), (8, 16), (16, 512), (1, 1))]
    for seed in range(3):
        for weight in weights:
            weight.copy_(make(weight.shape, device=device, seed=seed) * 2.0**seed)
        assert_same_bits(round_trip(weights), round_trip_one_by_one(weights))


def test_codes_changed_in_place(device):
    codes = [torch.zeros((3, 7), dtype=torch.int8, device=device), torch.zeros((4, 8), dtype=torch.int8, device=device)]
    scales = [torch.ones(3, dtype=torch.float16, device=device), torch.ones(4, dtype=torch.float16, device=device)]
    packed = kernels.pack_int6(codes)
    for code in (0, 5, -32):
        for tensor in codes:
            tensor.fill_(code)
        for tensor in scales:
            tensor.fill_(0.5 + code)
        fresh = kernels.pack_int6(codes)
        for tensor, new in zip(packed, fresh, strict=True):
            tensor.copy_(new)
        assert [x.unique().tolist() for x in kernels.unpack_int6(packed, (7, 8))] == [[code]] * 2
        assert [x.unique().tolist() for x in kernels.dequantize_int6(codes, scales)] == [[code * (0.5 + code)]] * 2


def test_results_of_an_earlier_call_stay_as_they_are(device):
    weights = [make((3, 5), device=device), make((2, 8), device=device)]
    first = round_trip(weights)
    copies = round_trip_one_by_one(weights)
    for weight in weights:
        weight.mul_(3)
    round_trip(weights)
    assert_same_bits(first, copies)


def test_tensors_that_take_the_place_of_freed_ones(device):
    """An allocator hands out an address again: for the same shape, another shape, another dtype."""
    addresses, repeats = set(), 0
    for seed in range(8):
        for shapes, dtype in (
            (((4, 32), (8, 16)), torch.float32),
            (((8, 16), (4, 32)), torch.float32),
            (((4, 64), (8, 32)), torch.float16),
            (((2, 32), (4, 16)), torch.float64),
        ):
            weights = [make(shape, dtype, device, seed) for shape in shapes]
            repeats += weights[0].data_ptr() in addresses
            addresses.add(weights[0].data_ptr())
            assert_same_bits(round_trip(weights), round_trip_one_by_one(weights))
            del weights
    assert repeats


def test_one_piece_of_memory_as_matrices_of_several_shapes_and_dtypes(device):
    memory = make((64,), device=device)
    for _ in range(2):
        for views in (
            [memory[:32].view(4, 8), memory[32:].view(8, 4)],
            [memory[:32].view(8, 4), memory[32:].view(4, 8)],
            [memory[:32].view(2, 16), memory[32:].view(2, 16)],
            [memory[32:].view(4, 8), memory[:32].view(8, 4)],
            [memory[:32].view(torch.float16).view(8, 8), memory[32:].view(8, 4)],
        ):
            assert_same_bits(round_trip(views), round_trip_one_by_one(views))
        memory.mul_(-2)


def test_one_address_and_shape_of_two_dtypes(device):
    # just above half a level, which float32 does not tell from half: that goes to the even code, 0
    doubles = torch.tensor([[31.0, 0.5 + 1e-12], [-0.5 - 1e-12, 31.0]], dtype=torch.float64, device=device)
    floats = doubles.flatten().view(torch.float32)[:4].view(2, 2)
    for weight in (floats, doubles, floats):
        assert_same_bits(kernels.quantize_int6([weight]), [reference.quantize_int6(weight)])
    assert kernels.quantize_int6([doubles])[0][0].tolist() == [[31, 1], [-1, 31]]


def test_more_lists_than_are_remembered(device):
    matrices = [make((2, 3), device=device, seed=seed) for seed in range(70)]
    expected = [reference.quantize_int6(matrix) for matrix in matrices]
    for _ in range(2):
        for index in range(69):
            assert_same_bits(kernels.quantize_int6(matrices[index : index + 2]), expected[index : index + 2])


def test_many_matrices(device):
    weights = [make((1 + seed % 3, 1 + seed % 7), DTYPES[seed % 2 * 2], device, seed) for seed in range(130)]
    assert_same_bits(kernels.quantize_int6(weights), [reference.quantize_int6(weight) for weight in weights])


def test_inputs_are_left_alone(device):
    weights = [make((3, 5), device=device), make((6, 16), device=device)]
    copies = [weight.clone() for weight in weights]
    results = round_trip(weights)
    assert all(map(torch.equal, weights, copies))
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    assert storages.isdisjoint(fake.untyped_storage().data_ptr() for fake in results[4])


def test_compiled_equals_eager(device, compiled):
    weights = [
        make(shape, DTYPES[seed % 4], device, seed) for seed, shape in enumerate(((3, 127), (8, 16), (4, 0), (0, 4)))
    ]
    function = compiled(round_trip)
    assert_same_bits(function(weights), round_trip(weights))
    weights[1].mul_(-3)
    assert_same_bits(function(weights), round_trip(weights))


@pytest.mark.parametrize("structure", [list, tuple])
def test_compiled_gradients_equal_eager(structure, device, compiled):
    weights = [make((3, 5), dtype, device, seed) for seed, dtype in enumerate(DTYPES)]
    upstream = [make((3, 5), torch.bfloat16, device, seed) for seed in range(5, 9)]
    results = []
    for function in (kernels.fake_quantize_int6, compiled(kernels.fake_quantize_int6)):
        leaves = structure(weight.detach().requires_grad_(index != 2) for index, weight in enumerate(weights))
        fakes = function(leaves, torch.bfloat16)
        assert type(fakes) is structure
        assert [fake.requires_grad for fake in fakes] == [True, True, False, True]
        picked = [index for index in range(4) if index != 2]
        gradients = torch.autograd.grad(
            [fakes[index] for index in picked],
            [leaves[index] for index in picked],
            [upstream[index] for index in picked],
        )
        results.append((fakes, gradients))
    assert_same_bits(*results)


def test_fake_tensors(device):
    with FakeTensorMode(), device:
        weights = [torch.empty(5, 7), torch.empty(2, 8, dtype=torch.bfloat16)]
        pairs, packed, unpacked, weights_again, fakes, _ = round_trip(weights)
    shapes = [(5, 7), (2, 8)]
    assert [(tuple(c.shape), c.dtype) for c, _ in pairs] == [(shape, torch.int8) for shape in shapes]
    assert [(tuple(s.shape), s.dtype) for _, s in pairs] == [((5,), torch.float16), ((2,), torch.float16)]
    assert [(tuple(x.shape), x.dtype) for x in packed] == [((5, 6), torch.uint8), ((2, 6), torch.uint8)]
    assert [(tuple(x.shape), x.dtype) for x in unpacked] == [(shape, torch.int8) for shape in shapes]
    assert [(tuple(x.shape), x.dtype) for x in weights_again] == [(shape, torch.float32) for shape in shapes]
    assert [(tuple(x.shape), x.dtype) for x in fakes] == [((5, 7), torch.float32), ((2, 8), torch.bfloat16)]


WEIGHT = make((2, 5))
CODES, SCALE = reference.quantize_int6(WEIGHT)
PACKED = reference.pack_int6(CODES)
QUANTIZE, FAKE = kernels.quantize_int6, kernels.fake_quantize_int6
DEQUANTIZE, PACK, UNPACK = kernels.dequantize_int6, kernels.pack_int6, kernels.unpack_int6


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        (QUANTIZE, ([None, WEIGHT],), TypeError, "^weight_RC must be a tensor, not list"),
        (QUANTIZE, ((1.0,),), TypeError, "^weight_RC must be a tensor, not tuple"),
        (QUANTIZE, ([WEIGHT, None],), TypeError, r"^weight_RC\[1\] must be a tensor, not NoneType"),
        (QUANTIZE, ([WEIGHT] * 3 + [CODES],), TypeError, r"^weight_RC\[3\] is torch.int8; it may be torch.float32 or"),
        (QUANTIZE, ([CODES, WEIGHT],), TypeError, r"^weight_RC\[0\] is torch.int8"),
        (QUANTIZE, ([WEIGHT, WEIGHT[0]],), ValueError, r"^weight_RC\[1\] has shape \[5\]; it must be \[R, C\]"),
        (
            QUANTIZE,
            ([WEIGHT] * 3 + [WEIGHT.to("meta")],),
            ValueError,
            r"^weight_RC\[3\] is on meta; it must be on cpu, as weight_RC\[0\] is",
        ),
        (FAKE, ([WEIGHT, 1.0],), TypeError, r"^weight_RC\[1\] must be a tensor, not float"),
        (FAKE, ([[WEIGHT]],), TypeError, "^weight_RC must be a tensor, not list"),
        (FAKE, ([WEIGHT, [WEIGHT]],), TypeError, r"^weight_RC\[1\] must be a tensor, not list"),
        (FAKE, ([WEIGHT] * 3 + [CODES],), TypeError, r"^weight_RC\[3\] is torch.int8"),
        (FAKE, ([WEIGHT, WEIGHT[None]],), ValueError, r"^weight_RC\[1\] has shape \[1, 2, 5\]; it must be \[R, C\]"),
        (FAKE, ([WEIGHT, WEIGHT.to("meta")],), ValueError, r"^weight_RC\[1\] is on meta; it must be on cpu"),
        (FAKE, ([WEIGHT], torch.int8), TypeError, "^dtype is torch.int8; it may be torch.float32 or"),
        (FAKE, ([], "bfloat16"), TypeError, "^dtype is 'bfloat16'; it may be torch.float32 or"),
        (DEQUANTIZE, ([CODES, None], [SCALE] * 2), TypeError, r"^codes\[1\] must be a tensor, not NoneType"),
        (DEQUANTIZE, ([CODES, WEIGHT], [SCALE] * 2), TypeError, r"^codes\[1\] is torch.float32; it may be torch.int8"),
        (DEQUANTIZE, ([CODES, CODES[0]], [SCALE] * 2), ValueError, r"^codes\[1\] has shape \[5\]"),
        (
            DEQUANTIZE,
            ([CODES, CODES.to("meta")], [SCALE] * 2),
            ValueError,
            r"^codes\[1\] is on meta; it must be on cpu, as codes\[0\] is",
        ),
        (DEQUANTIZE, ([CODES], SCALE), TypeError, "^scale must be a list or tuple, as codes is, not Tensor"),
        (DEQUANTIZE, ([], SCALE), TypeError, "^scale must be a list or tuple, as codes is, not Tensor"),
        (DEQUANTIZE, (CODES, [SCALE]), TypeError, "^scale must be a tensor, not list"),
        (
            DEQUANTIZE,
            ([CODES] * 2, [SCALE]),
            ValueError,
            "^scale has length 1; it must have length 2, as codes has",
        ),
        (DEQUANTIZE, ([], [SCALE]), ValueError, "^scale has length 1; it must have length 0, as codes has"),
        (DEQUANTIZE, ([CODES] * 2, [SCALE, 1.0]), TypeError, r"^scale\[1\] must be a tensor, not float"),
        (
            DEQUANTIZE,
            ([CODES] * 2, [SCALE, SCALE.float()]),
            TypeError,
            r"^scale\[1\] is torch.float32; it may be torch.float16",
        ),
        (
            DEQUANTIZE,
            ([CODES] * 2, [SCALE, SCALE[None]]),
            ValueError,
            r"^scale\[1\] has shape \[1, 2\]; it must be \[R\]",
        ),
        (
            DEQUANTIZE,
            ([CODES] * 2, [SCALE, SCALE[:1]]),
            ValueError,
            r"^scale\[1\] has shape \[1\]; beside codes\[1\] of shape \[2, 5\] it must be \[2\]",
        ),
        (
            DEQUANTIZE,
            ([CODES] * 2, [SCALE, SCALE.to("meta")]),
            ValueError,
            r"^scale\[1\] is on meta; it must be on cpu, as codes\[1\] is",
        ),
        (DEQUANTIZE, ([CODES], [SCALE], torch.int32), TypeError, "^dtype is torch.int32; it may be"),
        (PACK, ([CODES.tolist()],), TypeError, "^codes_RC must be a tensor, not list"),
        (PACK, ([CODES, CODES.tolist()],), TypeError, r"^codes_RC\[1\] must be a tensor, not list"),
        (PACK, ([CODES] * 3 + [CODES.int()],), TypeError, r"^codes_RC\[3\] is torch.int32; it may be torch.int8"),
        (PACK, ([CODES, CODES[0]],), ValueError, r"^codes_RC\[1\] has shape \[5\]; it must be \[R, C\]"),
        (
            PACK,
            ([CODES, CODES.to("meta")],),
            ValueError,
            r"^codes_RC\[1\] is on meta; it must be on cpu, as codes_RC\[0\] is",
        ),
        (UNPACK, ([PACKED, b"abc"], [5, 4]), TypeError, r"^packed\[1\] must be a tensor, not bytes"),
        (UNPACK, ([PACKED, PACKED.char()], [5, 5]), TypeError, r"^packed\[1\] is torch.int8; it may be torch.uint8"),
        (UNPACK, ([PACKED, PACKED[0]], [5, 5]), ValueError, r"^packed\[1\] has shape \[6\]; it must be \[R, C\]"),
        (
            UNPACK,
            ([PACKED, PACKED.to("meta")], [5, 5]),
            ValueError,
            r"^packed\[1\] is on meta; it must be on cpu, as packed\[0\] is",
        ),
        (UNPACK, ([PACKED], 5), TypeError, "^num_columns must be a list or tuple, as packed is, not int"),
        (UNPACK, (PACKED, [5]), TypeError, "^num_columns must be an integer, not list"),
        (
            UNPACK,
            ([PACKED], [5, 5]),
            ValueError,
            "^num_columns has length 2; it must have length 1, as packed has",
        ),
        (UNPACK, ([PACKED] * 2, [5, 5.0]), TypeError, r"^num_columns\[1\] must be an integer, not float"),
        (UNPACK, ([PACKED] * 2, [5, True]), TypeError, r"^num_columns\[1\] must be an integer, not bool"),
        (UNPACK, ([PACKED] * 2, [5, -1]), ValueError, r"^num_columns\[1\] is -1; it must be at least 0"),
        (
            UNPACK,
            ([PACKED] * 2, [5, 4]),
            ValueError,
            r"^packed\[1\] has shape \[2, 6\]; for num_columns\[1\] 4 it must be \[R, 3\]",
        ),
    ],
)
def test_bad_arguments(op, arguments, error, message):
    with pytest.raises(error, match=message):
        op(*arguments)
