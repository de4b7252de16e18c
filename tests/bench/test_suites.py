"""`pytest bench/` as its users run it: results files, regressions, wrong kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from golfmodel.runtime.versions import PROJECT_ROOT

ROW = "pack_int6-384x128-int8-forward"
# Taken by pytest before it collects: what a change to the op would do.
SLOWED = """
import time
from kernels import reference

right = reference.pack_int6

def pack_int6(**arguments):
    time.sleep(0.05)
    return right(**arguments)

reference.pack_int6 = pack_int6
"""
WRONG = """
import kernels

right = kernels.pack_int6

def pack_int6(**arguments):
    return right(**arguments) ^ 1

kernels.pack_int6 = pack_int6
"""


def run_bench(tmp_path: Path, *arguments: str, change: str = "", **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / "change.py").write_text(change)
    command = [sys.executable, "-m", "pytest", "bench/", "-p", "change", "-p", "no:cacheprovider", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in {"TRITON_INTERPRET", "GOLF_KERNELS"}}
    return subprocess.run(
        command,
        cwd=PROJECT_ROOT,
        env={**inherited, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    """A results file of two rows."""
    directory = tmp_path_factory.mktemp("baseline")
    elsewhere = (
        f"import bench.baseline, pathlib\nbench.baseline.DIRECTORY = pathlib.Path({str(directory)!r}, 'baselines')"
    )
    result = run_bench(directory, "-k", ROW, "--record-baseline", change=elsewhere)
    assert result.returncode == 0, result.stdout
    [path] = (directory / "baselines").iterdir()
    assert path.match("CPU-torch*-triton*.json")
    assert "There is no GPU here" in result.stdout
    assert "| pack_int6 384x128 int8 | forward | eager |" in result.stdout
    return path


def test_a_results_file_names_versions_ceilings_and_everything_of_a_row(baseline):
    content = json.loads(baseline.read_text())
    assert {"torch", "triton", "gpu", "driver"} <= content["machine_info"].keys()
    assert "node" not in content["machine_info"]  # the host's name is nobody's business
    assert content["ceilings"]["bytes_per_second"] > 0
    assert "commit" in content
    rows = {row["extra_info"]["provider"]: row for row in content["benchmarks"]}
    assert rows.keys() == {"eager", "copy"}
    info, stats = rows["eager"]["extra_info"], rows["eager"]["stats"]
    assert stats["rounds"] == 20
    assert "data" not in stats
    assert stats["min"] <= info["p20"] <= stats["median"] <= info["p80"] <= stats["max"]
    assert info["bytes_per_second"] == pytest.approx(384 * 128 * 1.75 / stats["median"])
    fraction = info["bytes_per_second"] / content["ceilings"]["bytes_per_second"]
    assert info["fraction_of_ceiling"] == pytest.approx(fraction)


def test_a_pytest_benchmark_that_could_not_write_the_baseline_is_refused_before_anything_runs(tmp_path):
    old = "import pytest_benchmark\npytest_benchmark.__version__ = '5.2.3'"
    result = run_bench(tmp_path, "-k", ROW, "--record-baseline", change=old)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--record-baseline needs pytest-benchmark 5.3 or newer; this is 5.2.3" in result.stdout + result.stderr


def test_an_unchanged_commit_passes_the_regression_check(baseline, tmp_path):
    # Other work on this machine moves times by more than the 10% of a quiet one, and the copy's 6 us by anything.
    compare = f"--benchmark-compare={baseline}"
    result = run_bench(tmp_path, "-k", f"{ROW}-eager", compare, "--benchmark-compare-fail=median:1000%")
    assert result.returncode == 0, result.stdout


def test_a_slowed_op_fails_the_regression_check(baseline, tmp_path):
    compare = f"--benchmark-compare={baseline}"
    selection = ("-k", f"{ROW}-eager")
    result = run_bench(tmp_path, *selection, compare, "--benchmark-compare-fail=median:1000%", change=SLOWED)
    assert result.returncode != 0
    assert "Performance has regressed" in result.stdout + result.stderr
    assert f"{ROW}-eager" in result.stdout + result.stderr


def test_a_wrong_kernel_fails_and_gets_no_speedup(tmp_path):
    selection = ("-k", ROW)
    right = run_bench(tmp_path, *selection, TRITON_INTERPRET="1")
    assert right.returncode == 0, right.stdout
    line = next(line for line in right.stdout.splitlines() if "| triton |" in line)
    assert "eager 0." in line
    assert "not said" not in line

    wrong = run_bench(tmp_path, *selection, change=WRONG, TRITON_INTERPRET="1")
    assert wrong.returncode == 1
    line = next(line for line in wrong.stdout.splitlines() if "| triton |" in line)
    assert "not said: failed: pack_int6 [" in line
    assert "eager" not in line
