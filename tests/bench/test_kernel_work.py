from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench.kernel_work import Work, inductor_bytes, operation_work, transfer_work, watched_launches
from kernels import launch
from kernels.clipping import square_sums
from kernels.muon_update import momentum_newton_schulz_, muon_update_

QUERY, KEY = [2, 4, 8, 16], [2, 2, 8, 16]  # 1,024 and 512 elements


def recorded(function, name):
    """What a trace holds of the op `name` that `function` runs."""
    with torch.profiler.profile(record_shapes=True) as profiler:
        function()
    (found,) = [each for each in profiler.profiler.kineto_results.events() if each.name() == name]
    dims, types, values = found.shapes(), found.dtypes(), found.concrete_inputs()
    shown = ["" if value is None or isinstance(value, list) else str(value) for value in values]
    return {"Input Dims": dims, "Input type": types, "Concrete Inputs": shown}


@pytest.mark.parametrize(
    ("name", "multiply", "moved"),
    [
        ("aten::mm", lambda a, b, c: torch.mm(a, b), 40 + 35 + 56),
        ("aten::mm", lambda a, b, c: torch.mm(a, b, out=torch.empty(8, 7, dtype=a.dtype)), 40 + 35 + 56),
        ("aten::bmm", lambda a, b, c: torch.bmm(a.expand(3, -1, -1), b.expand(3, -1, -1)), 3 * (40 + 35 + 56)),
        ("aten::addmm", lambda a, b, c: torch.addmm(c, a, b), 40 + 35 + 56 + 7),
        ("aten::addmm", lambda a, b, c: torch.addmm(c, a, b, beta=0), 40 + 35 + 56),  # which does not read c
        (
            "aten::baddbmm",
            lambda a, b, c: torch.baddbmm(c.expand(3, 8, -1), a.expand(3, -1, -1), b.expand(3, -1, -1)),
            3 * (40 + 35 + 2 * 56),
        ),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_work_of_a_matrix_product(name, multiply, moved, dtype, size):
    factors = [torch.ones(shape, dtype=dtype) for shape in ((8, 5), (5, 7), (7,))]  # of 40 and 35; 56 in the product
    work = operation_work(name, recorded(lambda: multiply(*factors), name))
    with FlopCounterMode(display=False) as counter:
        multiply(*factors)
    assert (work.bytes, work.flops) == (size * moved, counter.get_total_flops())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("backward", "passes", "products"), [(False, 1, 2), (True, 2, 5)])
def test_work_of_attention_on_a_cpu(backward, passes, products, causal):
    name = "aten::_scaled_dot_product_flash_attention_for_cpu" + ("_backward" if backward else "")
    q, k, v = (torch.ones(shape, requires_grad=True) for shape in (QUERY, KEY, KEY))

    def attend():
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        y.sum().backward()

    work = operation_work(name, recorded(attend, name))
    assert work.bytes == 4 * passes * (2 * 1024 + 2 * 512)
    assert work.flops == products * (2 * 4 * 2 * 8 * 8 * 16) / (2 if causal else 1)


@pytest.mark.parametrize(
    ("name", "dims", "types"),
    [
        ("aten::mm", [[64, 32], [32, 16]], ["long int", "long int"]),
        ("aten::mm", [[64, 32], [32, 16], []], ["float", "float", "Scalar"]),  # into a dtype of its own
        ("aten::mul", [[64, 32], [64, 32]], ["float", "float"]),
    ],
)
def test_no_work_is_made_up_for_other_ops(name, dims, types):
    arguments = {"Input Dims": dims, "Input type": types, "Concrete Inputs": [""] * len(dims)}
    assert operation_work(name, arguments) is None


def test_no_work_is_made_up_where_the_trace_holds_no_shapes():
    assert operation_work("aten::mm", {"External id": 3}) is None


def test_no_work_is_made_up_for_attention_under_a_mask():
    name = "aten::_scaled_dot_product_efficient_attention"
    values = [(QUERY, "c10::BFloat16", ""), (KEY, "c10::BFloat16", ""), (KEY, "c10::BFloat16", "")]
    rest = [([], "Scalar", "True"), ([], "Scalar", "0."), ([], "Scalar", "False"), ([], "", "")]

    def work(mask):
        keys = ("Input Dims", "Input type", "Concrete Inputs")
        return operation_work(name, dict(zip(keys, zip(*values, mask, *rest, strict=True), strict=True)))

    assert work(([2, 4, 8, 8], "c10::BFloat16", "")) is None
    assert work(([], "", "")).flops == 2 * (2 * 4 * 2 * 8 * 8 * 16)


@pytest.mark.parametrize(
    ("category", "name", "moved"),
    [
        ("gpu_memset", "Memset (Device)", 256),
        ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 512),
        ("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", None),
    ],
)
def test_work_of_fills_and_copies(category, name, moved):
    work = transfer_work({"cat": category, "name": name, "args": {"bytes": 256}})
    assert (None if work is None else work.bytes) == moved
    assert transfer_work({"cat": category, "name": name}) is None


