"""Two ranks, one of which something happens to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starting import check_nothing_is_half_written, check_same, directory_of, flags, result_of, run, started

from golfmodel import pipeline
from golfmodel.config import Config
from golfmodel.runtime.runlog import read_events
from golfmodel.runtime.versions import PROJECT_ROOT

DETERMINISTIC = {
    "deterministic": True,
    "checkpoint_seconds": 0.0,
    "checkpoint_every": 2,
    "run_id": "it",
    "data_order": "shuffled",
}
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def undisturbed(tiny_options_of, tmp_path_factory) -> dict[str, object]:
    """The options of two ranks that nothing happens to."""
    options = {**tiny_options_of(tmp_path_factory.mktemp("undisturbed")), **DETERMINISTIC}
    assert run(options, ranks=2).returncode == 0
    return options


@pytest.fixture
def options(tiny_options) -> dict[str, object]:
    return {**tiny_options, **DETERMINISTIC}


def test_a_stop_that_one_rank_hears_stops_all_and_any_number_goes_on(options, undisturbed):
    # rank 0 hears of it within half a second
    stopped = run(options, ranks=2, faults="term@step:4/1,slow@step:5/1,slow@step:6/1,slow@step:7/1")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    [step] = re.findall(r"stopped by SIGTERM on rank 1, after step ([4567]) of 8", stopped.stdout)
    one = {**options, "run_id": "one"}
    shutil.copytree(directory_of(options), directory_of(one))
    assert run({**options, "resume": directory_of(options)}, ranks=2).returncode == 0
    check_same(options, undisturbed)
    summary = pipeline.run(Config(**{**one, "resume": "auto"}), {})
    assert summary["resumed_at_steps"] == [int(step)]
    assert summary["world_size"] == 1
    assert summary["val_bpb"] == pytest.approx(
        result_of(undisturbed)[0], rel=1e-3
    )  # as two ranks and one do from the start


def test_a_stop_that_one_rank_hears_while_scoring_ends_all(options):
    stopped = run(options, ranks=2, faults="term@scoring:6/1")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "its newest checkpoint is step-00000008.safetensors" in stopped.stdout
    assert not (directory_of(options) / "summary.json").exists()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("kill@step:6/1", f"rank 1 on host {HOST} (step 6, training) has given no sign of life"),
        ("nan@gradient:7/1", "not finite since step 7"),
    ],
)
def test_torchrun_restarts_and_the_run_goes_on(options, undisturbed, fault, named):
    options["run_id"] = ""
    result = run(options, ranks=2, restarts=1, faults=fault)
    assert result.returncode == 0, result.stderr[-3000:]
    assert named in result.stderr
    [directory] = Path(str(options["runs_dir"])).iterdir()
    options["run_id"] = directory.name
    check_same(options, undisturbed)
    [resumed] = read_events(directory / "log.jsonl", "resume")
    # a checkpoint may have been skipped while the one before it was written
    assert resumed["step"] in (0, 2, 4, 6)
    check_nothing_is_half_written(options)


def test_a_rank_that_hangs_is_named_and_ends_the_run(options):
    began = time.monotonic()
    result = run({**options, "hang_timeout": 5}, ranks=2, faults="hang@step:5/1")
    assert result.returncode != 0
    assert f"rank 1 on host {HOST} (step 5, training) has made no progress" in result.stderr
    assert time.monotonic() - began < 60
    check_nothing_is_half_written(options)


def test_a_stopped_rank_that_keeps_the_store_is_named_without_a_launcher(options):
    """SIGSTOP on rank 0: its threads, the store's among them, stand still."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", *flags({**options, "hang_timeout": 5})],
            cwd=PROJECT_ROOT,
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GOLF_FAULTS": "stop@step:5/0"},
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = processes[1].communicate(timeout=120)
        assert processes[1].returncode == 1
        assert f"error (rank 1): rank 0 on host {HOST} (step 5, training)" in said
        assert processes[0].poll() is None
        processes[0].send_signal(signal.SIGCONT)
        _, said = processes[0].communicate(timeout=120)
        assert processes[0].returncode != 0, "when it goes on, it finds the others gone"
        assert "rank 1" in said
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_launcher_that_is_killed_leaves_no_orphans(options):
    endless = {**options, "iterations": 10**6, "hang_timeout": 5, "val_loss_every": 0}
    with started(endless, ranks=2) as process:
        while not process.stdout.readline().startswith("step:3/"):
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        process.kill()
        _, said = process.communicate(timeout=120)  # until the last of them has closed its end
        assert "the launcher, who keeps the store where ranks meet" in said
        deadline = time.monotonic() + 30
        while any(_lives(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _lives(pid: str) -> bool:
    """Whether a process is there and is not only waiting to be collected."""
    try:
        return json.dumps(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != '"Z"'
    except OSError:
        return False
