"""Arrows point one way: who may import whom, as DESIGN.md lays out the rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In the order data flows through them; a room uses only those before it. `report` stands beside `pipeline`.
ROOMS = [
    *("config", "runtime", "data", "model", "optim", "evaluation", "training", "artifact"),
    *("report", "pipeline", "sample"),
]
OUTSIDE = {"bench", "tests", "train"}


def files_of(*names: str) -> list[Path]:
    return sorted(path for name in names for path in (ROOT / name).rglob("*.py"))


SOURCES = [*files_of("kernels", "golfmodel"), ROOT / "train.py"]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; `from a import b` is `a.b`, which may name a module too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of a dotted name in golfmodel."""
    parts = module.split(".")
    return parts[1] if parts[0] == "golfmodel" and len(parts) > 1 else None


def test_every_room_is_on_the_map():
    found = {room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in files_of("golfmodel")}
    assert found - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", files_of("kernels"), ids=label)
def test_kernels_know_nothing_of_the_model(path):
    assert not [module for module in imports_of(path) if module.split(".")[0] in {"golfmodel", *OUTSIDE}]


@pytest.mark.parametrize("path", files_of("golfmodel"), ids=label)
def test_a_room_uses_only_rooms_above_it(path):
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    used = {room_of(module) for module in imports_of(path)} - {None, room}
    if path.name == "__main__.py" or room == "pipeline":
        assert used <= set(ROOMS)
    elif room == "config":
        assert used <= {"runtime"}
    elif room == "__init__":
        assert not used
    else:
        assert used <= set(ROOMS[: ROOMS.index(room)]) - {"pipeline"}


def test_config_uses_only_the_errors_of_runtime():
    used = [module for module in imports_of(ROOT / "golfmodel" / "config.py") if room_of(module)]
    assert used == ["golfmodel.runtime.errors.ConfigError"]


@pytest.mark.parametrize("path", files_of("golfmodel/runtime"), ids=label)
def test_runtime_needs_no_kernel(path):
    assert not [module for module in imports_of(path) if module.split(".")[0] == "kernels"]


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_nothing_depends_on_benchmarks_tests_or_the_front_door(path):
    assert not [module for module in imports_of(path) if module.split(".")[0] in OUTSIDE]


@pytest.mark.parametrize("path", files_of("bench"), ids=label)
def test_benchmarks_use_what_they_measure_and_no_tests(path):
    assert not [module for module in imports_of(path) if module.split(".")[0] in {"tests", "train"}]


@pytest.mark.parametrize("path", [*SOURCES, *files_of("bench")], ids=label)
def test_no_pickle(path):
    modules = {module.split(".")[0] for module in imports_of(path)}
    assert not modules & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"torch.load", "torch.save"} & set(calls)
    # Objects travel pickled over a process group.
    assert not [call for call in calls if call.startswith("dist.") and "object" in call]


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_private_names_stay_in_their_file(path):
    ours = [module for module in imports_of(path) if module.split(".")[0] in {"kernels", "golfmodel"}]
    private = [part for module in ours for part in module.split(".") if part.startswith("_") and part != "__main__"]
    assert not private
