"""What the suites share: the device, its ceilings, the rows measured so far, and how pytest-benchmark gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytest_benchmark
import torch

from bench import ceilings as ceilings_module
from bench.baseline import baseline_path
from bench.ceilings import Ceilings
from bench.comparison import Row
from bench.table import markdown
from bench.timing import Times
from golfmodel.runtime.versions import versions

ROWS = pytest.StashKey[list[Row]]()
CEILINGS = pytest.StashKey[Ceilings]()
RECORDS = (5, 3)  # pytest-benchmark from which on a results file is given by its path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-baseline",
        action="store_true",
        help="write the results to bench/baselines/, under the names of the GPU and the versions",
    )


def check_that_it_records(version: str) -> None:
    """Raises `pytest.UsageError` if this version of pytest-benchmark could not write the file, which it does last."""
    if tuple(map(int, version.split(".")[:2])) < RECORDS:
        needed = ".".join(map(str, RECORDS))
        raise pytest.UsageError(f"--record-baseline needs pytest-benchmark {needed} or newer; this is {version}")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    if config.option.record_baseline:
        check_that_it_records(pytest_benchmark.__version__)
        path = config.option.benchmark_json = baseline_path()
        path.parent.mkdir(exist_ok=True)
    # Our own table says more; pytest-benchmark's is worth its space where it sets a baseline beside what is now.
    if not config.option.benchmark_compare:
        config.option.benchmark_quiet = True
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Versions in place of the host's name and processor flags: pytest-benchmark warns where a baseline has others."""
    machine_info.clear()
    machine_info.update({name: value for name, value in versions().items() if name != "commit"})


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """A results file holds the run's ceilings, and what the samples say, not the samples."""
    output_json["commit"] = versions()["commit"]
    output_json["ceilings"] = vars(config.stash[CEILINGS])
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("measured")
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "There is no GPU here: these are a few small shapes on the CPU, which say nothing of the kernels' speed."
        )
    terminalreporter.write_line(markdown([row.info() | {"median": row.times.median} for row in rows]))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device, pytestconfig: pytest.Config) -> Ceilings:
    """Measured at the start of the session."""
    pytestconfig.stash[CEILINGS] = ceilings_module.measure(device)
    return pytestconfig.stash[CEILINGS]


@pytest.fixture(scope="session", autouse=True)
def automatic_dispatch() -> Iterator[None]:
    """The public ops run what users get, whatever the shell says; references are named where they are meant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLF_KERNELS", "auto")
        yield


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Hands a row to pytest-benchmark, as if that had timed it: its timer replays the samples."""

    def hand_over(row: Row) -> None:
        benchmark._timer = _Replay(row.times)
        benchmark.group = f"{row.name} {row.shape} {row.part}"
        benchmark.pedantic(lambda: None, rounds=len(row.times.samples), iterations=1, warmup_rounds=0)
        benchmark.extra_info.update(row.info())
        request.config.stash[ROWS].append(row)

    return hand_over


class _Replay:
    """A timer that is read before and after each round, and tells a sample's time apart."""

    def __init__(self, times: Times) -> None:
        self._readings = (reading for sample in times.samples for reading in (0.0, sample))

    def __call__(self) -> float:
        return next(self._readings)
