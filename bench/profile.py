"""Where one training step's time goes, kernel by kernel: `python -m bench.profile [--preset quick] [--num-layers 4]`.

Prints a table and writes `profile.json` and `trace.json.gz` (for chrome://tracing or ui.perfetto.dev). Profiling slows
the host down: idle time that the step's wall time has no room for is the profiler's own.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, schedule

from bench import ceilings
from bench.kernel_work import inductor_bytes, inductor_counts_bytes, watched_launches
from bench.run_options import RunParser
from bench.step import TrainingStep
from bench.step_trace import CATEGORIES, OUTSIDE, analyse
from bench.table import duration, environment, table
from golfmodel.config import Config, resolve
from golfmodel.runtime.distributed import runs_on_gpu
from golfmodel.runtime.errors import ConfigError, StorageError, front_door
from golfmodel.runtime.files import write_bytes, write_json
from golfmodel.runtime.versions import versions
from golfmodel.training.step import STAGES

CHOICES = ("auto", "reference")
WARMUP_STEPS, TIMED_STEPS, PROFILED_STEPS = 3, 5, 3
SHORT_NAME = 60
SMALL_SHARE = 2e-3  # rows below it are summed up in the table; `profile.json` has them all

# What a template argument says of a kernel: `FillFunctor`, `direct_copy_kernel_cuda`, `NormTwoOps`.
_FUNCTOR = re.compile(r"\w*Functor\w*|\w+_kernel_cuda|\w+Ops\b")


def profile(config: Config, device: torch.device, kernels: str) -> tuple[dict[str, Any], bytes]:
    """What goes into `profile.json`, in SI units and for one step, and the Chrome trace."""
    step = TrainingStep(config, device, kernels=kernels, records=False)
    with inductor_counts_bytes():
        for index in range(WARMUP_STEPS):
            step(index)
    with watched_launches() as launches:
        step(0)
    trace = _trace(step, device)
    as_trained = TrainingStep(config, device, kernels=kernels)
    as_trained.settle()
    seconds = _wall_seconds(as_trained, device)
    machine = ceilings.measure(device)
    found = analyse(json.loads(trace)["traceEvents"], machine, launches, inductor_bytes())
    content = {
        "versions": versions(),
        "config": config.to_dict(),
        "kernels": kernels,
        "device": device.type,
        "ceilings": dataclasses.asdict(machine),
        "tokens_per_step": step.tokens,
        "step_seconds": seconds,
        "profiled_steps": PROFILED_STEPS,
        "kernel_seconds": found.kernel_seconds,
        "span_seconds": found.span_seconds,
        "idle_seconds": found.idle_seconds,
        "rows": [dataclasses.asdict(row) for row in found.rows],
        "stages": found.stages,
    }
    return content, trace


def _wall_seconds(step: TrainingStep, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for index in range(TIMED_STEPS):
        step(index)
    _wait(device)
    return (time.perf_counter() - begin) / TIMED_STEPS


def _trace(step: TrainingStep, device: torch.device) -> bytes:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    phases = schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=phases, record_shapes=True, acc_events=True
    ) as profiler:
        for index in range(1 + PROFILED_STEPS):
            step(index)
            if index in (0, PROFILED_STEPS):  # the steps between follow one another as in training
                _wait(device)
            profiler.step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def short_name(kernel: str) -> str:
    """A kernel's name for a table: of C++ the function and the functors among its template arguments; 60 characters.

    What is cut keeps the number at its end, by which Inductor tells its kernels apart.
    """
    if kernel.startswith("void ") or ("::" in kernel and re.search("[<(]", kernel)):
        plain = kernel.replace("(anonymous namespace)::", "")
        words = _without_template_arguments(plain).split("(")[0].split()
        functor = _FUNCTOR.search(plain.partition("<")[2])
        bare = words[-1].split("::")[-1] if words else plain
        kernel = bare if functor is None else f"{bare}<{functor.group()}>"
    if len(kernel) <= SHORT_NAME:
        return kernel
    number = re.search(r"(_\d+)?$", kernel).group()
    return f"{kernel[: SHORT_NAME - 3 - len(number)]}...{number}"


def _without_template_arguments(name: str) -> str:
    kept, depth = [], 0
    for character in name:
        depth += character == "<"
        if depth == 0:
            kept.append(character)
        depth = max(depth - (character == ">"), 0)
    return "".join(kept)


def render(content: Mapping[str, Any]) -> str:
    """What is in a `profile.json` as Markdown."""
    found, config = content["versions"], content["config"]
    thing = "kernel" if content["device"] == "cuda" else "op"
    described = (
        f"{environment(found)}; {config['num_layers']} blocks of "
        f"width {config['model_dim']}, {content['tokens_per_step']:,} tokens of {config['train_seq_len']:,} a row; "
        f"GOLF_KERNELS={content['kernels']}."
    )
    rate = content["ceilings"]
    times = (
        f"A step takes {duration(content['step_seconds'])}, as training takes it: on a GPU as one CUDA graph. Profiled "
        f"kernel by kernel, the {thing}s of one take "
        f"{duration(content['kernel_seconds'])} together; between the first and the last lie "
        f"{duration(content['span_seconds'])}, of which nothing runs for {duration(content['idle_seconds'])}. "
        f"Ceilings: copy {rate['bytes_per_second'] / 1e12:.2f} TB/s, matmul "
        f"{rate['flops_per_second'] / 1e12:.3g} TFLOP/s."
    )
    legend = (
        f"All figures are of one step. `of ceiling` is the least time for the bytes and operations of each {thing} at "
        f"the ceilings' rates, over the time taken; `-`: they are not known; `{OUTSIDE}`: work of no stage."
    )
    tables = (_stage_table(content), _kernel_table(content, thing))
    return "\n\n".join(("# One training step", described, times, legend, *tables))


def _stage_table(content: Mapping[str, Any]) -> str:
    seconds = {(entry["stage"], entry["category"]): entry["seconds"] for entry in content["stages"]}
    stages = [stage for stage in (*STAGES, OUTSIDE) if any(key[0] == stage for key in seconds)]
    categories = [category for category in CATEGORIES if any(key[1] == category for key in seconds)]
    total = sum(seconds.values())

    def line(name: str, entries: Sequence[str]) -> list[str]:
        cells = [sum(seconds.get((stage, category), 0.0) for stage in entries) for category in categories]
        return [name, *(_microseconds(cell) for cell in cells), _microseconds(sum(cells)), _percent(sum(cells) / total)]

    header = ["us", *categories, "all", "share"]
    return table(header, [*(line(stage, [stage]) for stage in stages), line("all", stages)])


def _kernel_table(content: Mapping[str, Any], thing: str) -> str:
    shown = [row for row in content["rows"] if row["share"] >= SMALL_SHARE]
    lines = [
        [
            row["stage"],
            row["category"],
            f"`{short_name(row['kernel'])}`",
            f"{row['calls']:.4g}",
            _microseconds(row["seconds"]),
            _percent(row["share"]),
            "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.2f} MB",
            "-" if row["fraction"] is None else _percent(row["fraction"]),
        ]
        for row in shown
    ]
    small = [row for row in content["rows"] if row["share"] < SMALL_SHARE]
    if small:
        seconds, share = (sum(row[key] for row in small) for key in ("seconds", "share"))
        calls = f"{sum(row['calls'] for row in small):.4g}"
        lines.append(["", "", f"{len(small)} more", calls, _microseconds(seconds), _percent(share), "-", "-"])
    return table(["stage", "kind", thing, "calls", "us", "share", "bytes", "of ceiling"], lines)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Profiles a step, prints the tables and writes the files; returns the exit status."""
    options, of_the_run = _parser().split(arguments)
    if options.kernels not in CHOICES:
        raise ConfigError(f"--kernels is {options.kernels!r}: must be one of {', '.join(CHOICES)}")
    config = resolve(of_the_run, os.environ, program="python -m bench.profile")
    _check_writable(options.output)
    on_gpu = runs_on_gpu(config.device)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    content, trace = profile(config, device, options.kernels)
    write_json(options.output / "profile.json", content)
    write_bytes(options.output / "trace.json.gz", gzip.compress(trace))
    print(render(content))
    print(f"profile: {options.output / 'profile.json'}, {options.output / 'trace.json.gz'}", file=sys.stderr)
    return 0


def _parser() -> RunParser:
    parser = RunParser(
        "python -m bench.profile",
        "[--kernels CHOICE] [--output DIR]",
        "One training step, kernel by kernel: a table, profile.json and a Chrome trace.",
    )
    parser.add_argument("--kernels", default="auto", help=f"GOLF_KERNELS: {' or '.join(CHOICES)} (default: auto)")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"), help="directory (default: runs/profile)")
    return parser


def _check_writable(directory: Path) -> None:
    """Raises `StorageError` where no file can be made, before minutes go into what it would hold."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise StorageError(f"cannot write into {directory} (--output): {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
