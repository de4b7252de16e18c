from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("x_BTD", "y_BTD", "x_scale_D", "y_scale_D", "skip_BTD", "skip_scale_D")
COMBINATIONS = (
    (),
    ("x_scale_D",),
    ("y_scale_D",),
    ("x_scale_D", "y_scale_D"),
    ("skip_BTD",),
    ("skip_BTD", "skip_scale_D"),
    ("x_scale_D", "skip_BTD"),
    ("x_scale_D", "y_scale_D", "skip_BTD", "skip_scale_D"),
)

every_combination = pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
on_every_implementation = pytest.mark.usefixtures("every_implementation")


def make(shape, dtype=torch.float32, device="cpu", seed=0, names=NAMES):
    """The arguments of those names, x and y always; the scales in float32 at least."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    drawn = {
        name: torch.randn(*(shape[2:] if name.endswith("scale_D") else shape), generator=generator).to(
            device, wide if name.endswith("scale_D") else dtype
        )
        for name in NAMES
    }
    return {name: value for name, value in drawn.items() if name in (*NAMES[:2], *names)}


def with_gradients(arguments, upstream, function=kernels.add_rms_norm):
    """Outputs, then gradients in the order of the arguments; upstream None: that output is not used."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in arguments.items()}
    outputs = function(**leaves)
    used = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if grad is not None]
    return *outputs, *torch.autograd.grad(
        *([output for output, _ in used], list(leaves.values())), [g for _, g in used]
    )


def slow_add_rms_norm(arguments, upstream, eps=2.0**-23):
    """The equation and its derivative, row by row in float64, in the order of `with_gradients`.

    Beside each result the size that its rounding errors scale with.
    """
    numbers = {name: value.detach().cpu().double() for name, value in arguments.items()}
    x, y = numbers["x_BTD"], numbers["y_BTD"]
    one, zero = torch.ones(x.shape[2], dtype=torch.float64), torch.zeros_like(x)
    x_scale, y_scale, skip_scale = (numbers.get(name, one) for name in ("x_scale_D", "y_scale_D", "skip_scale_D"))
    skip = numbers.get("skip_BTD", zero)
    results = {name: torch.zeros_like(value) for name, value in {"sum": x, "normed": x, **numbers}.items()}
    sizes = {name: torch.zeros_like(value) for name, value in results.items()}
    for b, t in ((b, t) for b in range(x.shape[0]) for t in range(x.shape[1])):
        stream, stream_size = x[b, t] + skip_scale * skip[b, t], x[b, t].abs() + (skip_scale * skip[b, t]).abs()
        total = x_scale * stream + y_scale * y[b, t]
        total_size = x_scale.abs() * stream_size + (y_scale * y[b, t]).abs()
        rms = (sum(float(value) ** 2 for value in total) / len(total) + eps) ** 0.5
        # an error of each channel moves the length, and with it all channels
        moved = total_size.norm() / (rms * len(total) ** 0.5)
        normed_size = (total_size + total.abs() * moved) / rms
        grad_sum, grad_normed = (grad[b, t].detach().cpu().double() for grad in upstream)
        normed = total / rms
        jacobian = (torch.eye(len(total), dtype=torch.float64) - torch.outer(normed, normed) / len(total)) / rms
        grad = grad_sum + jacobian @ grad_normed
        along = 3 * normed_size * (grad_normed.abs() * normed_size).mean()
        grad_size = grad_sum.abs() + (1 + moved) * (grad_normed.abs() + along) / rms
        products = {
            "sum": (total, total_size),
            "normed": (normed, normed_size),
            "x_BTD": (x_scale * grad, x_scale.abs() * grad_size),
            "y_BTD": (y_scale * grad, y_scale.abs() * grad_size),
            "skip_BTD": (x_scale * skip_scale * grad, (x_scale * skip_scale).abs() * grad_size),
        }
        shares = {
            "x_scale_D": (grad * stream, grad_size * stream_size),
            "y_scale_D": (grad * y[b, t], grad_size * y[b, t].abs()),
            "skip_scale_D": (x_scale * grad * skip[b, t], (x_scale * skip[b, t]).abs() * grad_size),
        }
        for name in results.keys() & products.keys():
            results[name][b, t], sizes[name][b, t] = products[name]
        for name in results.keys() & shares.keys():
            results[name] += shares[name][0]
            sizes[name] += shares[name][1]
    return list(results.values()), list(sizes.values())


