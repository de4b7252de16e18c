from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bench import watched_run
from bench.watched_run import (
    Contender,
    MemoryWatch,
    StepLine,
    clean_environment,
    ms_per_step,
    parse_step_line,
    run_once,
)
from golfmodel.runtime.errors import ConfigError, TrainingError
from golfmodel.runtime.versions import PROJECT_ROOT

# What the scripts below start with: `say` prints as most scripts of the challenge do, at 7.5 ms a step.
BEGINNING = """\
import json, os, subprocess, sys, time
from pathlib import Path

def say(step):
    ms = 1000 + 7.5 * step
    print(f"step:{step}/80 train_loss:3.1 train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")

"""
STEPS = "say(1); say(20); say(80); time.sleep(60)"


@pytest.fixture
def run(tmp_path):
    """Runs a script that is to be watched from step 20 to step 80."""

    def run_text(text: str, settings: dict[str, str] | None = None, nproc: int | None = None, timeout: float = 60.0):
        script = tmp_path / "train_gpt.py"
        script.write_text(BEGINNING + text)
        options = {"nproc": nproc, "batch_tokens": 4096, "warm_up": 20, "last_step": 80, "timeout": timeout}
        return run_once(Contender("the script", script, settings or {}), 1, tmp_path / "run", **options)

    return run_text


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program in its place that prints what is in the file returned, and appends its arguments to `calls`."""
    (tmp_path / "bin").mkdir()
    program, used = tmp_path / "bin" / "nvidia-smi", tmp_path / "used"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncat {used}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(watched_run, "MEMORY_POLL_SECONDS", 0.01)
    return used


def queries(nvidia_smi: Path) -> set[str]:
    calls = nvidia_smi.with_name("calls")
    return set(calls.read_text().splitlines()) if calls.exists() else set()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("text", "step", "train_ms"),
    [
        ("step:20/200 train_loss:3.1 train_time:1720ms step_avg:86.01ms", 20, 1720),
        ("step:20/200 train_loss:3.1000 lr_scale:1.000 train_time:1720ms step_avg:86.01ms tok/s:9,143", 20, 1720),
        ("step:20/200 train_loss:3.1 step_avg:86.01ms\n", 20, 1720.2),
        ("  step:20/200 loss:3.1 t:1720.5ms avg:86.0ms", 20, 1720.5),
        ("step 20/200 loss: 3.1 time: 1720 ms", 20, 1720),
        ("20/20000 train_loss: 3.1 train_time: 0.1m tok/s: 8100000", 20, None),
        ("step:20/200 loss:3.1", 20, None),
    ],
)
def test_lines_about_steps(text, step, train_ms):
    line = parse_step_line(text, 12.0)
    assert (line.step, line.arrival_ms, line.validation) == (step, 12.0, False)
    assert line.train_ms == (None if train_ms is None else pytest.approx(train_ms))


def test_a_validation_line():
    line = parse_step_line("step:20/200 val_loss:3.1 val_bpb:1.9 train_time:1720ms step_avg:86.01ms", 12.0)
    assert (line.step, line.validation) == (20, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "warmup_step:3/20",
        "warmup_step:3/20 train_loss:3.1",
        "stopping_early: wallclock_cap train_time:600000ms step:20/200",
        "final_int8_zlib_roundtrip val_loss:3.1 val_bpb:1.9 eval_time:900ms",
        "train_batch_tokens:524288 train_seq_len:1024 iterations:20000",
        "training: 20/200 steps in 1.7s loss:3.1",
    ],
)
def test_other_lines(text):
    assert parse_step_line(text, 12.0) is None


def lines_of(*points: tuple[int, float | None]) -> list[StepLine]:
    """Lines that come 40 ms a step apart."""
    return [StepLine(step, 40.0 * step, train_ms, validation=False) for step, train_ms in points]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (lines_of((1, 900), (10, 1000), (20, 1500), (40, 2500), (80, 5100)), 60.0),
        (lines_of((19, 1490), (25, 1500), (50, 4000)), 100.0),  # on beats of its own
        (lines_of((1, 900), (10, 1000), (80, 5100)), None),
        (lines_of((20, 1500), (80, 1500)), None),
        (lines_of((20, None), (80, None)), None),
        ([], None),
    ],
)
def test_time_per_step_is_from_the_first_line_after_the_warm_up_to_the_last(lines, expected):
    assert ms_per_step(lines, 20, "train_ms") == expected


def test_time_per_step_leaves_validation_lines_out():
    late = StepLine(80, 9e9, 9e9, validation=True)
    assert ms_per_step([*lines_of((20, 1500), (60, 3500)), late], 20, "train_ms") == 50.0


def test_time_per_step_by_arrival():
    assert ms_per_step(lines_of((20, None), (80, None)), 20, "arrival_ms") == 40.0


def test_the_import_path_loses_this_checkout_only():
    here, other = str(PROJECT_ROOT), "/opt/site"
    cleaned = clean_environment({"PYTHONPATH": os.pathsep.join([here, other, f"{here}/"]), "HOME": "/root"})
    assert cleaned == {"PYTHONPATH": other, "HOME": "/root"}
    assert clean_environment({"PYTHONPATH": here}) == {}


def test_what_a_run_shows(run):
    shown = run("print('logs/run.txt'); print('warmup_step:1/20')\n" + STEPS)
    assert (shown.contender, shown.round) == ("the script", 1)
    assert (shown.ms_per_step, shown.clock, shown.problem, shown.last_output) == (7.5, "train_ms", None, ())
    assert (shown.first_step, shown.last_step) == (1, 80)
    assert 0 < shown.first_step_seconds < 20


def test_what_a_script_sees(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    monkeypatch.setenv("KEPT", "by all")
    monkeypatch.setenv("CHANGED", "by the shell")
    seen = tmp_path / "seen"
    dump = f"Path({str(seen)!r}).write_text(json.dumps([dict(os.environ), sys.path, os.getcwd()]))\n"
    run(dump + STEPS, {"CHANGED": "by the contender"})
    environment, import_path, directory = json.loads(seen.read_text())
    assert (environment["KEPT"], environment["CHANGED"]) == ("by all", "by the contender")
    assert str(PROJECT_ROOT) not in [environment.get("PYTHONPATH"), *import_path]
    assert directory == str(tmp_path / "run")
    assert environment["RUNS_DIR"].startswith(directory)


@pytest.mark.parametrize("obeys", [True, False])
def test_nothing_is_left_behind(obeys, run, tmp_path, monkeypatch):
    """Not even a child in a session of its own, as torchrun's workers are, or one that ignores SIGTERM."""
    monkeypatch.setattr(watched_run, "GRACE_SECONDS", 2.0 if obeys else 0.2)
    deaf = "" if obeys else "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    start = f"""
