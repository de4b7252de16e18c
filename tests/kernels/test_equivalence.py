"""Every op with a Triton kernel, held to its reference by the error rule: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import dispatch, testing
from kernels.cases import CASES, Case, random_shapes
from kernels.testing import MismatchError, for_tensors, same_bits, tensors_of

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_outputs")

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
every_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name.replace(' ', '-')}-{str(dtype)[6:]}")
        for case in CASES
        for dtype in case.dtypes
    ],
)


def one_draw(case: Case, device: torch.device, dtype: torch.dtype | None = None):
    """Arguments and upstream gradients of a mid-sized call."""
    dtype = dtype or case.dtypes[0]
    arguments = case.draw(case.shapes[1], dtype, device, seed=5)
    return arguments, testing.upstream_of(case, arguments, dtype, device, seed=5)


@every_dtype
def test_odd_and_tiny_shapes(case, dtype, device):
    for shape in case.shapes:
        testing.check(case, shape, dtype, device)


@every_dtype
def test_random_shapes(case, dtype, device):
    count = 3 if device.type == "cuda" else 1  # of each dtype: interpreted, each takes its time
    for number, shape in enumerate(random_shapes(case, count, seed=case.dtypes.index(dtype))):
        testing.check(case, shape, dtype, device, seed=100 * number)


@every_dtype
def test_empty_tensors(case, dtype, device):
    for shape in case.empty:
        testing.check(case, shape, dtype, device)


@every_dtype
def test_compiled_as_one_graph(case, dtype, device, compiled_by_default):
    testing.check(case, case.shapes[1], dtype, device, function=compiled_by_default(case.function))


@every_case
def test_compiled_equals_eager(case, device, compiled_by_default):
    arguments, upstream = one_draw(case, device)
    eager = testing.results(case, case.function, arguments, upstream)
    assert same_bits(testing.results(case, compiled_by_default(case.function), arguments, upstream), eager)


@every_case
def test_non_contiguous_inputs(case, device):
    arguments, upstream = one_draw(case, device)
    expected = testing.results(case, case.function, arguments, upstream)

    def spread(value):
        if value.dim() == 0:
            return value
        apart = torch.stack((value, value), dim=-1)[..., 0]
        assert value.numel() < 2 or not apart.is_contiguous()
        return apart

    arguments = {name: for_tensors(spread, value) for name, value in arguments.items()}
    upstream = for_tensors(spread, upstream)
    assert same_bits(testing.results(case, case.function, arguments, upstream), expected)


@every_case
def test_transposed_inputs(case, device):
    arguments, upstream = one_draw(case, device)
    expected = testing.results(case, case.function, arguments, upstream)

    def transposed(value):
        return value.mT.contiguous().mT if value.dim() >= 2 else value

    arguments = {name: for_tensors(transposed, value) for name, value in arguments.items()}
    upstream = upstream and [gradient.mT.contiguous().mT for gradient in upstream]
    assert same_bits(testing.results(case, case.function, arguments, upstream), expected)


@every_case
def test_a_misaligned_input_changes_nothing(case, device):
    arguments, upstream = one_draw(case, device)
    expected = testing.results(case, case.function, arguments, upstream)

    def misaligned(value):
        storage = torch.empty(value.numel() + 1, dtype=value.dtype, device=device)
        return storage[1:].view(value.shape).copy_(value)

    arguments = {name: for_tensors(misaligned, value) for name, value in arguments.items()}
    assert same_bits(testing.results(case, case.function, arguments, upstream), expected)


@every_dtype
def test_the_same_bits_twice(case, dtype, device):
    """As users run it: not where PyTorch's own ops are made deterministic. On a GPU with programs enough to race."""
    torch.use_deterministic_algorithms(False)
    shape = case.model if device.type == "cuda" else case.shapes[-1]
    arguments = case.draw(shape, dtype, device, seed=5)
    upstream = testing.upstream_of(case, arguments, dtype, device, seed=5)
    first = testing.results(case, case.function, arguments, upstream)
    for _ in range(3 if device.type == "cuda" else 1):  # interpreted programs run one after another
        assert same_bits(testing.results(case, case.function, arguments, upstream), first)


