from __future__ import annotations

import json

import pytest

from bench import report
from bench.baseline import baseline_path
from bench.results_file import read_results

ENVIRONMENT = {"gpu": "Some GPU", "driver": "1.2", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12"}
CEILINGS = {"bytes_per_second": 4e12, "flops_per_second": 700e12}


def row(name="smear_gate", part="forward", provider="triton", median=1e-4, fraction=0.5, **changes):
    """One entry of a results file, its test named after what it is of."""
    info = {
        "suite": "op", "name": name, "shape": "1x2", "dtype": "bfloat16", "part": part, "provider": provider,
        "p20": median, "p80": median, "host_seconds": 1e-5, "peak_bytes": 0, "bytes_moved": 1.0, "flops": 0.0,
        "tokens_per_second": None, "bytes_per_second": 2e12, "flops_per_second": None,
        "fraction_of_ceiling": fraction, "speedups": {}, "equivalence": "passed", **changes,
    }  # fmt: skip
    return {
        "fullname": f"bench/test_ops.py::test_op[{name}-{part}-{provider}]",
        "extra_info": info,
        "stats": {"median": median},
    }


def write(path, rows):
    content = {"machine_info": ENVIRONMENT, "commit": "abcdef0123456", "ceilings": CEILINGS, "benchmarks": rows}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def results(tmp_path):
    steps = [
        row("training step", "whole step", "auto", median=0.01 * n, suite="step", tokens_per_second=1e6 * n)
        for n in (1, 2)
    ]
    for number, step in enumerate(steps):
        step["fullname"] = f"bench/test_step.py::test_step_of_tokens[{number}]"
    return write(
        tmp_path / "results.json",
        [
            row("quantize_int6", median=2e-5, fraction=0.9, speedups={"compile": 0.8, "eager": 3.0, "copy": 0.95}),
            row("smear_gate", median=1e-4, fraction=0.5, speedups={"compile": 1.25}),
            row("smear_gate", provider="compile", median=1.25e-4, fraction=0.4),
            row("input_stage", median=1e-3, fraction=0.99),
            *steps,
        ],
    )


def section(page: str, title: str) -> list[str]:
    return page.split(f"## {title}\n\n")[1].split("\n\n##", maxsplit=1)[0].splitlines()


def test_what_loses_the_most_time_comes_first(results):
    page = report.render(read_results(results), None, None)
    assert "Some GPU, driver 1.2, torch 2.11.0, triton 3.6.0" in page
    lines = section(page, "Where time is left")[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "training step 1x2", "training step 1x2", "smear_gate 1x2", "input_stage 1x2", "quantize_int6 1x2",
    ]  # fmt: skip
    assert lines[2] == "| smear_gate 1x2 | forward | 100 us | 50 us | 50% | compile 1.25x |  |"
    assert lines[4].endswith("| eager 3.00x | compile (1.25x as long) |")


def test_changes_since_a_baseline_are_told_as_times_and_as_shares(results, tmp_path):
    before = write(
        tmp_path / "before.json",
        [row("smear_gate", median=8e-5, fraction=0.6), row("input_stage", median=1.04e-3, fraction=0.97)],
    )
    page = report.render(read_results(results), read_results(before), None)
    lines = section(page, "Since the baseline")
    assert lines[0].startswith("Against before.json (Some GPU")
    assert lines[0].endswith(": 1 of 2 rows moved by more than 5%.")
    assert lines[-1] == "| test_op[smear_gate-forward-triton] | 80 us | 100 us | +25.0% | 60.0% to 50.0% |"


def test_the_page_and_its_pictures_are_written(results, tmp_path, capsys):
    profile = tmp_path / "profile.json"
    stages = [
        {"stage": stage, "category": category, "seconds": 0.01}
        for stage in ("forward", "backward")
        for category in ("attention", "matmul")
    ]
    profile.write_text(json.dumps({"versions": ENVIRONMENT, "stages": stages}))
    output = tmp_path / "out"
    assert report.main([str(results), f"--profile={profile}", f"--output={output}"]) == 0
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"roofline.png", "breakdown.png", "tokens.png"}
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (output / "report.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| forward | attention | 10 ms | 25.0% |" in page
    assert all(f"]({name})" in page for name in pictures)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"benchmarks": [], "machine_info": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    assert f"{path} is no results file of `pytest bench/`" in capsys.readouterr().err


def test_a_missing_file_names_the_command_that_makes_it(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert f"pytest bench/ --benchmark-json={tmp_path / 'none.json'}" in capsys.readouterr().err


def test_a_profile_of_something_else_is_refused(results, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"stages": [{"stage": "forward"}]}')
    assert report.main([str(results), f"--profile={tmp_path / 'other.json'}"]) == 2
    assert "is no profile.json: KeyError 'category'" in capsys.readouterr().err


def test_a_baseline_is_named_after_gpu_and_versions():
    found = {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "triton": "3.6.0"}
    assert baseline_path(found).name == "NVIDIA-H200-torch2.11.0-cu130-triton3.6.0.json"
    assert baseline_path({**found, "gpu": None, "triton": None}).name == "CPU-torch2.11.0-cu130-triton-none.json"


def test_the_roofline_shows_each_op_at_the_models_shape():
    shapes = [("a", "2x3", "forward"), ("a", "2x3", "backward"), ("a", "4x3", "forward"), ("a", "4x3", "backward")]
    shapes += [
        ("a", "2x3+skip", "forward"),
        ("a", "4x3+skip", "forward"),
        ("b", "7", "forward"),
        ("b", "model", "forward"),
    ]
    rows = [dict(zip(("name", "shape", "part"), each, strict=True), provider=by) for each in shapes for by in "xy"]
    shown = {(row["name"], row["shape"], row["part"], row["provider"]) for row in report.of_the_model(rows)}
    kept = [("a", "4x3", "forward"), ("a", "4x3", "backward"), ("a", "4x3+skip", "forward"), ("b", "model", "forward")]
    assert shown == {(*each, by) for each in kept for by in "xy"}