child = [sys.executable, "-c", "{deaf}import time; print(0, flush=True); time.sleep(60)"]
child = subprocess.Popen(child, start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
Path({str(tmp_path / "pids")!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
"""
    assert run(start + STEPS).problem is None
    pids = [int(text) for text in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_torchrun_starts_the_ranks(run, nvidia_smi, tmp_path):
    """On the first of the GPUs that are visible, whose memory is watched."""
    nvidia_smi.write_text("700\n700\n")
    ranks = f"""
Path({str(tmp_path)!r}, "rank-" + os.environ["RANK"]).write_text(str(os.getpid()))
if os.environ["RANK"] == "1": time.sleep(60)
while not Path({str(tmp_path)!r}, "rank-1").exists(): time.sleep(0.01)
"""
    shown = run(ranks + STEPS, {"CUDA_VISIBLE_DEVICES": "3, 5,7"}, nproc=2)
    assert (shown.ms_per_step, shown.problem, shown.peak_memory_bytes) == (7.5, None, 0)
    assert {query.partition(" -i ")[2] for query in queries(nvidia_smi)} == {"3,5"}
    pids = [int(path.read_text()) for path in sorted(tmp_path.glob("rank-*"))]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_script_that_dies_before_its_first_step(run):
    with pytest.raises(TrainingError, match="the script ended with exit status 1 before its first step") as caught:
        run("print('about to fail'); raise RuntimeError('no such kernel')")
    assert "about to fail" in str(caught.value)
    assert "RuntimeError: no such kernel" in str(caught.value)


@pytest.mark.parametrize("closing", ["", "os.close(1); "])
def test_a_script_that_never_takes_a_step(closing, run):
    started = time.monotonic()
    said = r"the script printed no step line for 2 s \(--timeout\) before its first step; its last lines:\n  compiling"
    with pytest.raises(TrainingError, match=said):
        run(f"print('compiling'); {closing}time.sleep(60)", timeout=2)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("say(1); say(20); print('out of memory'); sys.exit(3)", "ended with exit status 3 after step 20 of 80"),
        ("say(1); say(20); say(40); time.sleep(60)", "printed no step line for 2 s (--timeout) after step 40 of 80"),
        ("say(1); say(80); time.sleep(60)", "printed no two lines about training steps 20 to 80"),
    ],
)
def test_a_run_that_is_cut_short(text, problem, run):
    shown = run(text, timeout=2)
    assert (shown.problem, shown.ms_per_step, shown.clock, shown.ms_per_step_by_arrival) == (problem, None, None, None)
    assert any(line.startswith("step:") for line in shown.last_output)


def test_a_script_without_training_times_is_timed_by_when_its_lines_come(run, monkeypatch):
    """Which is as it prints them, though it prints to a pipe."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    shown = run(
        "for step in (1, 20, 40, 80):\n    time.sleep(0.1)\n"
        "    print(f'{step}/80 train_loss: 3.1 train_time: 0.0m')\ntime.sleep(60)\n"
    )
    assert shown.clock == "arrival_ms"
    assert 100 / 60 < shown.ms_per_step < 2000 / 60  # 0.2 s for 60 steps, on a busy machine too


@pytest.mark.parametrize("said", ["4096", "4,096", "4_096"])
def test_the_same_batch_is_compared(said, run):
    assert run(f"print('train_batch_tokens:{said} train_seq_len:1024')\n" + STEPS).problem is None


def test_another_batch_is_not_compared(run):
    with pytest.raises(ConfigError, match="trains on 524288 tokens a step where TRAIN_BATCH_TOKENS is 4096"):
        run("print('train_batch_tokens:524288 train_seq_len:1024')\n" + STEPS)


def test_memory_is_the_peak_over_what_was_in_use_before(nvidia_smi, tmp_path):
    """On the GPU where that is most, until it is stopped."""
    calls = tmp_path / "calls"

    def show(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(nvidia_smi)

    show("700\n900\n")
    with MemoryWatch(["0", "1"]) as memory:
        for text in ("600\n900\n", "5000\n5000\n", "[N/A]\n", "2000\n2000\n"):
            show(text)
            seen = len(calls.read_text().splitlines())
            while len(calls.read_text().splitlines()) < seen + 3:
                time.sleep(0.01)
    show("9000\n9000\n")
    time.sleep(0.1)
    assert memory.peak_bytes == 4400 * 2**20


@pytest.mark.parametrize(("visible", "asked"), [(None, ["-i 0"]), ("3,5", ["-i 3"]), ("", [])])
def test_memory_is_that_of_the_gpu_of_the_process(visible, asked, nvidia_smi, run, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvidia_smi.write_text("700\n")
    shown = run(STEPS, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert shown.peak_memory_bytes == (0 if asked else None)
    query = "--query-gpu=memory.used --format=csv,noheader,nounits"
    assert queries(nvidia_smi) == {f"{query} {gpu}" for gpu in asked}
