"""Which run a start goes on with, and from which checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from states import a_state

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.optim.averaging import WeightAverage
from golfmodel.optim.groups import Optimizers
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import CheckpointError, ConfigError
from golfmodel.runtime.runlog import RunLog
from golfmodel.training.checkpoint import Checkpoint, decode_checkpoint, write_checkpoint
from golfmodel.training.checkpointing import checkpoint_path
from golfmodel.training.resume import choose_start, first_state, launcher_of
from golfmodel.training.snapshot import Training

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
INPUTS = {"tokenizer": "a" * 64, "validation text": "b" * 64}
LAUNCHED = {"TORCHELASTIC_RUN_ID": "job-1", "TORCHELASTIC_RESTART_COUNT": "0"}
RESTARTED = {"TORCHELASTIC_RUN_ID": "job-1", "TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.fixture
def config(tiny_config) -> Config:
    return dataclasses.replace(tiny_config, run_id="")


@pytest.fixture
def choose(config):
    """What a start of `config`, some options changed, would go on with."""

    def run(environment: dict[str, str] | None = None, inputs: dict[str, str] = INPUTS, **changes: object):
        changed = dataclasses.replace(config, **changes)
        return choose_start(changed, environment or {}, inputs)

    return run


def a_run(config: Config, name: str, *, steps=(), age: float = 0.0, launcher: str = "", **changes: object) -> Path:
    """A run that began `age` seconds ago, with checkpoints of these steps."""
    config = dataclasses.replace(config, **changes)
    directory = Path(config.runs_dir) / name
    with RunLog(directory) as log:
        log.event("start", launcher=launcher)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    model = GPT(config)
    tensors = Training(model, Optimizers(model, config), WeightAverage(model.parameters()), RANKS).copied()
    for step in steps:
        state = a_state(config, step=step, inputs=INPUTS)
        write_checkpoint(checkpoint_path(directory, step), Checkpoint(state, tensors))
    then = log.path.stat().st_mtime - age
    os.utime(log.path, (then, then))
    return directory


def test_without_resume_a_run_is_new(config, choose):
    a_run(config, "one", steps=[5])
    start = choose()
    assert not start.resumes
    assert start.checkpoint is None
    assert not start.directory.exists()
    assert choose(run_id="mine").directory == Path(config.runs_dir) / "mine"


def test_auto_takes_the_newest_unfinished_run_of_this_config(config, choose, capsys):
    newest = a_run(config, "newest", steps=[5, 10], age=10)
    a_run(config, "older", steps=[20], age=20)
    a_run(config, "of-another-config", steps=[30], age=0, num_layers=3)
    (a_run(config, "finished", steps=[8], age=1) / "summary.json").write_text("{}")
    (Path(config.runs_dir) / "no-run").mkdir()
    start = choose(resume="auto", train_log_every=7, device="auto", data_path="moved")
    assert (start.directory, start.resumes, start.path) == (newest, True, checkpoint_path(newest, 10))
    assert start.checkpoint.state.step == 10
    assert start.data == start.path.read_bytes()
    assert capsys.readouterr().out == f"going on with {newest} after step 10, 0.0 s\n"


def test_auto_leaves_a_run_alone_that_a_process_is_at_work_on(config, choose):
    directory = a_run(config, "one", steps=[5])
    with RunLog(directory, resume=True):
        assert not choose(resume="auto").resumes
    assert choose(resume="auto").directory == directory


def test_auto_without_a_run_starts_one_and_says_so(choose, capsys):
    assert not choose(resume="auto").resumes
    assert "no unfinished run" in capsys.readouterr().out


def test_auto_takes_the_run_of_run_id(config, choose):
    directory = a_run(config, "mine", steps=[5], age=100)
    a_run(config, "newest", steps=[6])
    assert choose(resume="auto", run_id="mine").directory == directory
    start = choose(resume="auto", run_id="new")
    assert (start.directory, start.resumes) == (Path(config.runs_dir) / "new", False)


def test_a_run_without_checkpoints_goes_on_from_its_first_step(config, choose, capsys):
    directory = a_run(config, "one")
    start = choose(resume="auto")
    assert (start.directory, start.resumes, start.checkpoint) == (directory, True, None)
    assert "from its first step" in capsys.readouterr().out


def test_a_directory_or_a_checkpoint_can_be_named(config, choose):
    directory = a_run(config, "one", steps=[5, 10], age=100)
    a_run(config, "two", steps=[20])
    assert choose(resume=str(directory)).checkpoint.state.step == 10
    assert choose(resume=str(checkpoint_path(directory, 5))).checkpoint.state.step == 5


@pytest.mark.parametrize("name", ["nowhere", "runs", "runs/one/config.json", "runs/one/checkpoints"])
def test_what_names_no_run_is_refused(config, choose, tmp_path, name):
    a_run(config, "one", steps=[5])
    with pytest.raises(ConfigError, match=r"RESUME .* must be auto, the directory of a run, or a checkpoint"):
        choose(resume=str(tmp_path / name))


def test_a_finished_run_is_refused(config, choose):
    directory = a_run(config, "one", steps=[5])
    (directory / "summary.json").write_text("{}")
    for resume in (str(directory), str(checkpoint_path(directory, 5))):
        with pytest.raises(ConfigError, match="one is finished"):
            choose(resume=resume)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(config, choose, capsys):
    directory = a_run(config, "one", steps=[5, 10, 15])
    damage(checkpoint_path(directory, 15))
    checkpoint_path(directory, 10).write_bytes(b"")
    assert choose(resume="auto").checkpoint.state.step == 5
    said = capsys.readouterr().err
    assert "step-00000015.safetensors: damaged" in said
    assert "step-00000010.safetensors: not a checkpoint" in said


def test_a_checkpoint_that_is_not_of_this_model_is_named_too(config, choose, capsys):
    directory = a_run(config, "one", steps=[5, 10])
    whole = decode_checkpoint(checkpoint_path(directory, 10).read_bytes(), "it")
    del whole.tensors["weight/input.token.weight"]
    write_checkpoint(checkpoint_path(directory, 10), whole)
    assert choose(resume="auto").checkpoint.state.step == 5
    assert "step-00000010.safetensors: its tensors are not this model's" in capsys.readouterr().err


def test_no_run_is_begun_again_because_all_its_checkpoints_are_damaged(config, choose):
    directory = a_run(config, "one", steps=[5, 10])
    for step in (5, 10):
        damage(checkpoint_path(directory, step))
    with pytest.raises(CheckpointError, match=r"step-00000005\.safetensors: damaged"):
        choose(resume="auto")
    with pytest.raises(CheckpointError, match=r"step-00000010\.safetensors: damaged"):
        choose(resume=str(checkpoint_path(directory, 10)))


def test_another_model_or_recipe_is_refused_with_the_difference(config, choose):
    directory = a_run(config, "one", steps=[5], num_layers=3, matrix_lr=0.5)
    with pytest.raises(ConfigError) as caught:
        choose(resume=str(directory))
    assert "NUM_LAYERS: checkpoint 3, this run 2; MATRIX_LR: checkpoint 0.5, this run 0.04" in str(caught.value)
    (directory / "config.json").write_text("[" * 10**5)  # where that cannot be read, the checkpoint's counts
    with pytest.raises(ConfigError, match="NUM_LAYERS: checkpoint 3, this run 2"):
        choose(resume=str(directory))


def test_another_text_or_tokenizer_is_refused_with_the_difference(config, choose):
    directory = a_run(config, "one", steps=[5])
    with pytest.raises(ConfigError, match="validation text: checkpoint bbbbbbbbbbbb, this run cccccccccccc"):
        choose(resume=str(directory), inputs={**INPUTS, "validation text": "c" * 64})


def test_a_larger_file_than_any_checkpoint_of_this_model_is_not_read(config, choose):
    directory = a_run(config, "one", steps=[5])
    with checkpoint_path(directory, 10).open("wb") as file:
        file.truncate(2**40)
    assert choose(resume="auto").checkpoint.state.step == 5


def test_a_job_that_torchrun_restarts_finds_its_own_run(config, choose):
    mine = a_run(config, "mine", steps=[5], age=100, launcher="job-1")
    a_run(config, "newest", steps=[6], launcher="job-2")
    assert not choose(LAUNCHED).resumes
    assert choose(RESTARTED).directory == mine
    assert choose(RESTARTED, resume="auto").directory == mine
    assert choose({**RESTARTED, "TORCHELASTIC_RUN_ID": "job-3"}).resumes is False


def test_a_restarted_job_goes_on_from_newer_checkpoints_than_the_one_it_was_told(config, choose):
    directory = a_run(config, "one", steps=[5, 10])
    first = str(checkpoint_path(directory, 5))
    assert choose(LAUNCHED, resume=first).checkpoint.state.step == 5
    assert choose(RESTARTED, resume=first).checkpoint.state.step == 10


def test_launchers_without_a_name_are_told_apart():
    assert launcher_of({}) == ""
    assert launcher_of(LAUNCHED) == "job-1"
    assert launcher_of({"TORCHELASTIC_RUN_ID": "none"}).endswith(f":{os.getppid()}")


def test_a_run_knows_where_it_was_taken_up(config):
    here = {"config": config, "inputs": INPUTS, "world_size": 2, "batches": {"position": 3}}
    first = first_state(None, **here)
    assert (first.step, first.resumed_at, first.batches, first.world_size) == (0, (), {"position": 3}, 2)
    saved = a_state(config, step=7, train_seconds=5.0, resumed_at=(2,), batches={"position": 9}, code="1" * 64)
    state = first_state(Checkpoint(saved, {}), **here)
    assert (state.step, state.train_seconds, state.resumed_at, state.batches) == (7, 5.0, (2, 7), {"position": 9})
    assert state.code == first.code != saved.code
    assert state.world_size == 2
