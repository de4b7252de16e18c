"""Runs that something happens to, and the next start after it: the numbers are those of an undisturbed run."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from starting import check_nothing_is_half_written, check_same, directory_of, ended, run, started

from golfmodel import pipeline
from golfmodel.artifact import submission
from golfmodel.config import Config
from golfmodel.data.shards import find_shards
from golfmodel.runtime import faults
from golfmodel.runtime.errors import DataError, GolfError, StorageError, TrainingError
from golfmodel.runtime.runlog import read_events

DETERMINISTIC = {"deterministic": True, "checkpoint_seconds": 0.0, "checkpoint_every": 2, "run_id": "it"}


@pytest.fixture(scope="module", autouse=True)
def code_files():
    """Which files count as code is found out once; it takes a process of two seconds."""
    files = submission.scoring_files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "scoring_files", lambda: files)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes have, since more threads add up in another order; it is also quicker for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tiny_options_of, tmp_path_factory) -> dict[str, object]:
    """The options of a run that nothing happens to."""
    options = {**tiny_options_of(tmp_path_factory.mktemp("undisturbed")), **DETERMINISTIC}
    pipeline.run(Config(**options), {})
    return options


@pytest.fixture
def options(tiny_options) -> dict[str, object]:
    return {**tiny_options, **DETERMINISTIC}


@pytest.fixture
def happen(monkeypatch):
    """Plans faults for this process."""
    return lambda text: monkeypatch.setattr(faults, "_PLAN", faults.planned({"GOLF_FAULTS": text}))


def resumed_at(options) -> list[int]:
    """Goes on with the run in this process; the steps at which it was taken up."""
    return pipeline.run(Config(**{**options, "resume": "auto"}), {})["resumed_at_steps"]


def test_two_processes_give_the_same_bits(options, undisturbed):
    assert run(options).returncode == 0
    check_same(options, undisturbed)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("kill@warm-up", None),
        ("kill@step:6", None),
        ("kill@write-step-00000004.safetensors", 2),
        ("kill@averaging", 8),
        ("kill@write-model.golf", 8),
        ("kill@scoring:6", 8),  # of the artifact, after two validations and the scores before and after averaging
        ("kill@write-summary.json", 8),
    ],
)
def test_killed(options, undisturbed, fault, step):
    """`step`: where the run is taken up again, if that does not depend on how fast the disk was."""
    assert run(options, faults=fault).returncode == -signal.SIGKILL
    check_nothing_is_half_written(options)
    steps = resumed_at(options)
    assert step is None or steps == [step]
    check_same(options, undisturbed)
    assert not list(directory_of(options).rglob(".*")), "what the killed process left half-written is gone"


def test_asked_to_stop(options, undisturbed):
    result = run(options, faults="term@step:5")
    assert result.returncode == 0
    line = f"stopped by SIGTERM, after step 5 of 8; go on with the same command and --resume {directory_of(options)}"
    assert result.stdout.splitlines()[-1] == line
    assert resumed_at(options) == [5]
    check_same(options, undisturbed)
    log = [(event["event"], event.get("step")) for event in read_events(directory_of(options) / "log.jsonl")]
    assert [step for kind, step in log if kind == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert ("resume", 5) in log


def test_asked_to_stop_when_training_is_over(options, undisturbed):
    result = run(options, faults="int@scoring:6")
    assert result.returncode == 0
    assert "stopped by SIGINT, its newest checkpoint is step-00000008.safetensors" in result.stdout
    assert resumed_at(options) == [8]
    check_same(options, undisturbed)


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        ("full@write-model.golf", StorageError, r"model\.golf.*No space left"),
        ("error@read:12", DataError, "cannot read the training shards: Input/output error"),
        ("nan@gradient:7", TrainingError, "not finite since step 7"),
    ],
)
def test_failed(options, undisturbed, happen, fault, kind, what):
    happen(fault)
    with pytest.raises(kind, match=what):
        pipeline.run(Config(**options), {})
    check_nothing_is_half_written(options)
    happen("")
    assert resumed_at(options) > [0]
    check_same(options, undisturbed)


@pytest.mark.parametrize("fault", ["full@write-step-*:*", "full@write-step-00000004.safetensors", "slow@read:*"])
def test_not_even_stopped(options, undisturbed, happen, monkeypatch, fault):
    monkeypatch.setattr(faults, "SLOW_SECONDS", 0.05)
    happen(fault)
    pipeline.run(Config(**options), {})
    check_same(options, undisturbed)
    happened = [event for event in read_events(directory_of(options) / "log.jsonl", "checkpoint") if event["problem"]]
    assert bool(happened) == fault.startswith("full")
    assert all("No space left" in event["problem"] for event in happened)


def test_a_shard_that_is_cut_short_under_a_run(options, undisturbed, tiny_corpus, tmp_path):
    for path in tiny_corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options["data_path"] = str(tmp_path)
    shards = {path: path.read_bytes() for path in find_shards(tmp_path, "train")}
    with started(options, faults="slow@read:*") as process:
        while not process.stdout.readline().startswith("step:2/"):
            assert process.poll() is None
        for path in shards:
            os.truncate(path, 2000)
        assert ended(process).returncode == -signal.SIGBUS
    check_nothing_is_half_written(options)
    with pytest.raises(DataError, match=r"tiny_train_000000\.bin is truncated"):
        resumed_at(options)
    for path, data in shards.items():
        path.write_bytes(data)
    resumed_at(options)
    check_same(options, undisturbed)


def test_another_recipe_is_refused_and_the_run_stays_as_it_is(options, undisturbed):
    run(options, faults="term@step:3")
    with pytest.raises(GolfError, match="NUM_LAYERS: checkpoint 2, this run 3"):
        pipeline.run(Config(**{**options, "num_layers": 3, "resume": "auto"}), {})
    moved = directory_of(options).parent / "elsewhere" / "it"
    moved.parent.mkdir()
    directory_of(options).rename(moved)
    options["runs_dir"] = str(moved.parent)
    assert resumed_at({**options, "micro_batch_tokens": 512, "train_log_every": 3, "val_loss_every": 0}) == [3]
    check_same(options, undisturbed)
