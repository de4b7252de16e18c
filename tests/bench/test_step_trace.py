from __future__ import annotations

import pytest

from bench.ceilings import Ceilings
from bench.kernel_work import Work
from bench.step_trace import analyse

MACHINE = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)

PYTHON, AUTOGRAD = 100, 200  # threads of the host
ADAM = "void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>(int)"
PRODUCT = "nvjet_tst_128x64_64x5_1x2_h_bz_coopB_TNT"
SPLIT = "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>(int)"
FLASH, FLASH_DOT, FLASH_BACKWARD = (
    f"void pytorch_flash::{name}<Flash_traits<64, 128>>(Flash_params)"
    for name in ("flash_fwd_kernel", "flash_bwd_dot_do_o_kernel", "flash_bwd_dq_dk_dv_loop_kernel")
)

QUERY, KEY = [2, 4, 8, 16], [2, 2, 8, 16]  # 1,024 and 512 elements
ATTENTION_ARGUMENTS = {
    "Input Dims": [QUERY, KEY, KEY, [], [], [], []],
    "Input type": ["c10::BFloat16"] * 3 + ["Scalar", "Scalar", "Scalar", ""],
    "Concrete Inputs": ["", "", "", "0.", "True", "False", ""],
}
ATTENTION_BACKWARD_ARGUMENTS = {
    "Input Dims": [QUERY, QUERY, KEY, KEY, QUERY, [2, 4, 8], [], [], [], [], [], [], [], [], []],
    "Input type": ["c10::BFloat16"] * 5 + ["float", "", "", *["Scalar"] * 4, "long int", "long int", ""],
    "Concrete Inputs": [*[""] * 8, "8", "8", "0.", "True", "", "", ""],
}
PRODUCT_ARGUMENTS = {
    "Input Dims": [[64, 32], [32, 16]],
    "Input type": ["c10::BFloat16", "c10::BFloat16"],
    "Concrete Inputs": ["", ""],
}


def event(category, name, ts, dur, tid, **arguments):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": arguments}


def step_on_a_gpu(begin, first):
    """A step as torch.profiler writes it down; its kernels run while the host has long gone on. `first` correlation.

    begin to begin + 300: forward, backward and optimizers, 100 microseconds each on the host. The kernels take
    10 + 2 + 4 + 6 + 8, 12 + 3 + 1, 5 + 1 microseconds from begin + 150 on, 100 microseconds from end to end.
    """

    def launch_at(ts, number, thread=PYTHON, category="cuda_runtime", name="cudaLaunchKernelExC"):
        return event(category, name, begin + ts, 2, thread, correlation=first + number)

    def ran(name, ts, dur, number, category="kernel", **arguments):
        return event(category, name, begin + ts, dur, 7, correlation=first + number, stream=7, **arguments)

    def op(name, ts, dur, thread=PYTHON, **arguments):
        return event("cpu_op", name, begin + ts, dur, thread, **{"External id": first + 1000 + ts, **arguments})

    driver = {"category": "cuda_driver", "name": "cuLaunchKernelEx"}
    return [
        *(
            event("user_annotation", name, begin + 100 * number, 99, PYTHON)
            for number, name in enumerate(("forward", "backward", "optimizers"))
        ),
        *(
            event("gpu_user_annotation", name, begin + 400 + 100 * number, 99, 7)
            for number, name in enumerate(("forward", "backward", "optimizers"))
        ),
        op("CompiledFunction", 1, 95),
        op("aten::mm", 5, 20, **PRODUCT_ARGUMENTS),
        launch_at(10, 1),
        launch_at(15, 2),
        op("triton_poi_fused_add_0", 30, 5, kernel_num_gb=3e-6),
        launch_at(31, 3, **driver),
        op("golf::smear_gate", 40, 10),
        launch_at(42, 4, **driver),
        op("aten::_scaled_dot_product_flash_attention", 60, 20, **ATTENTION_ARGUMENTS),
        op("aten::_flash_attention_forward", 61, 15),
        launch_at(65, 5),
        op("aten::_scaled_dot_product_flash_attention_backward", 110, 40, AUTOGRAD, **ATTENTION_BACKWARD_ARGUMENTS),
        launch_at(115, 6, AUTOGRAD, name="cudaMemsetAsync"),
        launch_at(120, 7, AUTOGRAD),
        launch_at(130, 8, AUTOGRAD),
        op("aten::_foreach_mul_", 210, 20),
        launch_at(212, 9),
        launch_at(240, 10, name="cudaMemcpyAsync"),
        ran(PRODUCT, 150, 10, 1),
        ran(SPLIT, 160, 2, 2),
        ran("triton_poi_fused_add_0", 170, 4, 3),
        ran("smear_gate_fwd_kernel", 175, 6, 4),
        ran(FLASH, 190, 8, 5),
        ran("Memset (Device)", 200, 1, 6, "gpu_memset", bytes=256),
        ran(FLASH_DOT, 201, 3, 7),
        ran(FLASH_BACKWARD, 210, 12, 8),
        ran(ADAM, 230, 5, 9),
        ran("Memcpy DtoD (Device -> Device)", 249, 1, 10, "gpu_memcpy", bytes=1000),
        {"ph": "s", "id": first + 1, "cat": "ac2g", "name": "ac2g", "pid": 1, "tid": PYTHON, "ts": begin + 10},
    ]