def assert_follows_the_equation(shape, dtype, device, names, seed=0):
    arguments = make(shape, dtype, device, seed, names)
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    found = with_gradients(arguments, upstream)
    truth, sizes = slow_add_rms_norm(arguments, upstream)
    wanted = [dtype, dtype, *(value.dtype for value in arguments.values())]
    # Eight roundings of the computing dtype on any path, and one for each row of a sum over the rows. Without scales
    # the gradient is that of a rounded `normed`. Then half a unit of the result's dtype; a whole one where
    # the interpreter cuts off.
    rounds = 8 + shape[0] * shape[1]
    computing = rounds * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    kept = 0 if any(name.endswith("scale_D") for name in names) else 2 * torch.finfo(dtype).eps
    for index, (value, true, size) in enumerate(zip(found, truth, sizes, strict=True)):
        assert (value.shape, value.dtype) == (true.shape, wanted[index])
        result = torch.finfo(value.dtype)
        bound = (computing + (kept if index > 1 else 0)) * size
        bound = bound + result.eps * true.abs() + result.smallest_normal * result.eps
        assert bool(((value.detach().cpu().double() - true).abs() <= bound).all())


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (2, 3, 127), (3, 17, 3), (1, 2, 513)])
@pytest.mark.parametrize("names", [COMBINATIONS[0], COMBINATIONS[4], COMBINATIONS[-1]], ids=" ".join)
def test_follows_the_equation(shape, dtype, names, device):
    assert_follows_the_equation(shape, dtype, device, names)


@on_every_implementation
@every_combination
def test_every_combination_follows_the_equation(names, device):
    assert_follows_the_equation((2, 5, 6), torch.float32, device, names)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    names=st.sampled_from(COMBINATIONS),
    seed=st.integers(0, 2**31),
)
def test_follows_the_equation_for_any_shape(shape, dtype, names, seed, device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLF_KERNELS", "reference")
        assert_follows_the_equation(shape, dtype, device, names, seed)


@every_combination
@pytest.mark.parametrize("eps", [2.0**-23, 0.5])
def test_gradients(names, eps, device):
    arguments = make((2, 3, 4), torch.float64, device, names=names)
    leaves = [value.requires_grad_() for value in arguments.values()]
    assert torch.autograd.gradcheck(
        lambda *values: reference.add_rms_norm(**dict(zip(arguments, values, strict=True)), eps=eps), leaves
    )


@on_every_implementation
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape, device):
    found = with_gradients(make(shape, device=device), [torch.ones(shape, device=device)] * 2)
    assert [tuple(value.shape) for value in found] == [shape, shape, shape, shape, (4,), (4,), shape, (4,)]
    assert not any(value.any() for value in found)


@on_every_implementation
def test_no_scale_is_a_scale_of_ones(device):
    arguments = make((2, 5, 16), device=device, names=("skip_BTD",))
    ones = {name: torch.ones(16, device=device) for name in NAMES if name.endswith("scale_D")}
    outputs = kernels.add_rms_norm(**arguments)
    assert all(map(torch.equal, outputs, kernels.add_rms_norm(**arguments, **ones)))
    without = kernels.add_rms_norm(arguments["x_BTD"], arguments["y_BTD"])
    zeros = {"skip_BTD": torch.zeros_like(arguments["x_BTD"])}
    assert all(map(torch.equal, without, kernels.add_rms_norm(arguments["x_BTD"], arguments["y_BTD"], **zeros)))


@on_every_implementation
def test_eps_is_added_to_the_mean_square(device):
    x = torch.full((1, 1, 4), 3.0, device=device)
    total, normed = kernels.add_rms_norm(x, torch.zeros_like(x), eps=7.0)
    assert torch.equal(total, x)
    torch.testing.assert_close(normed, torch.full_like(x, 0.75))


