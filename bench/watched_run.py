"""One run of a training script of the challenge, watched through the lines that it prints about its steps.

A script runs as it is, in a directory of its own, told what to do by variables and with an import path that lacks this
checkout. After the last step to measure, before it validates and exports, it is ended, and with it all that it started.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from golfmodel.runtime.errors import ConfigError, TrainingError
from golfmodel.runtime.versions import PROJECT_ROOT

MARKER = "BENCH_PEER_RUN"  # the variable that tells a run's processes from all others: whatever they start inherits it
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
MEMORY_POLL_SECONDS = 0.5
TAIL_LINES = 60  # torchrun says some 40 after a script's own last words

# As in `step:20/200 train_loss:3.1 train_time:1720ms step_avg:86.01ms`, `20/200 train_loss: 3.1 train_time: 0.1m` and
# `step:20/200 loss:3.1 t:1720ms avg:86.0ms`. Minutes are too coarse to measure with.
_STEP = re.compile(r"\s*(?:step[:\s]\s*)?(\d+)/\d+\s")
_LOSS = re.compile(r"(?<!\w)(train_|val_)?loss:")
_TRAIN_TIME = re.compile(r"(?<!\w)(?:train_time|time|t):\s*(\d+(?:\.\d+)?)\s*ms")
_STEP_AVERAGE = re.compile(r"(?<!\w)(?:step_avg|avg):\s*(\d+(?:\.\d+)?)\s*ms")
_BATCH = re.compile(r"(?<!\w)train_batch_tokens:\s*(\d[\d_,]*)")


@dataclass(frozen=True)
class StepLine:
    """What a script printed about a step: training time so far as it counts it, and when that came after launch."""

    step: int
    arrival_ms: float
    train_ms: float | None
    validation: bool


@dataclass(frozen=True)
class Contender:
    """A script, and the variables that it is given beyond the environment."""

    name: str
    script: Path
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """What one run of a contender showed; one with a `problem` was cut short and supports no claim.

    `ms_per_step` is by the script's own training time, or by `clock` "arrival_ms" where it prints none. The first line
    about a step was about `first_step` and came `first_step_seconds` after launch. Memory is as `MemoryWatch` has it.
    """

    contender: str
    round: int
    ms_per_step: float | None
    clock: str | None
    ms_per_step_by_arrival: float | None
    first_step: int
    first_step_seconds: float
    last_step: int
    peak_memory_bytes: int | None
    problem: str | None
    last_output: tuple[str, ...]


def parse_step_line(text: str, arrival_ms: float) -> StepLine | None:
    """The step that a line of output is about; None for any other line."""
    step, loss = _STEP.match(text), _LOSS.search(text)
    if step is None or loss is None:
        return None
    number, total, average = int(step[1]), _TRAIN_TIME.search(text), _STEP_AVERAGE.search(text)
    train_ms = float(total[1]) if total else number * float(average[1]) if average else None
    return StepLine(number, arrival_ms, train_ms, validation=loss[1] == "val_")


def ms_per_step(lines: Sequence[StepLine], warm_up: int, clock: str) -> float | None:
    """Milliseconds a step from the first line at step `warm_up` or later to the last; None unless two have a time.

    Args:
        clock: "train_ms" or "arrival_ms". Validation lines, which arrive late, do not count.
    """
    times = [(line.step, getattr(line, clock)) for line in lines if line.step >= warm_up and not line.validation]
    known = [(step, milliseconds) for step, milliseconds in times if milliseconds is not None]
    if not known:
        return None
    (first, begin), (last, end) = known[0], known[-1]
    return (end - begin) / (last - first) if last > first and end > begin else None


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with an import path that lacks this checkout.

    A package on the Python index is called `kernels` too; scripts may import that one.
    """
    cleaned = dict(environment)
    paths = cleaned.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and Path(path).resolve() != PROJECT_ROOT]
    return {**cleaned, "PYTHONPATH": os.pathsep.join(kept)} if kept else cleaned