# The second follows while the kernels of the first are still running.
TRACE = [
    {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}},
    *step_on_a_gpu(1000.0, 0),
    *step_on_a_gpu(1300.0, 100),
]
LAUNCHES = {"smear_gate_fwd_kernel": [Work(4000.0)]}
INDUCTOR = {"triton_poi_fused_add_0": 2500.0}


@pytest.fixture
def rows():
    """By kernel."""
    return {row.kernel: row for row in analyse(TRACE, MACHINE, LAUNCHES, INDUCTOR).rows}


def test_a_kernel_belongs_to_the_stage_that_launched_it_and_is_of_a_kind(rows):
    assert {name: (row.stage, row.category) for name, row in rows.items()} == {
        PRODUCT: ("forward", "matmul"),
        SPLIT: ("forward", "matmul"),
        "triton_poi_fused_add_0": ("forward", "Inductor"),
        "smear_gate_fwd_kernel": ("forward", "Triton"),
        FLASH: ("forward", "attention"),
        "Memset (Device)": ("backward", "attention"),
        FLASH_DOT: ("backward", "attention"),
        FLASH_BACKWARD: ("backward", "attention"),
        ADAM: ("optimizers", "other"),
        "Memcpy DtoD (Device -> Device)": ("optimizers", "other"),
    }


def test_times_are_those_of_one_step(rows):
    assert all(row.calls == 1 for row in rows.values())
    assert rows[PRODUCT].seconds == pytest.approx(10e-6)
    assert rows[FLASH_BACKWARD].share == pytest.approx(12 / 52)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert list(rows)[:2] == [FLASH_BACKWARD, PRODUCT]


def test_idle_time_is_what_kernels_do_not_cover():
    found = analyse(TRACE, MACHINE, {}, {})
    assert found.kernel_seconds == pytest.approx(52e-6)
    assert found.span_seconds == pytest.approx(100e-6)
    assert found.idle_seconds == pytest.approx(48e-6)


def test_kernels_that_run_side_by_side_cover_their_time_once():
    beside = [event("cuda_runtime", "cudaLaunchKernel", 1003.0, 1, PYTHON, correlation=50)]
    beside.append(event("kernel", "void copy<float>(float*)", 1155.0, 10, 8, correlation=50))  # 5 of it alone
    found = analyse([*step_on_a_gpu(1000.0, 0), *beside], MACHINE, {}, {})
    assert found.kernel_seconds == pytest.approx(62e-6)
    assert found.idle_seconds == pytest.approx(45e-6)  # 2 of those 5 had the split's sum


def test_what_kernels_have_to_do(rows):
    product = rows[PRODUCT]
    assert (product.bytes, product.flops) == (2 * (64 * 32 + 32 * 16 + 64 * 16), 2 * 64 * 32 * 16)
    assert product.fraction == pytest.approx(product.bytes / 1e9 / 10e-6)
    forward = rows[FLASH]
    assert (forward.bytes, forward.flops) == (2 * (2 * 1024 + 2 * 512), 2 * (2 * 4 * 2 * 8 * 8 * 16) / 2)
    backward = rows[FLASH_BACKWARD]
    assert (backward.bytes, backward.flops) == (2 * (4 * 1024 + 4 * 512), 5 * (2 * 4 * 2 * 8 * 8 * 16) / 2)
    assert backward.fraction == pytest.approx(12288 / 1e9 / 12e-6)
    assert (rows["triton_poi_fused_add_0"].bytes, rows["triton_poi_fused_add_0"].flops) == (2500, None)
    assert (rows["smear_gate_fwd_kernel"].bytes, rows["smear_gate_fwd_kernel"].flops) == (4000, None)
    assert rows["smear_gate_fwd_kernel"].fraction == pytest.approx(4e-6 / 6e-6)
    assert rows["Memset (Device)"].bytes == 256
    assert rows["Memcpy DtoD (Device -> Device)"].bytes == 2000
    for unknown in (SPLIT, FLASH_DOT, ADAM):
        assert (rows[unknown].bytes, rows[unknown].flops, rows[unknown].fraction) == (None, None, None)


def test_a_faster_rate_leaves_operations_to_limit():
    machine = Ceilings(bytes_per_second=1e12, flops_per_second=1e10)
    (product,) = [row for row in analyse(TRACE, machine, {}, {}).rows if row.kernel == PRODUCT]
    assert product.fraction == pytest.approx(65536 / 1e10 / 10e-6)