@on_every_implementation
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_is_normalized_is_the_sum_before_its_rounding(device):
    """A sum that float16 has no room for still has a norm."""
    x = torch.full((1, 1, 2), 60000.0, dtype=torch.float16, device=device)
    total, normed = kernels.add_rms_norm(x, x)
    assert bool(total.isinf().all())
    assert torch.equal(normed, torch.ones_like(x))


@on_every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_combination
@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_is_one_whose_gradient_is_zero(used, names, dtype, device):
    arguments = make((2, 5, 8), dtype, device, names=names)
    upstream = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    both, one = [torch.zeros_like(upstream)] * 2, [None] * 2
    both[used] = one[used] = upstream
    found, expected = with_gradients(arguments, one), with_gradients(arguments, both)
    # 0 + -0 is 0, so the two may differ in the sign of a zero, which `equal` does not tell apart
    assert all(map(torch.equal, found, expected))


@on_every_implementation
@every_combination
def test_a_leaf_has_a_gradient_of_its_own(names, device):
    """Without scales all terms have the same gradient; what is done to one must not be seen in another."""
    leaves = {name: value.requires_grad_() for name, value in make((2, 3, 4), device=device, names=names).items()}
    total, normed = kernels.add_rms_norm(**leaves)
    (total + 2 * normed).sum().backward()
    kept = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    leaves["x_BTD"].grad.fill_(7)
    assert all(torch.equal(leaves[name].grad, kept[name]) for name in leaves if name != "x_BTD")


@on_every_implementation
def test_one_tensor_may_be_several_terms(device):
    x = make((2, 3, 4), device=device)["x_BTD"].requires_grad_()
    total, normed = kernels.add_rms_norm(x, x, skip_BTD=x)
    (grad,) = torch.autograd.grad(total.sum() + (normed * normed.detach()).sum(), x)
    assert torch.equal(total, 3 * x)
    # along itself a vector's direction does not change
    torch.testing.assert_close(grad, torch.full_like(grad, 3), rtol=1e-5, atol=1e-5)


@on_every_implementation
def test_only_what_needs_a_gradient_gets_one(device):
    arguments = make((2, 3, 4), device=device)
    for alone in arguments:
        leaf = arguments[alone].detach().clone().requires_grad_()
        total, normed = kernels.add_rms_norm(**{**arguments, alone: leaf})
        (total + normed).sum().backward()
        everything = with_gradients(arguments, [torch.ones_like(total)] * 2)
        assert torch.equal(leaf.grad, everything[2 + list(arguments).index(alone)])


def kept_bytes(arguments):
    """Of the distinct storages that the graph of one call holds on to."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = kernels.add_rms_norm(**leaves)
    return sum(kept.values()), outputs


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("skip", [False, True])
def test_without_scales_normed_and_a_number_for_each_row_are_kept(skip, device):
    arguments = make((2, 6, 64), torch.bfloat16, device, names=("skip_BTD",) if skip else ())
    kept, _ = kept_bytes(arguments)
    assert kept == 2 * 6 * 64 * 2 + 2 * 6 * 4


@pytest.mark.usefixtures("triton_kernels")
def test_with_scales_the_inputs_and_a_number_for_each_row_are_kept(device):
    kept, _ = kept_bytes(make((2, 6, 64), torch.bfloat16, device))
    assert kept == 3 * 2 * 6 * 64 * 2 + 3 * 64 * 4 + 2 * 6 * 4


def used_again(arguments, weights, *, pass_on):
    """Outputs, and gradients where x and y are used after the op as well: passed on, or as they were given."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in arguments.items()}
    outputs = kernels.add_rms_norm(**leaves, pass_on=pass_on)
    again = outputs if pass_on else (*outputs, leaves["x_BTD"], leaves["y_BTD"])
    loss = sum((value * weight).sum() for value, weight in zip(again, weights, strict=True) if weight is not None)
    return (*again, *torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))


