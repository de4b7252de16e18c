from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

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
