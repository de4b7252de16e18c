"""How the kernels of an op are best cut up on this GPU: `python -m bench.tune squared_relu_mlp_fp8`.

Varies one field of one kernel's line in `kernels/tuning.py` at a time, in turn with the best line so far, keeps what is
faster, and prints the lines to put there. Changes no file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench.comparison import equivalence, prepared
from bench.run_options import Parser
from bench.subjects import Subject, subjects
from bench.table import duration, environment, table
from bench.timing import Timed, interleaved
from golfmodel.runtime.errors import ConfigError, front_door
from golfmodel.runtime.versions import versions
from kernels import dispatch, tuning
from kernels.tuning import WHOLE_ROW, Product, Shape

Line = Shape | Product

FASTER_BY = 0.01  # of the time; less is noise
ROUNDS = 10
VALUES: Mapping[str, Sequence[Any]] = {
    "rows": (64, 128, 256),
    "columns": (64, 128, 256),
    "depth": (32, 64, 128),
    "num_warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "programs": (1, 2),
    "flatten": (False, True),
}
SCALED = ("elements", "max_columns", "per_warp")  # by two, either way


def others_of(line: Line, field: str) -> list[Line]:
    """The lines that differ from this one in this field."""
    value = getattr(line, field)
    if isinstance(line, Product):
        others = [other for other in VALUES[field] if other != value]
    else:
        others = [value // 2, value * 2] if field in SCALED and value < WHOLE_ROW else []
    return [line._replace(**{field: other}) for other in others if other or other is False]


def descend(line: Line, seconds: Callable[[Line, Line], tuple[float, float]]) -> tuple[Line, list[float]]:
    """Changes field after field while that is faster; returns the line, and the share of the time that each move took.

    Args:
        seconds: of two lines, measured in turn; infinite for one that does not run.
    """
    moves = []
    improved = True
    while improved:
        improved = False
        for field in line._fields:
            for other in others_of(line, field):
                ours, theirs = seconds(line, other)
                if theirs < ours * (1 - FASTER_BY):
                    line, improved = other, True
                    moves.append(theirs / ours)
    return line, moves


def tables() -> list[dict[str, Any]]:
    """The lines of `kernels/tuning.py` that hold on this device, by kernel."""
    on_gpu = torch.cuda.is_available()
    architecture = torch.cuda.get_device_capability() if on_gpu else (9, 0)
    found = [tuning.MEASURED.get(architecture, tuning.MEASURED[9, 0]), tuning.PRODUCTS.get(architecture)]
    return [each for each in found if each is not None]


def put(kernel: str, line: Line) -> None:
    """Has the kernel cut up so from its next start on."""
    for each in tables():
        if kernel in each and each[kernel] != line:
            each[kernel] = line
            _forget()


def _forget() -> None:
    """Has the ops look their lines up anew: what their modules keep of the ones before goes, plans above all."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and not isinstance(value, type):
                    value.cache_clear()


def kernels_of(function: Callable[[], object]) -> dict[str, Line]:
    """The lines that a call looks up."""
    seen: dict[str, Line] = {}
    with _watched(seen):
        function()
    return seen


@contextmanager
def _watched(seen: dict[str, Line]) -> Iterator[None]:
    class Watched(dict):
        def __getitem__(self, kernel: str) -> Line:
            line = seen[kernel] = super().__getitem__(kernel)
            return line

    watched = tables()
    places = [(whole, key) for whole in (tuning.MEASURED, tuning.PRODUCTS) for key in whole if whole[key] in watched]
    before = [whole[key] for whole, key in places]
    for whole, key in places:
        whole[key] = Watched(whole[key])
    _forget()
    try:
        yield
    finally:
        for (whole, key), lines in zip(places, before, strict=True):
            whole[key] = lines
        _forget()


def tune(subject: Subject, wanted: Sequence[str], device: torch.device) -> list[list[str]]:
    """Cells of a row for each kernel of the op: where it is used, its line before and after, the time that is left.

    Args:
        wanted: kernels; all of them where there are none.

    Raises:
        ConfigError: one of them is none of the op's.
    """
    rows, known = [], set()
    for direction in subject.directions:
        function, sets = prepared(subject, direction, device)
        found = kernels_of(lambda function=function: function(0))
        known |= found.keys()
        for kernel, line in found.items():
            if wanted and kernel not in wanted:
                continue

            def seconds(
                ours: Line, theirs: Line, *, kernel: str = kernel, function: Timed = function, sets: int = sets
            ) -> tuple[float, float]:
                return _seconds(function, sets, kernel, (ours, theirs), device)

            best, moves = descend(line, seconds)
            put(kernel, best)
            left = 1.0
            for move in moves:
                left *= move
            print(f"{direction}, {kernel}: {best}, {left:.1%} of the time", file=sys.stderr, flush=True)
            rows.append([direction, kernel, f"`{line}`", f"`{best}`" if moves else "the same", f"{left:.1%}"])
        times = interleaved({"all": function}, sets=sets, device=device)["all"]
        rows.append([direction, "all", "", "", duration(times.median)])
    if unknown := set(wanted) - known:
        raise ConfigError(f"--kernel is {', '.join(unknown)}: {subject.op} has {', '.join(sorted(known)) or 'none'}")
    return rows


def _seconds(
    function: Timed, sets: int, kernel: str, lines: tuple[Line, Line], device: torch.device
) -> tuple[float, float]:
    def cut_up(line: Line) -> Timed:
        def call(index: int) -> object:
            put(kernel, line)
            return function(index)

        return call

    first, second = lines
    try:
        put(kernel, second)
        function(0)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever Triton's compiler thinks of a tile
        print(f"{kernel}: {second} does not run: {type(error).__name__}", file=sys.stderr)
        return 1.0, float("inf")
    finally:
        put(kernel, first)
    times = interleaved({"ours": cut_up(first), "theirs": cut_up(second)}, sets=sets, device=device, rounds=ROUNDS)
    put(kernel, first)
    return times["ours"].median, times["theirs"].median


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes and prints; the exit status is 1 if the op is wrong with what was found."""
    options = _parser().parse_args(arguments)
    names = sorted({subject.op for subject in subjects(on_gpu=True)})
    if options.op not in names:
        raise ConfigError(f"OP is {options.op!r}: must be one of {', '.join(names)}")
    if not torch.cuda.is_available():
        raise ConfigError("bench.tune needs a GPU, and this host shows none")
    if dispatch.chosen() == "reference":
        raise ConfigError("GOLF_KERNELS is 'reference', which has no tiles: must be auto or triton")
    device = torch.device("cuda", torch.cuda.current_device())
    of_op = [subject for subject in subjects(on_gpu=True) if subject.op == options.op]
    subject = next((each for each in of_op if each.shape == options.shape), None) if options.shape else of_op[-1]
    if subject is None:
        raise ConfigError(f"--shape is {options.shape!r}: must be one of {', '.join(each.shape for each in of_op)}")
    rows = tune(subject, options.kernel or (), device)
    verdict = equivalence(subject, device)
    print(f"{environment(versions())}; {subject.label}; held to its definition with what was found: {verdict}\n")
    print(table(["direction", "kernel", "was", "best", "of the time"], rows))
    return 0 if verdict == "passed" else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench.tune", description="The tiles with which an op's kernels are fastest on this GPU."
    )
    parser.add_argument("op", metavar="OP", help="an op of kernels/")
    parser.add_argument("--shape", help="one of its shapes in pytest bench/ (default: the last)")
    parser.add_argument("--kernel", action="append", help="a line of kernels/tuning.py; may be repeated (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