class MemoryWatch:
    """Device memory that a run takes, seen from outside by nvidia-smi twice a second until the `with` is left.

    `peak_bytes` is the most in use less the least from just before launch on (a run before may still be leaving), on
    the GPU where that is most. So it includes the CUDA context and the allocator's cache, which belong to no tensor.
    None where there is no nvidia-smi or no GPU.
    """

    def __init__(self, gpus: Sequence[str]) -> None:
        self._gpus = gpus
        self._samples: list[list[int]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        if used := self._used():
            self._samples.append(used)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._samples:
            self._thread.join()

    @property
    def peak_bytes(self) -> int | None:
        over = [max(of_gpu) - min(of_gpu) for of_gpu in zip(*self._samples, strict=True)]
        return max(over) * 2**20 if over else None

    def _poll(self) -> None:
        while not self._stopping.wait(MEMORY_POLL_SECONDS):
            if used := self._used():
                self._samples.append(used)

    def _used(self) -> list[int] | None:
        """MiB in use on each GPU."""
        program = shutil.which("nvidia-smi")
        if program is None or not self._gpus:
            return None
        query = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", ",".join(self._gpus)]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            return [int(line) for line in result.stdout.split()]
        except (OSError, ValueError, subprocess.SubprocessError):
            return None


def run_once(
    contender: Contender,
    number: int,
    directory: Path,
    *,
    nproc: int | None,
    batch_tokens: int,
    warm_up: int,
    last_step: int,
    timeout: float,
) -> Run:
    """Runs a contender in `directory` until a line about `last_step` comes, then ends all its processes.

    Args:
        number: of the round, from 0.
        nproc: how many ranks torchrun starts; None for one process without it.
        batch_tokens: tokens a step that it must keep to, if it prints how many it takes.
        timeout: seconds that may pass without a line about a step.

    Raises:
        TrainingError: it ended, or `timeout` passed, before its first step; shows its last output.
        ConfigError: it says that it trains on another batch.
    """
    directory.mkdir()
    environment = {
        **clean_environment(os.environ),
        **contender.settings,
        "RUNS_DIR": str(directory / "runs"),
        "PYTHONUNBUFFERED": "1",  # or its lines would come when a buffer is full
        MARKER: f"{os.getpid()}-{directory}",
    }
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}")
    command = (sys.executable, *(torchrun if nproc else ()), str(contender.script))
    lines: list[StepLine] = []
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    problem = None
    with (
        MemoryWatch(_gpus(environment, nproc or 1)) as memory,
        _running(command, directory, environment) as (process, output),
    ):
        for seconds, text in output:
            if text:
                tail.append(text.rstrip())
                _check_batch(contender, text, batch_tokens)
            line = parse_step_line(text, 1e3 * seconds)
            if line is not None and line.step > 0:
                lines.append(line)
                if line.step >= last_step:
                    break
            if seconds - (lines[-1].arrival_ms / 1e3 if lines else 0.0) > timeout:
                problem = f"printed no step line for {timeout:g} s (--timeout)"
                break
        else:
            problem = f"ended with exit status {process.poll()}"
    if not lines:
        raise TrainingError("\n  ".join((f"{contender.name} {problem} before its first step; its last lines:", *tail)))
    paces = {clock: ms_per_step(lines, warm_up, clock) for clock in ("train_ms", "arrival_ms")}
    clock = next((clock for clock, pace in paces.items() if pace is not None), None)
    if problem is not None:
        problem += f" after step {lines[-1].step} of {last_step}"
    elif clock is None:
        problem = f"printed no two lines about training steps {warm_up} to {last_step}"
    if problem is not None:
        paces, clock = {}, None
    return Run(
        contender=contender.name,
        round=number,
        ms_per_step=paces.get(clock),
        clock=clock,
        ms_per_step_by_arrival=paces.get("arrival_ms"),
        first_step=lines[0].step,
        first_step_seconds=lines[0].arrival_ms / 1e3,
        last_step=lines[-1].step,
        peak_memory_bytes=memory.peak_bytes,
        problem=problem,
        last_output=tuple(tail) if problem else (),
    )


def _gpus(environment: Mapping[str, str], nproc: int) -> list[str]:
    """The GPUs of a run of `nproc` ranks, as nvidia-smi is asked for them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(nproc)] if visible is None else visible.split(",")[:nproc]
    return [name.strip() for name in names if name.strip()]


def _check_batch(contender: Contender, text: str, batch_tokens: int) -> None:
    said = _BATCH.search(text)
    if said and int(re.sub(r"\D", "", said[1])) != batch_tokens:
        raise ConfigError(
            f"{contender.name} trains on {said[1]} tokens a step where TRAIN_BATCH_TOKENS is {batch_tokens}: "
            "only the same batch can be compared"
        )


@contextmanager
def _running(
    command: Sequence[str], directory: Path, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], Iterator[tuple[float, str]]]]:
    """A process and its `_output`; however the body is left, the process and all that it started have ended."""
    launched = time.perf_counter()
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        command, cwd=directory, env=environment, text=True, errors="replace", start_new_session=True, **pipes
    )
    try:
        yield process, _output(process, launched)
    finally:
        _end(process, environment[MARKER])


def _output(process: subprocess.Popen[str], launched: float) -> Iterator[tuple[float, str]]:
    """(seconds since `launched`, line) as lines come, and an empty line where none has come for a while.

    Ends with the process, even where one that it started still holds the pipe.
    """
    arrived: queue.Queue[tuple[float, str]] = queue.Queue()

    def read() -> None:
        with process.stdout as pipe:
            for text in pipe:
                arrived.put((time.perf_counter() - launched, text))

    threading.Thread(target=read, name="output", daemon=True).start()
    while True:
        try:
            yield arrived.get(timeout=0.2)
        except queue.Empty:
            if process.poll() is not None:
                return
            yield time.perf_counter() - launched, ""


def _end(process: subprocess.Popen[str], marker: str) -> None:
    """Ends all processes of a run, also those in sessions of their own, as torchrun's workers are."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_SECONDS
        told: set[int] = set()
        while (living := _living(process, marker)) and time.monotonic() < deadline:
            for target in living - told:
                with suppress(ProcessLookupError):
                    os.kill(target, number)
            told |= living
            time.sleep(0.02)


def _living(process: subprocess.Popen[str], marker: str) -> set[int]:
    """The processes with the marker in their environment; without /proc, the process group. As `os.kill` takes them."""
    found = {process.pid} if process.poll() is None else set()  # poll reaps it, too
    if not Path("/proc/self/environ").exists():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            found.add(-process.pid)
        return found
    wanted = f"{MARKER}={marker}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found
