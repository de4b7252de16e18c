from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from golfmodel.runtime.versions import PROJECT_ROOT
from kernels import newton_schulz_plan


@pytest.fixture
def compiled() -> Iterator[Callable]:
    """Compiles a function as one graph, without changing its arithmetic; a graph break is an error."""
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    torch.compiler.reset()


@pytest.fixture
def compiled_by_default(device: torch.device) -> Iterator[Callable]:
    """Compiles a function as users do: with Inductor on a GPU. A CPU may lack the compiler that Inductor needs."""
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    yield lambda function: torch.compile(function, fullgraph=True, backend=backend)
    torch.compiler.reset()


@pytest.fixture(params=["reference", "triton"])
def every_implementation(request: pytest.FixtureRequest) -> None:
    """Runs a test once on the reference and once on the kernels."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    else:
        request.getfixturevalue("monkeypatch").setenv("GOLF_KERNELS", "reference")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Memory comes filled with NaN, or the largest integer: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill_before


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Has every later call of Newton-Schulz take large tiles."""

    def take() -> None:
        monkeypatch.setattr(newton_schulz_plan, "FEW", 0)
        newton_schulz_plan.plan_of.cache_clear()

    yield take
    newton_schulz_plan.plan_of.cache_clear()


class Compiled(NamedTuple):
    """What a kernel needs, and what its machine code has."""

    shared_memory: int  # bytes
    products: int  # instructions of Hopper's tensor cores
    spills: int  # instructions that move registers to memory


@pytest.fixture(scope="session")
def compiled_newton_schulz() -> dict[tuple[str, int], Compiled]:
    """By kernel and architecture."""
    pytest.importorskip("triton", "3.6", reason="what one of the kernels is written in comes with Triton 3.6")
    command = [sys.executable, "tests/kernels/compiled_newton_schulz.py"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = map(str.split, done.stdout.splitlines())
    return {(name, int(architecture)): Compiled(*map(int, figures)) for name, architecture, *figures in lines}