@on_every_implementation
@pytest.mark.parametrize("without", [None, 0, 1, 2, 3])
@every_combination
def test_what_is_passed_on_is_what_was_given(names, without, device):
    arguments = make((2, 5, 8), device=device, names=names)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(2, 5, 8, generator=generator).to(device) for _ in range(4)]
    if without is not None:
        weights[without] = None
    found, wanted = (used_again(arguments, weights, pass_on=pass_on) for pass_on in (True, False))
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("triton_kernels")
def test_gradients_of_what_is_passed_on_take_no_pass_of_their_own(device):
    arguments = make((2, 5, 8), torch.bfloat16, device)
    weights = [torch.ones(2, 5, 8, device=device, dtype=torch.bfloat16)] * 4
    additions = []
    for pass_on in (True, False):
        with torch.profiler.profile() as profiler:
            used_again(arguments, weights, pass_on=pass_on)
        additions.append(sum(event.name in ("aten::add", "aten::add_") for event in profiler.events()))
    assert additions[1] == additions[0] + 2


@on_every_implementation
def test_passing_on_without_gradients(device):
    arguments = make((2, 3, 4), device=device)
    for leaf in ("y_BTD", "x_scale_D"):
        leaves = {**arguments, leaf: arguments[leaf].clone().requires_grad_()}
        total, normed, x, y = kernels.add_rms_norm(**leaves, pass_on=True)
        assert x is leaves["x_BTD"]
        assert y is leaves["y_BTD"]
        plain = kernels.add_rms_norm(**arguments)
        assert torch.equal(total, plain[0])
        assert torch.equal(normed, plain[1])
    with torch.no_grad():
        assert kernels.add_rms_norm(**leaves, pass_on=True)[2] is leaves["x_BTD"]


@on_every_implementation
@every_combination
def test_a_nan_stays_in_its_row(names, device):
    arguments = make((2, 5, 6), device=device, names=names)
    upstream = [torch.ones(2, 5, 6, device=device)] * 2
    expected = with_gradients(arguments, upstream)
    arguments["y_BTD"][1, 2, 3] = float("nan")
    found = with_gradients(arguments, upstream)
    others = torch.ones(2, 5, dtype=torch.bool, device=device)
    others[1, 2] = False
    for value, before in zip(found, expected, strict=True):
        if value.dim() == 3:
            assert torch.equal(value[others], before[others])
            assert bool(value[1, 2].isnan().any())


@on_every_implementation
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scales_may_have_another_dtype(scale_dtype, device):
    arguments = make((2, 5, 8), torch.bfloat16, device)
    # numbers that every dtype has
    scales = {n: v.bfloat16().half() for n, v in arguments.items() if n.endswith("scale_D")}
    upstream = [torch.ones(2, 5, 8, dtype=torch.bfloat16, device=device)] * 2
    found = with_gradients({**arguments, **{n: v.to(scale_dtype) for n, v in scales.items()}}, upstream)
    floats = with_gradients({**arguments, **{n: v.float() for n, v in scales.items()}}, upstream)
    for value, wanted in zip(found, floats, strict=True):
        if value.dim() == 3:
            assert torch.equal(value, wanted)
        else:
            assert value.dtype == scale_dtype
            unit = max(torch.finfo(scale_dtype).eps, torch.finfo(torch.float32).eps)
            torch.testing.assert_close(value.double(), wanted.double(), rtol=unit, atol=unit)


@on_every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_combination
def test_compiled_equals_eager(names, dtype, device, compiled):
    arguments = make((2, 7, 16), dtype, device, names=names)
    upstream = [torch.randn_like(arguments["x_BTD"]) for _ in range(2)]
    eager = with_gradients(arguments, upstream)
    assert all(map(torch.equal, with_gradients(arguments, upstream, compiled(kernels.add_rms_norm)), eager))


@on_every_implementation
def test_compiled_passes_on(device, compiled):
    arguments = make((2, 7, 16), device=device)
    weights = [torch.randn_like(arguments["x_BTD"]) for _ in range(4)]

    def run(function):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in arguments.items()}
        outputs = function(**leaves, pass_on=True)
        return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), weights)

    for value, expected in zip(run(compiled(kernels.add_rms_norm)), run(kernels.add_rms_norm), strict=True):
        torch.testing.assert_close(value, expected)