def test_inductor_kernels_of_one_name_and_different_work_are_not_known():
    def kernel(gigabytes, **more):
        return SimpleNamespace(inductor_meta={"kernel_num_gb": gigabytes, **more})

    forward = SimpleNamespace(triton_poi_fused_add_0=kernel(1e-6), triton_red_fused_sum_1=kernel(2e-6), torch=torch)
    backward = SimpleNamespace(
        triton_poi_fused_add_0=kernel(3e-6), triton_red_fused_sum_1=kernel(2e-6), triton_per_fused_2=kernel(None)
    )
    assert inductor_bytes([forward, backward]) == {
        "triton_poi_fused_add_0": None,
        "triton_red_fused_sum_1": pytest.approx(2000),
    }


@pytest.fixture
def triton_kernels(monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", "triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMEAR_GATE = importlib.import_module("kernels.smear_gate")  # the package's attribute of that name is the op


@pytest.mark.usefixtures("triton_kernels")
def test_launches_are_watched_and_let_go():
    x, gate = torch.randn(2, 3, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    before = SMEAR_GATE.launch
    with watched_launches() as seen:
        assert launch.launch is before  # which calls itself for tensors of another device
        y = kernels.smear_gate(x, gate)
        kernels.smear_gate(x[:1], gate)
        kernels.smear_gate(x[:0], gate)
    kernels.smear_gate(x, gate)
    assert seen == {"smear_gate_fwd_kernel": [Work(4.0 * (48 + 8 + 48)), Work(4.0 * (24 + 8 + 24))]}
    torch.testing.assert_close(y[:, 1:], (x[:, 1:] + x[:, :-1]) / 2)
    assert SMEAR_GATE.launch is before is launch.launch


@pytest.mark.usefixtures("triton_kernels")
def test_a_launch_over_a_list_counts_all_of_it():
    matrices = [torch.randn(4, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)]
    weights = [torch.randn(4, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)]
    scales = [None, torch.ones(2, device=DEVICE, requires_grad=True)]
    with watched_launches() as seen:
        kernels.quantize_int6(matrices[0])
        kernels.quantize_int6(matrices)
        _, second = kernels.cast_weights(matrices, torch.bfloat16, scales=scales)
        second.sum().backward()
        square_sums([*matrices, torch.randn(8, device=DEVICE).bfloat16()])
        muon_update_(weights, matrices, [1.0, 1.0], lr=0.1, weight_decay=0.0)
    assert seen == {
        "quantize_int6_kernel": [Work(4.0 * 32 + 32 + 2 * 4), Work(4.0 * 48 + 48 + 2 * 6)],
        "cast_weights_fwd_kernel": [Work(4.0 * 48 + 4 * 2 + 2 * 48)],
        # the upstream gradient, the matrix, its scale, and the gradient of that
        "cast_weights_bwd_kernel": [Work(2.0 * 16 + 4 * 16 + 4 * 2 + 4 * 2)],
        "square_sums_kernel": [Work(4.0 * 48 + 2 * 8)],
        "muon_update_kernel": [Work(3.0 * 4 * 48)],
    }


@pytest.mark.usefixtures("triton_kernels")
def test_products_count_their_operations():
    x, up, down = (
        torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((1, 32, 16), (64, 16), (16, 64))
    )
    with watched_launches() as seen:
        kernels.squared_relu_mlp(x, up, down)
    hidden = 2.0 * 32 * 64
    product = 2.0 * 32 * 64 * 16
    assert seen == {
        "matmul_kernel": [
            Work(x.nbytes + up.nbytes + hidden, product),
            Work(hidden + down.nbytes + x.nbytes, product),
        ]
    }
    with watched_launches() as seen:
        kernels.newton_schulz([torch.randn(130, 64, device=DEVICE), torch.randn(3, 5, device=DEVICE)], steps=2)
    # of each matrix on its short side: a triangle of X X^T, one of R R, and all of P X
    products = 2 * ((64 * 65 / 2) * 130 + (64 * 65 / 2) * 64 + 130 * 64 * 64)
    products += 2 * ((3 * 4 / 2) * 5 + (3 * 4 / 2) * 3 + 3 * 5 * 3)
    (work,) = seen["newton_schulz_kernel"]
    assert work.flops == 2 * products
    tiles = 3 + 1
    assert work.bytes == tiles * 64 * 64 * (2 if DEVICE.type == "cuda" else 4) + 2 * (130 * 64 + 3 * 5)


@pytest.mark.usefixtures("triton_kernels")
def test_muon_counts_gradients_and_momenta():
    matrices = [torch.randn(4, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)]
    buffers = [torch.zeros_like(matrix) for matrix in matrices]
    with watched_launches() as seen:
        momentum_newton_schulz_(buffers, matrices, momentum=0.9, nesterov=True)
    (start,), (scale,) = seen["start_kernel"], seen["scale_kernel"]
    padded = 2 * 64 * 64 * (2 if DEVICE.type == "cuda" else 4)
    assert start == Work(4.0 * 48 * 3 + padded)
    parts = 2 * (8 if DEVICE.type == "cuda" else 1)
    assert scale == Work(8.0 * parts + 4 * 2)


def test_launches_are_let_go_after_an_error():
    before = SMEAR_GATE.launch
    with pytest.raises(KeyError), watched_launches():
        assert SMEAR_GATE.launch is not before
        raise KeyError
    assert SMEAR_GATE.launch is before
