from __future__ import annotations

import dataclasses

import pytest
import torch

import kernels
from bench import comparison
from bench.ceilings import Ceilings
from bench.comparison import Row, compare, providers
from bench.subjects import Subject, newton_schulz_flops, subjects
from bench.table import duration, markdown
from bench.timing import Times
from kernels import tuning
from kernels.testing import tensors_of

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e12)


@pytest.fixture(autouse=True)
def forget_verdicts(monkeypatch):
    monkeypatch.setattr(comparison, "_verdicts", {})


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GOLF_KERNELS", "auto")
    yield
    tuning.tile.cache_clear()


def subject_of(op: str) -> Subject:
    """The first, of those on the model's matrices only where there is no other."""
    found = [subject for subject in subjects(on_gpu=False) if subject.op == op]
    return min(found, key=lambda subject: "model" in subject.shape)


def test_every_op_is_a_subject():
    for on_gpu in (False, True):
        assert {subject.op for subject in subjects(on_gpu=on_gpu)} == set(kernels.__all__)
        labels = [subject.label for subject in subjects(on_gpu=on_gpu)]
        assert len(set(labels)) == len(labels)


def test_the_seed_model_has_its_matrices_in_one_call():
    found = {subject.op: subject for subject in subjects(on_gpu=True) if "model" in subject.shape}
    trained = found["newton_schulz"]
    assert len(trained.draw(CPU, 0)["matrices"]) == 49
    assert 200e9 < trained.flops < 260e9
    weights = found["quantize_int6"].draw(CPU, 0)["weight_RC"]
    assert len(weights) == 48
    assert sum(weight.numel() for weight in weights) == 18_874_368
    casts = found["cast_weights"].draw(CPU, 0)
    assert len(casts["matrices"]) == 49
    assert sum(scale is not None for scale in casts["scales"]) == 16


def test_flops_of_newton_schulz_count_the_short_side():
    assert newton_schulz_flops(2, 3, steps=1) == 2 * 2 * 2 * 3 + 2 * 2 * 2 * 2 + 2 * 2 * 2 * 3
    assert newton_schulz_flops(3, 2) == newton_schulz_flops(2, 3)


def test_without_a_kernel_that_runs_there_is_no_triton_row(monkeypatch):
    subject = subject_of("smear_gate")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert providers(subject, CPU) == ["eager", "copy"]
    assert providers(subject, torch.device("cuda")) == ["triton", "compile", "eager", "copy"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert providers(subject, CPU) == ["triton", "eager", "copy"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bytes_are_inputs_once_and_outputs_once(direction):
    subject = subject_of("smear_gate")
    arguments = subject.draw(CPU, 0)
    x, gate = arguments["x_BTD"].nbytes, arguments["gate_D"].nbytes
    rows = compare(subject, direction, CPU, CEILINGS, rounds=2)
    wanted = 2 * x + gate if direction == "forward" else x + gate + x + x + gate
    assert {row.bytes_moved for row in rows.values()} == {wanted}
    eager = rows["eager"]
    assert eager.fraction == pytest.approx(wanted / 1e10 / eager.times.median)


def test_what_is_alike_in_a_backward_pass_counts_once():
    """Of x + y and its norm: two gradients and the sum are read, one gradient is written."""
    subject = subject_of("add_rms_norm")
    rows = compare(subject, "backward", CPU, CEILINGS, rounds=2)
    assert {row.bytes_moved for row in rows.values()} == {4 * subject.draw(CPU, 0)["x_BTD"].nbytes}


def test_a_cast_reads_its_upstream_gradients_and_the_weights_with_a_scale_in_a_backward_pass():
    subject = subject_of("cast_weights")
    arguments = subject.draw(CPU, 0)
    rows = compare(subject, "backward", CPU, CEILINGS, rounds=2)
    wanted = 0
    for matrix, scale in zip(arguments["matrices"], arguments["scales"], strict=True):
        wanted += (2 + 4) * matrix.numel()
        if scale is not None:
            wanted += 4 * matrix.numel() + 8 * len(scale)
    assert {row.bytes_moved for row in rows.values()} == {wanted}


def test_backward_times_gradients_of_every_differentiable_input():
    """From an output that is there already: as often as it is asked, and of different inputs in turn."""
    subject = subject_of("bigram_hash_embed")
    assert subject.differentiable
    gradients, _ = comparison._backward(subject, subject.definition, [subject.draw(CPU, seed) for seed in (0, 1)])
    first, second, again = gradients(0), gradients(1), gradients(0)
    assert len(first) == len(subject.differentiable)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], again[0])