def test_where_a_name_says_too_little_the_launch_of_an_inductor_kernel_does():
    (row,) = [row for row in analyse(TRACE, MACHINE, {}, {}).rows if row.kernel.startswith("triton_")]
    assert row.bytes == pytest.approx(3000)


@pytest.mark.parametrize("launches", [[Work(4000.0), Work(100.0)], []])
def test_launches_that_do_not_match_the_trace_leave_bytes_unknown(launches):
    found = analyse(TRACE, MACHINE, {"smear_gate_fwd_kernel": launches}, {})
    (row,) = [row for row in found.rows if row.kernel == "smear_gate_fwd_kernel"]
    assert (row.category, row.bytes, row.fraction) == ("Triton", None, None)


def test_launches_of_one_kernel_are_told_apart_by_their_order():
    """In the forward with 1,000 bytes, in the backward with 300: whatever order the trace lists them in."""

    def twice(begin, first):
        return [
            event("kernel", "twice_kernel", begin + 180, 2, 7, correlation=first + 2),
            event("kernel", "twice_kernel", begin + 160, 4, 7, correlation=first + 1),
            event("cuda_driver", "cuLaunchKernel", begin + 150, 1, AUTOGRAD, correlation=first + 2),
            event("cuda_driver", "cuLaunchKernel", begin + 50, 1, PYTHON, correlation=first + 1),
            *(
                event("user_annotation", name, begin + 100 * number, 99, PYTHON)
                for number, name in enumerate(("forward", "backward"))
            ),
        ]

    found = analyse([*twice(0.0, 0), *twice(200.0, 10)], MACHINE, {"twice_kernel": [Work(1000.0), Work(300.0)]}, {})
    assert {row.stage: row.bytes for row in found.rows} == {"forward": 1000, "backward": 300}


def test_a_kernel_without_a_launch_in_the_trace_is_found_by_its_op_or_lies_outside():
    lost = [
        event("kernel", "void lost<float>(int)", 1200.0, 3, 7, correlation=77),
        event("kernel", "void known<float>(int)", 1210.0, 3, 7, correlation=78, **{"External id": 1005}),
    ]
    stages = {row.kernel: row.stage for row in analyse([*step_on_a_gpu(1000.0, 0), *lost], MACHINE, {}, {}).rows}
    assert stages["void lost<float>(int)"] == "outside"
    assert stages["void known<float>(int)"] == "forward"


def test_stages_sum_up_their_kernels():
    found = analyse(TRACE, MACHINE, LAUNCHES, {})
    spent = [(entry["stage"], entry["category"], round(1e6 * entry["seconds"], 6)) for entry in found.stages]
    assert spent == [
        ("forward", "attention", 8),
        ("forward", "matmul", 12),
        ("forward", "Triton", 6),
        ("forward", "Inductor", 4),
        ("backward", "attention", 16),
        ("optimizers", "other", 6),
    ]


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("triton_tem_fused_flex_attention_2", "attention"),
        ("triton_tem_fused_mm_1", "matmul"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_mm_3", "Inductor"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void at::native::elementwise_kernel<128, 4>(int)", "other"),
    ],
)
def test_kinds_of_kernels_that_no_op_launched(kernel, category):
    trace = [
        event("user_annotation", "forward", 0.0, 9, PYTHON),
        event("cuda_runtime", "cudaLaunchKernel", 1.0, 1, PYTHON, correlation=1),
        event("kernel", kernel, 5.0, 3, 7, correlation=1),
    ]
    assert analyse(trace, MACHINE, {}, {}).rows[0].category == category


def test_on_a_cpu_ops_count_with_the_time_they_spend_themselves():
    trace = [
        event("user_annotation", "forward", 0.0, 50, PYTHON),
        event("cpu_op", "aten::linear", 5.0, 40, PYTHON),
        event("cpu_op", "aten::mm", 10.0, 30, PYTHON, **PRODUCT_ARGUMENTS),
        event("cpu_op", "aten::resolve_conj", 12.0, 1, PYTHON),
        event("cpu_op", "aten::add", 47.0, 2, PYTHON),
        event("cpu_op", "aten::detach", 60.0, 3, PYTHON),
    ]
    found = analyse(trace, MACHINE, {}, {})
    assert {row.kernel: (row.stage, round(1e6 * row.seconds, 6), row.bytes) for row in found.rows} == {
        "aten::linear": ("forward", 10, None),
        "aten::mm": ("forward", 29, 2 * (64 * 32 + 32 * 16 + 64 * 16)),
        "aten::resolve_conj": ("forward", 1, None),
        "aten::add": ("forward", 2, None),
        "aten::detach": ("outside", 3, None),
    }
    assert found.span_seconds == pytest.approx(44e-6)
    assert found.idle_seconds == pytest.approx(2e-6)


def test_a_trace_without_a_step_is_refused():
    with pytest.raises(ValueError, match="'forward'"):
        analyse([event("cpu_op", "aten::add", 0.0, 1, PYTHON)], MACHINE, {}, {})