@every_case
def test_inputs_are_left_alone(case, device):
    arguments, upstream = one_draw(case, device)
    tensors = list(tensors_of([arguments, upstream]))
    copies = [tensor.clone() for tensor in tensors]
    testing.results(case, case.function, arguments, upstream)
    assert all(map(torch.equal, tensors, copies))


@every_case
def test_opcheck(case, device):
    """The registered op: schema, autograd registration, fake tensors and tracing."""
    arguments, _ = one_draw(case, device)
    received = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch._triton_kernels, case.op, lambda *args, **_: received.append(args))
        case.function(**arguments)
    (args,) = received
    trainable = {id(tensor) for name in case.differentiable for tensor in tensors_of(arguments[name])}
    args = for_tensors(lambda x: x.detach().requires_grad_() if id(x) in trainable else x, args)
    if case.op == "fake_quantize_int6" and args[1] is None:
        args[1] = args[0].dtype
    if case.op == "newton_schulz":
        args = [args, [3.4445, -4.7750, 2.0315] * 2]
    if case.op == "cast_weights":
        matrices, dtype, scales, joined = args
        scaled = [index for index, scale in enumerate(scales) if scale is not None]
        args = [matrices, [scales[index] for index in scaled], scaled, joined, dtype]
    torch.library.opcheck(getattr(torch.ops.golf, case.op).default, tuple(args))


@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=lambda case: case.name)
def test_a_second_derivative_is_refused(case, device):
    arguments, upstream = one_draw(case, device)
    leaf = next(tensors_of(arguments[case.differentiable[0]])).requires_grad_()
    outputs = tensors_of(case.function(**arguments))
    pairs = [pair for pair in zip(outputs, upstream, strict=True) if pair[0].requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    (gradient,) = torch.autograd.grad(outputs, leaf, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_every_op_with_a_kernel_has_a_case():
    with_kernel = set(kernels.__all__) - set(dispatch.without_kernel(kernels.__all__))
    assert {case.op for case in CASES} == with_kernel


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("ours", "eager"), [(0.0, NAN), (NAN, 0.0), (INF, -INF), (1.0, INF), (INF, NAN)])
@pytest.mark.parametrize("by_element", [False, True])
def test_the_rule_tells_special_values_apart(ours, eager, by_element):
    ours, eager = torch.tensor([1.0, ours]), torch.tensor([1.0, eager])
    for value in (ours, eager):
        testing.compare("it", [(value, value, value.double())], by_element=by_element)
    with pytest.raises(MismatchError, match="it: NaN or infinity"):
        testing.compare("it", [(ours, eager, eager.double())], by_element=by_element)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in {"smear_gate", "quantize_int6"}])
def test_the_rule_catches_a_wrong_kernel(case, device):
    """One element off by a few ulp, a result of another dtype, a NaN: each breaks the rule."""

    def off_by(change):
        def function(**arguments):
            outputs = case.function(**arguments)
            return change(outputs) if isinstance(outputs, torch.Tensor) else (change(outputs[0]), *outputs[1:])

        return function

    def nudged(output):
        step = torch.zeros_like(output)
        step.view(-1)[0] = 1 if not output.is_floating_point() else 8 * torch.finfo(output.dtype).eps
        return output + step * (output if output.is_floating_point() else 1)

    def poisoned(output):
        return output.float() * float("nan")

    shape = case.shapes[0]
    for change in (nudged, poisoned, lambda output: output.double()):
        with pytest.raises(MismatchError, match=case.name):
            testing.check(case, shape, torch.bfloat16, device, function=off_by(change))
    testing.check(case, shape, torch.bfloat16, device, function=off_by(lambda output: output))