@on_every_implementation
def test_fake_tensors(device):
    with FakeTensorMode(), device:
        x, scale = torch.empty(2, 3, 4, dtype=torch.bfloat16), torch.empty(4)
        for outputs in (kernels.add_rms_norm(x, x), kernels.add_rms_norm(x, x, scale, scale, x, scale)):
            assert [(value.shape, value.dtype) for value in outputs] == [((2, 3, 4), torch.bfloat16)] * 2


X, Y, X_SCALE, Y_SCALE, SKIP, SKIP_SCALE = make((2, 3, 4)).values()


@on_every_implementation
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], Y), {}, TypeError, "x_BTD must be a tensor, not list"),
        ((X.int(), Y), {}, TypeError, "x_BTD is torch.int32; it may be torch.float32 or"),
        ((X[0], Y), {}, ValueError, r"x_BTD has shape \[3, 4\]; it must be \[B, T, D\]"),
        ((X[..., :0], Y[..., :0]), {}, ValueError, "x_BTD's number of channels is 0; it must be from 1 to"),
        ((X, None), {}, TypeError, "y_BTD must be a tensor, not NoneType"),
        ((X, Y.half()), {}, TypeError, "y_BTD is torch.float16; it may be torch.float32$"),
        ((X, Y[0]), {}, ValueError, r"y_BTD has shape \[3, 4\]; it must be \[B, T, D\]"),
        ((X, Y[:1]), {}, ValueError, r"y_BTD has shape \[1, 3, 4\]; .* it must be \[2, 3, 4\]"),
        ((X, Y.to("meta")), {}, ValueError, "y_BTD is on meta; it must be on cpu, as x_BTD is"),
        ((X, Y, 0.5), {}, TypeError, "x_scale_D must be a tensor, not float"),
        ((X, Y, X_SCALE.int()), {}, TypeError, "x_scale_D is torch.int32; it may be torch.float32 or"),
        ((X, Y, X_SCALE[None]), {}, ValueError, r"x_scale_D has shape \[1, 4\]; it must be \[D\]"),
        ((X, Y, X_SCALE[:1]), {}, ValueError, r"x_scale_D has shape \[1\]; beside x_BTD of .* it must be \[4\]"),
        ((X, Y, X_SCALE.to("meta")), {}, ValueError, "x_scale_D is on meta; it must be on cpu, as x_BTD is"),
        ((X, Y, None, Y_SCALE[:1]), {}, ValueError, r"y_scale_D has shape \[1\]; beside x_BTD"),
        ((X, Y, None, None, [SKIP]), {}, TypeError, "skip_BTD must be a tensor, not list"),
        ((X, Y, None, None, SKIP.double()), {}, TypeError, "skip_BTD is torch.float64; it may be torch.float32$"),
        ((X, Y, None, None, SKIP[:, :1]), {}, ValueError, r"skip_BTD has shape \[2, 1, 4\]; beside x_BTD"),
        ((X, Y, None, None, SKIP.to("meta")), {}, ValueError, "skip_BTD is on meta; it must be on cpu"),
        ((X, Y, None, None, SKIP, SKIP_SCALE[:1]), {}, ValueError, r"skip_scale_D has shape \[1\]; beside x_BTD"),
        ((X, Y, None, None, None, SKIP_SCALE), {}, ValueError, "skip_scale_D is given without skip_BTD"),
        ((X, Y), {"eps": "small"}, TypeError, "eps must be a number, not str"),
        ((X, Y), {"pass_on": 1}, TypeError, "pass_on must be a bool, not int"),
        ((X, Y), {"eps": -1e-6}, ValueError, "eps is -1e-06; it must be at least 0"),
        ((X, Y), {"eps": float("nan")}, ValueError, "eps is nan; it must be at least 0"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        kernels.add_rms_norm(*arguments, **options)