def test_a_right_kernel_gets_its_speedup(interpreted):
    rows = compare(small(subject_of("pack_int6")), "forward", CPU, CEILINGS, rounds=2)
    ours = rows["triton"]
    assert ours.equivalence == "passed"
    assert ours.speedups == {
        name: pytest.approx(rows[name].times.median / ours.times.median) for name in ("eager", "copy")
    }
    assert f"eager {ours.speedups['eager']:.2f}x" in markdown([ours.info() | {"median": ours.times.median}])
    assert not any(row.speedups for name, row in rows.items() if name != "triton")


def test_a_wrong_kernel_loses_its_speedup(interpreted, monkeypatch):
    right = kernels.pack_int6
    monkeypatch.setattr(kernels, "pack_int6", lambda **arguments: right(**arguments) ^ 1)
    rows = compare(small(subject_of("pack_int6")), "forward", CPU, CEILINGS, rounds=2)
    ours = rows["triton"]
    assert ours.equivalence.startswith("failed: pack_int6")
    assert ours.speedups == {}
    printed = markdown([ours.info() | {"median": ours.times.median}])
    assert "not said: failed: pack_int6" in printed
    assert "x |" not in printed


def test_a_wrong_list_call_is_found(interpreted, monkeypatch):
    subject = next(s for s in subjects(on_gpu=False) if s.op == "quantize_int6" and "model" in s.shape)
    assert comparison.equivalence(subject, CPU) == "passed"
    comparison._verdicts.clear()
    shifted = dataclasses.replace(
        subject, check=lambda device: subject.check.func(*subject.check.args[:2], wrong, subject.definition, device)
    )

    def wrong(**arguments):
        return [(codes + 1, scale) for codes, scale in subject.function(**arguments)]

    assert comparison.equivalence(shifted, CPU).startswith("failed: quantize_int6: tensor 0 of the list")


def test_the_casts_of_the_model_are_held_to_the_error_rule(interpreted, monkeypatch):
    # large tiles: the interpreter takes long to begin one
    monkeypatch.setitem(tuning.MEASURED[9, 0], "cast_weights", tuning.Shape(2**18, 512, 512))
    tuning.tile.cache_clear()
    subject = subject_of("cast_weights")
    assert comparison.equivalence(subject, CPU) == "passed"
    comparison._verdicts.clear()
    right = kernels.cast_weights
    monkeypatch.setattr(kernels, "cast_weights", lambda **arguments: [1.05 * y for y in right(**arguments)])
    assert comparison.equivalence(subject, CPU).startswith("failed: cast_weights of the model")


def test_newton_schulz_is_held_to_the_error_rule():
    subject = next(s for s in subjects(on_gpu=False) if s.op == "newton_schulz" and "model" in s.shape)
    assert comparison.equivalence(subject, CPU) == "passed"
    comparison._verdicts.clear()
    scaled = dataclasses.replace(
        subject,
        check=lambda device: subject.check.func(
            *subject.check.args[:2], lambda matrices: [1.05 * m for m in subject.function(matrices)],
            subject.definition, device,
        ),
    )  # fmt: skip
    assert comparison.equivalence(scaled, CPU).startswith("failed: newton_schulz: matrix 0")


def small(subject: Subject) -> Subject:
    """On a few numbers, for the interpreter; the check as it is."""

    def draw(device, seed):
        return {name: value[:3] for name, value in subject.draw(device, seed).items()}

    return dataclasses.replace(subject, draw=draw)


def test_a_row_says_everything_in_si_units():
    times = Times((0.5, 1.0, 2.0), host=0.25, peak_bytes=3_000_000)
    row = Row("op", "smear_gate", "1x2", "float32", "forward", "triton", times, CEILINGS, bytes_moved=5e9)
    found = row.info()
    assert found["bytes_per_second"] == 5e9
    assert found["fraction_of_ceiling"] == 0.5
    assert found["flops_per_second"] is None
    assert found["host_seconds"] == 0.25
    line = markdown([found | {"median": 1.0}]).splitlines()[-1]
    assert line == (
        "| smear_gate 1x2 float32 | forward | triton | 1 s | 700 ms to 1.6 s | 5 GB/s | 50% | 250 ms | 3.0 MB |  |"
    )


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (2.3e-6, "2.3 us"), (1234.5, "1,234 s")],
)
def test_durations(seconds, wanted):
    assert duration(seconds) == wanted


def test_tensors_are_found_wherever_they_are():
    a, b, c = (torch.zeros(n) for n in (1, 2, 3))
    assert [t.numel() for t in tensors_of({"x": a, "y": [(b, None), "z"], "n": 3, "c": c})] == [1, 2, 3]
