from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from bench import tune
from bench.subjects import Subject, subjects
from bench.timing import Times
from golfmodel.runtime.errors import ConfigError
from kernels import quantize_int6, smear_gate, tuning
from kernels.cases import CASES
from kernels.testing import tensors_of
from kernels.tuning import WHOLE_ROW, Product, Shape

CPU = torch.device("cpu")
LINE = Product(128, 256, 64, 8, 4, 1, flatten=True)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuning, "MEASURED", {key: dict(lines) for key, lines in tuning.MEASURED.items()})
    tune._forget()
    yield
    tune._forget()


@pytest.fixture
def small(monkeypatch) -> Subject:
    """smear_gate on a few numbers, every timing of which takes a millisecond."""
    monkeypatch.setattr(tune, "interleaved", lambda functions, **_: {name: Times((1e-3,), 0, 0) for name in functions})
    [subject] = [each for each in subjects(on_gpu=False) if each.op == "smear_gate"]
    case = next(case for case in CASES if case.name == "smear_gate")
    return dataclasses.replace(subject, draw=functools.partial(case.draw, (1, 2, 8), torch.float32))


@pytest.mark.parametrize("line", [LINE, Shape(1024, 512, 256), Shape(1024, WHOLE_ROW, 1)])
def test_others_differ_in_one_field(line):
    for field in line._fields:
        for other in tune.others_of(line, field):
            assert [name for name in line._fields if getattr(line, name) != getattr(other, name)] == [field]


def test_which_others_there_are():
    assert tune.others_of(LINE, "flatten") == [LINE._replace(flatten=False)]
    assert tune.others_of(LINE, "rows") == [LINE._replace(rows=64), LINE._replace(rows=256)]
    whole = Shape(1024, WHOLE_ROW, 1)
    assert tune.others_of(whole, "elements") == [whole._replace(elements=512), whole._replace(elements=2048)]
    assert tune.others_of(whole, "per_warp") == [whole._replace(per_warp=2)]
    assert tune.others_of(whole, "max_columns") == []


def test_the_way_down_ends_at_the_fastest_of_its_neighbours():
    best = Product(64, 128, 128, 4, 2, 2, flatten=False)

    def cost(line: Product) -> float:
        return 1.0 + sum(a != b for a, b in zip(line, best, strict=True))

    found, moves = tune.descend(LINE, lambda ours, theirs: (cost(ours), cost(theirs)))
    assert found == best
    product = 1.0
    for move in moves:
        product *= move
    assert product == pytest.approx(cost(best) / cost(LINE))


def test_what_is_no_faster_than_noise_or_does_not_run_is_left():
    assert tune.descend(LINE, lambda *_: (1.0, 0.995)) == (LINE, [])
    assert tune.descend(LINE, lambda *_: (1.0, float("inf"))) == (LINE, [])


def test_the_kernels_of_a_call_are_those_it_looks_up(interpreted):
    x, gate = torch.randn(2, 3, 8, requires_grad=True), torch.zeros(8)
    before = tuning.MEASURED[9, 0]
    assert tune.kernels_of(lambda: smear_gate(x, gate)) == {"smear_gate_fwd": before["smear_gate_fwd"]}
    backward = tune.kernels_of(lambda: smear_gate(x, gate).sum().backward())
    assert set(backward) == {"smear_gate_fwd", "smear_gate_bwd", "column_sums"}
    assert tuning.MEASURED[9, 0] is before


def test_an_op_that_keeps_plans_looks_its_lines_up_anew(interpreted):
    weights = [torch.randn(3, 8), torch.randn(2, 8)]
    for argument, kernel in ((weights[0], "quantize_int6"), (weights, "quantize_int6_list")):
        quantize_int6(argument)
        assert set(tune.kernels_of(lambda argument=argument: quantize_int6(argument))) == {kernel}
        before = quantize_int6(argument)
        line = Shape(16, 8, 8)
        tune.put(kernel, line)
        assert tune.kernels_of(lambda argument=argument: quantize_int6(argument)) == {kernel: line}
        assert all(map(torch.equal, tensors_of(quantize_int6(argument)), tensors_of(before)))


def test_a_kernel_that_is_none_of_the_op_is_refused(interpreted, small):
    with pytest.raises(ConfigError, match="--kernel is nothing: smear_gate has column_sums, smear_gate_bwd"):
        tune.tune(small, ["nothing"], CPU)


def test_a_line_that_is_put_is_what_the_next_call_uses(interpreted):
    wide = Shape(4096, 8, 512)
    tune.put("smear_gate_fwd", wide)
    assert tuning.tile("smear_gate_fwd", 8, -1) == tuning.Tile(512, 8, 8)
    x, gate = torch.randn(2, 3, 8), torch.zeros(8)
    assert tune.kernels_of(lambda: smear_gate(x, gate)) == {"smear_gate_fwd": wide}


def test_every_kernel_of_an_op_gets_a_row(interpreted, small, monkeypatch):
    cost = {512: 1.0, 1024: 0.5}
    monkeypatch.setattr(tune, "_seconds", lambda _f, _s, _k, lines, _d: [cost.get(x.per_warp, 2.0) for x in lines])
    rows = tune.tune(small, ["smear_gate_fwd"], CPU)
    assert [row[:2] for row in rows] == [["forward", "smear_gate_fwd"], ["forward", "all"], ["backward", "all"]]
    assert rows[1][2:] == ["", "", "1 ms"]
    assert rows[0][3:] == ["`Shape(elements=2048, max_columns=1024, per_warp=1024, max_rows=4096)`", "50.0%"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "OP is 'nothing': must be one of add_rms_norm"),
        (["smear_gate"], "needs a GPU"),
        (["smear_gate", "--shapes"], "unrecognized arguments: --shapes"),
    ],
)
def test_what_cannot_be_tuned_is_said(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(arguments) == 2
    assert said in capsys.readouterr().err
