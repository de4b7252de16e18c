from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch, reference

X, GATE = torch.randn(2, 3, 4), torch.randn(4)
TOKENS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.randn(8, 4)
QKV, COS, SIN = torch.randn(2, 3, (4 + 2 * 2) * 8), torch.randn(3, 4), torch.randn(3, 4)
WEIGHT, CODES, SCALE = torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, dtype=torch.half)
DOWN, HEAD = torch.randn(4, 2), torch.randn(5, 4)
STARTS = torch.zeros(2, 3, dtype=torch.bool)
PACKED = torch.zeros(2, 3, dtype=torch.uint8)

CALLS = [
    ("add_rms_norm", (X, X), {"x_scale_D": GATE}, (X, X, GATE, None, None, None, 2.0**-23), {"pass_on": False}),
    ("cast_weights", ([WEIGHT], torch.half), {}, ([WEIGHT], torch.half, [None], [1]), {}),
    ("smear_gate", (X, GATE), {}, (X, GATE, None), {}),
    ("bigram_hash", (TOKENS, 8), {}, (TOKENS, 8, None), {}),
    ("bigram_hash_embed", (TOKENS, TABLE), {}, (TOKENS, TABLE, None, None), {}),
    (
        *("input_stage", (TOKENS, TABLE, GATE), {"document_start_BT": STARTS}),
        *((TOKENS, TABLE, GATE, None, None, STARTS, 2.0**-23), {}),
    ),
    ("qk_norm_rotary", (QKV, GATE, COS, SIN, 2), {}, (QKV, GATE, COS, SIN, 2, 2.0**-23), {}),
    ("linear_cross_entropy", (X, HEAD, TOKENS), {"soft_cap": 30}, (X, HEAD, TOKENS, 30.0, "mean"), {}),
    ("squared_relu_mlp", (X, WEIGHT, DOWN, X), {}, (X, WEIGHT, DOWN, X), {}),
    ("squared_relu_mlp_fp8", (X, WEIGHT, DOWN, X), {}, (X, WEIGHT, DOWN, X), {}),
    ("quantize_int6", (WEIGHT,), {}, (WEIGHT,), {}),
    ("dequantize_int6", (CODES, SCALE), {"dtype": torch.half}, (CODES, SCALE, torch.half), {}),
    ("fake_quantize_int6", (WEIGHT,), {}, (WEIGHT, None), {}),
    ("pack_int6", (CODES,), {}, (CODES,), {}),
    ("unpack_int6", (PACKED, 4), {}, (PACKED, 4), {}),
    ("newton_schulz", ([WEIGHT],), {"steps": 3}, ([WEIGHT],), {"steps": 3, "coefficients": None}),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No variables, and no kernels but those that a test registers."""
    monkeypatch.delenv("GOLF_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_triton_kernels", {})


@pytest.fixture
def kernel():
    """A stand-in for SmearGate's kernel, which no other function's result could be mistaken for."""

    @dispatch.register_triton("smear_gate")
    def kernel(x_BTD, gate_D, document_start_BT):
        return x_BTD + 1000

    return kernel


def cuda_tensor():
    """A tensor that says it is on a CUDA device, with or without one."""
    with FakeTensorMode():
        return torch.empty(1, device="cuda")


def test_auto_on_cpu_is_the_reference(kernel):
    assert dispatch.implementation("smear_gate", X) is reference.smear_gate


def test_auto_on_cuda_is_the_kernel(kernel):
    assert dispatch.implementation("smear_gate", cuda_tensor()) is kernel


def test_auto_on_an_interpreted_cpu_is_the_kernel(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("smear_gate", X) is kernel
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dispatch.implementation("smear_gate", X) is reference.smear_gate


def test_auto_without_a_kernel_is_the_reference(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("bigram_hash", X) is reference.bigram_hash
    assert dispatch.implementation("bigram_hash", cuda_tensor()) is reference.bigram_hash


def test_auto_elsewhere_is_the_reference(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("smear_gate", X.to("meta")) is reference.smear_gate


def test_reference_is_always_the_reference(kernel, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("smear_gate", X) is reference.smear_gate
    assert dispatch.implementation("smear_gate", cuda_tensor()) is reference.smear_gate


def test_triton_is_always_the_kernel(kernel, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", "triton")
    assert dispatch.implementation("smear_gate", cuda_tensor()) is kernel
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("smear_gate", X) is kernel


def test_triton_on_a_plain_cpu_tensor_is_an_error(kernel, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="GOLF_KERNELS=triton, but smear_gate was given a tensor on cpu"):
        kernels.smear_gate(X, GATE)


def test_triton_without_a_kernel_is_an_error(monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for tensor in (X, cuda_tensor()):
        with pytest.raises(RuntimeError, match="GOLF_KERNELS=triton, but smear_gate has no Triton kernel"):
            dispatch.implementation("smear_gate", tensor)


@pytest.mark.parametrize("value", ["cuda", "", "Triton"])
def test_any_other_choice_is_an_error(value, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", value)
    with pytest.raises(ValueError, match=f"GOLF_KERNELS is '{value}'; it may be .* auto, reference, triton"):
        kernels.smear_gate(X, GATE)


def test_the_environment_is_read_at_each_call(kernel, monkeypatch):
    expected = reference.smear_gate(X, GATE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for choice, result in (("auto", X + 1000), ("reference", expected), ("triton", X + 1000)):
        monkeypatch.setenv("GOLF_KERNELS", choice)
        assert torch.equal(kernels.smear_gate(X, GATE), result)


@pytest.mark.parametrize(("name", "arguments", "options", "passed", "passed_options"), CALLS)
def test_every_op_hands_its_arguments_over(name, arguments, options, passed, passed_options, monkeypatch):
    received = []

    @dispatch.register_triton(name)
    def kernel(*arguments, **options):
        received.append((arguments, options))
        return "the kernel's result"

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert getattr(kernels, name)(*arguments, **options) == "the kernel's result"
    ((got, got_options),) = received
    assert [type(value) for value in got] == [type(value) for value in passed]
    assert all(a is b or a == b for a, b in zip(got, passed, strict=True))
    assert got_options == passed_options
    monkeypatch.setenv("GOLF_KERNELS", "reference")
    assert getattr(kernels, name)(*arguments, **options) != "the kernel's result"
    assert len(received) == 1


def test_every_public_op_is_covered_above():
    public = {name for name, value in vars(kernels).items() if callable(value) and not name.startswith("_")}
    assert public == {call[0] for call in CALLS}


@pytest.mark.parametrize("choice", [None, "auto", "reference", "triton"])
def test_the_choice_is_traced_into_a_compiled_graph(choice, kernel, monkeypatch, compiled):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if choice is not None:
        monkeypatch.setenv("GOLF_KERNELS", choice)
    gate = compiled(lambda x, gate: kernels.smear_gate(x, gate) * 2)
    expected = reference.smear_gate(X, GATE) if choice == "reference" else X + 1000
    assert torch.equal(gate(X, GATE), expected * 2)


def test_the_choice_in_a_compiled_graph_without_a_kernel(monkeypatch, compiled):
    monkeypatch.setenv("GOLF_KERNELS", "auto")
    gate = compiled(lambda x, gate: kernels.smear_gate(x, gate) * 2)
    assert torch.equal(gate(X, GATE), reference.smear_gate(X, GATE) * 2)


def test_importing_the_ops_does_not_import_the_compiler():
    # `torch._dynamo` takes seconds to import, which a script that compiles nothing should not wait for.
    script = "import sys, kernels; print('torch._dynamo' in sys.modules)"
    root = Path(kernels.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
