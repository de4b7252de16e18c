from __future__ import annotations

import os
import subprocess
import sys

import pytest

from golfmodel.runtime import errors
from golfmodel.runtime.errors import GolfError, front_door
from golfmodel.runtime.versions import PROJECT_ROOT

KINDS = [errors.ConfigError, errors.DataError, errors.ArtifactError, errors.CheckpointError, errors.TrainingError]
KINDS += [errors.StorageError, errors.RankError]


def command_that_raises(error: BaseException):
    @front_door
    def main() -> int:
        raise error

    return main


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_user_is_one_line_and_status_2(kind, capsys):
    assert command_that_raises(kind("NUM_LAYERS is 0: must be at least 1"))() == 2
    printed = capsys.readouterr()
    assert printed.err == "error: NUM_LAYERS is 0: must be at least 1\n"
    assert printed.out == ""


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.ArtifactError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.TrainingError, RuntimeError),
        (errors.RankError, RuntimeError),
        (errors.StorageError, OSError),
    ],
)
def test_an_error_is_also_the_builtin_that_a_caller_expects(kind, builtin):
    assert issubclass(kind, GolfError)
    assert issubclass(kind, builtin)


def test_other_ranks_say_which_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert command_that_raises(GolfError("no"))() == 2
    assert capsys.readouterr().err == "error (rank 3): no\n"
    monkeypatch.setenv("RANK", "0")
    assert command_that_raises(GolfError("no"))() == 2
    assert capsys.readouterr().err == "error: no\n"


def test_an_interrupt_is_no_traceback(capsys):
    assert command_that_raises(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), SystemExit(0)])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        command_that_raises(error)()


def test_arguments_and_status_pass_through():
    @front_door
    def main(arguments: list[str], *, status: int) -> int:
        """What it does."""
        return status + len(arguments)

    assert main(["a", "b"], status=5) == 7
    assert main.__doc__ == "What it does."


@pytest.mark.parametrize(("world_size", "shut_down"), [("1", True), ("2", False)])
def test_one_of_several_ranks_leaves_without_pythons_shutdown(world_size, shut_down):
    program = (
        "import atexit; from golfmodel.runtime.errors import leave\n"
        "atexit.register(print, 'shut down'); print('said'); leave(3)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "WORLD_SIZE": world_size},
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert result.stdout.startswith("said")
    assert ("shut down" in result.stdout) is shut_down
