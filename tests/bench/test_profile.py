from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
import torch

from bench import profile
from bench.ceilings import Ceilings
from bench.profile import main, short_name
from bench.step_trace import CATEGORIES, Row, analyse

MACHINE = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("smear_gate_fwd_kernel", "smear_gate_fwd_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("aten::mm", "aten::mm"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<T>>()",
            "multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        ),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>(int)", "splitKreduce_kernel"),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)"
            "::{lambda()#3}::operator()() const::{lambda()#7}, std::array<char*, 2ul> >(int)",
            "unrolled_elementwise_kernel<direct_copy_kernel_cuda>",
        ),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, float>(int)", "kernel"),
        (
            "triton_red_fused__fused_rms_norm__fused_rms_norm_backward__to_copy_add_mul_sum_view_41",
            "triton_red_fused__fused_rms_norm__fused_rms_norm_backw..._41",
        ),
        ("a" * 61, "a" * 57 + "..."),
    ],
)
def test_names_for_a_table(kernel, short):
    assert short_name(kernel) == short
    assert len(short) <= 60


# Of one block, 4 rows of 32 tokens, 4 heads of 16 channels.
TINY = [
    *("--preset=demo", "--device=cpu", "--compile=off", "--num-layers=1", "--model-dim=64"),
    *("--train-seq-len=32", "--train-batch-tokens=128", "--bigram-vocab-size=64"),
]


def test_a_profile_of_a_step_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile.ceilings, "measure", lambda device: MACHINE)
    assert main([*TINY, "--kernels", "reference", "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert found["config"]["num_layers"] == 1
    assert found["kernels"] == "reference"
    assert found["ceilings"] == {"bytes_per_second": 1e9, "flops_per_second": 1e10}
    assert found["tokens_per_step"] == 128
    assert found["step_seconds"] > 0
    assert found["span_seconds"] >= found["idle_seconds"] >= 0

    rows = found["rows"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["seconds"] for row in rows) == pytest.approx(found["kernel_seconds"])
    assert sum(entry["seconds"] for entry in found["stages"]) == pytest.approx(found["kernel_seconds"])
    assert {entry["stage"] for entry in found["stages"]} >= {"forward", "backward", "optimizers"}
    assert all(row.keys() == {field.name for field in dataclasses.fields(Row)} for row in rows)
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    attention = {row["stage"]: row for row in rows if row["kernel"].startswith(flash)}
    # Under the causal mask half of two products, and of five backward.
    assert attention["forward"]["flops"] == 4 * 4 * 2 * 32 * 32 * 16 * 2 / 2
    assert attention["backward"]["flops"] == 4 * 4 * 2 * 32 * 32 * 16 * 5 / 2
    (forward,) = [row for row in rows if (row["stage"], row["kernel"]) == ("forward", "aten::mm")]
    (backward,) = [row for row in rows if (row["stage"], row["kernel"]) == ("backward", "aten::mm")]
    assert backward["flops"] == 2 * forward["flops"]
    assert backward["calls"] == 2 * forward["calls"]
    widths = 64 * (64 + 32 + 32 + 64) + 2 * 64 * 192 + 64 * 1024  # the block's matrices, the head
    assert forward["flops"] == 2 * 128 * widths

    printed = capsys.readouterr()
    assert "| stage | kind | op | calls | us | share | bytes | of ceiling |" in printed.out
    assert "| backward | matmul | `aten::mm` |" in printed.out
    assert f"| {sum(row['share'] < profile.SMALL_SHARE for row in rows)} more |" in printed.out
    assert str(tmp_path / "out" / "profile.json") in printed.err
    trace = json.loads(gzip.decompress((tmp_path / "out" / "trace.json.gz").read_bytes()))
    assert analyse(trace["traceEvents"], MACHINE, {}, {}).kernel_seconds == pytest.approx(found["kernel_seconds"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernels", "triton"], "--kernels is 'triton': must be one of auto, reference"),
        (["--kernels"], "expected one argument"),
        (["--num-layer", "2"], "unknown option --num-layer; did you mean --num-layers?"),
        (["--num-layers", "0"], "NUM_LAYERS (--num-layers) is 0"),
        (["--preset", "huge"], "PRESET (--preset) is 'huge'"),
        (["--device", "gpu"], "DEVICE (--device) is 'gpu'"),
        (["--train-batch-tokens", "7"], "TRAIN_BATCH_TOKENS"),
        (["--output", "{file}"], "(--output)"),
        (["--output", "{file}/below"], "(--output)"),
    ],
)
def test_refusals_come_before_any_work(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "TrainingStep", None)
    (tmp_path / "file").touch()
    assert main([text.format(file=tmp_path / "file") for text in arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_the_environment_sets_options_as_for_a_run(monkeypatch, tmp_path):
    seen = []

    def stop(config, device, kernels):
        seen.append((config.num_layers, config.train_seq_len, device.type, kernels))
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "profile", stop)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("NUM_LAYERS", "3")
    assert main(["--output", str(tmp_path)]) == 130
    monkeypatch.setenv("PRESET", "quick")
    assert main(["--output", str(tmp_path), "--num-layers", "2", "--kernels", "reference"]) == 130
    assert seen == [(3, 256, "cpu", "auto"), (2, 2048, "cpu", "reference")]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["auto", "on"])
def test_a_profile_of_a_step_on_a_gpu(compiled, tmp_path):
    tokens = ["--train-batch-tokens", "8192", "--micro-batch-tokens", "8192"]
    assert main(["--num-layers", "1", *tokens, "--compile", compiled, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert {row["stage"] for row in found["rows"]} == {"forward", "backward", "optimizers"}
    by_inductor = {"Inductor"} if compiled == "on" else set()
    assert {row["category"] for row in found["rows"]} == set(CATEGORIES) - {"Inductor"} | by_inductor
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert found["span_seconds"] >= found["idle_seconds"] >= 0

    def known(category, of):
        rows = [row for row in found["rows"] if row["category"] == category]
        return sum(row["seconds"] for row in rows if row[of] is not None) / sum(row["seconds"] for row in rows)

    assert known("Triton", "bytes") == 1
    assert not by_inductor or known("Inductor", "bytes") > 0.9
    assert known("matmul", "flops") > 0.8
    assert known("attention", "flops") > 0.7
