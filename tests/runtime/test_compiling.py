from __future__ import annotations

import pytest
import torch

from golfmodel.runtime import compiling
from golfmodel.runtime.compiling import compiled

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.fixture
def compiler(monkeypatch) -> list[str]:
    """The programs found on this host, as a list that a test may change; compiling only marks the function."""
    found = ["cc"]
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: ("compiled", function, options))
    return found


@pytest.mark.parametrize(("choice", "device"), [("off", GPU), ("off", CPU), ("auto", CPU)])
def test_left_as_it_is(compiler, choice, device):
    assert compiled(double, choice, device, gains=True) is double


def test_auto_leaves_what_gains_nothing(compiler):
    assert compiled(double, "auto", GPU, gains=False) is double
    assert compiled(double, "on", GPU, gains=False)[0] == "compiled"


@pytest.mark.parametrize(("choice", "device"), [("on", CPU), ("on", GPU), ("auto", GPU)])
def test_compiled_as_one_graph_of_static_shapes(compiler, choice, device):
    assert compiled(double, choice, device, gains=True) == ("compiled", double, {"fullgraph": True, "dynamic": False})


def test_auto_does_without_where_there_is_no_c_compiler(compiler):
    compiler.clear()
    with pytest.warns(UserWarning, match="no C compiler"):
        assert compiled(double, "auto", GPU, gains=True) is double
    assert compiled(double, "on", GPU, gains=True)[0] == "compiled", "what is asked for is tried"


def test_a_named_c_compiler_counts(compiler, monkeypatch):
    compiler[:] = ["my-cc"]
    monkeypatch.setenv("CC", "my-cc")
    assert compiled(double, "auto", GPU, gains=True)[0] == "compiled"
