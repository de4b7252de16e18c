from __future__ import annotations

import dataclasses
import sys
import threading

import pytest
import torch
from states import a_state

from golfmodel.model.gpt import GPT
from golfmodel.pipeline import build_model, open_loader
from golfmodel.runtime import faults
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import StorageError, TrainingError
from golfmodel.runtime.runlog import RunLog, read_events
from golfmodel.runtime.stopping import Stopped, StopRequest
from golfmodel.training import background
from golfmodel.training.checkpoint import decode_checkpoint
from golfmodel.training.checkpointing import Checkpoints, checkpoints_in
from golfmodel.training.trainer import Trainer

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def train(config, directory, *, loss=None, validate=None, resume=False, stop=None):
    """Trains `config` and returns (model, result, the log's train events, trainer)."""
    with RunLog(directory, resume=resume) as log, open_loader(config, RANKS) as loader:
        model = build_model(config, RANKS)
        saved = checkpoints_in(directory)[0] if resume else None
        checkpoint = decode_checkpoint(saved.read_bytes(), "it") if resume else None
        checkpoints = Checkpoints(config, log, RANKS.device, checkpoint.state if resume else a_state(config))
        micro_batches = loader.micro_batches_per_step
        trainer = Trainer(config, model, loss or model, loader, micro_batches, RANKS, log, validate, checkpoints, stop)
        trainer.warm_up()
        if checkpoint is not None:
            trainer.restore(checkpoint)
        result = trainer.train()
    return model, result, list(read_events(directory / "log.jsonl", "train")), trainer


def losses(events):
    return [event["train_loss"] for event in events]


def test_loss_falls_and_every_step_is_logged(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, iterations=30)
    _, result, events, _ = train(config, tmp_path / "run")
    assert [event["step"] for event in events] == list(range(1, 31))
    assert losses(events)[-1] < losses(events)[0] - 1.0
    assert (result.steps, result.tokens) == (30, 30 * 512)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


def test_warm_up_leaves_no_trace(tiny_config, tmp_path):
    _, _, without, _ = train(dataclasses.replace(tiny_config, warmup_steps=0), tmp_path / "a")
    _, _, with_warm_up, _ = train(dataclasses.replace(tiny_config, warmup_steps=3), tmp_path / "b")
    assert losses(without) == losses(with_warm_up)


def test_micro_batches_add_up_to_the_batch(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, data_order="shuffled")
    _, _, whole, _ = train(config, tmp_path / "a")
    _, _, quarters, _ = train(dataclasses.replace(config, micro_batch_tokens=128), tmp_path / "b")
    assert losses(quarters) == pytest.approx(losses(whole), rel=1e-4)


def test_a_training_run_opens_training_shards_and_no_validation_shard(tiny_config, tmp_path):
    opened: list[str] = []
    recording = True

    def record(event, arguments):
        if recording and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(record)
    train(tiny_config, tmp_path / "run")
    recording = False
    assert any("tiny_train_000000.bin" in name for name in opened)
    assert not any("_val_" in name for name in opened)


def test_stops_within_the_time_limit(tiny_config, tmp_path):
    # On a busy machine a first slow step makes the forecast end a run early: at 1.5 s it took 3 steps once.
    config = dataclasses.replace(tiny_config, max_wallclock_seconds=3.0, iterations=10**6, train_log_every=10**6)
    _, result, _, _ = train(config, tmp_path / "run")
    assert 1.0 < result.seconds <= 3.0
    assert result.steps > 3


def test_validation_time_is_not_training_time(tiny_config, tmp_path):
    calls = []

    def validate() -> float:
        calls.append(1)
        torch.linalg.inv(torch.randn(1500, 1500))  # takes longer than a step
        return 2.5

    config = dataclasses.replace(tiny_config, val_loss_every=2)
    _, result, events, _ = train(config, tmp_path / "run", validate=validate)
    assert len(calls) == 4
    validations = list(read_events(tmp_path / "run" / "log.jsonl", "validation"))
    assert [event["step"] for event in validations] == [2, 4, 6, 8]
    assert all(event["val_bpb_training"] == 2.5 for event in validations)
    by_step = {event["step"]: event["train_seconds"] for event in events}
    paused_at = validations[0]["train_seconds"]
    resumed = next(event for event in events if event["step"] == 3)["train_seconds"]
    assert by_step[2] <= paused_at <= resumed <= result.seconds
    wall = list(read_events(tmp_path / "run" / "log.jsonl"))
    assert wall[-1]["seconds"] - wall[0]["seconds"] > result.seconds - by_step[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_first_step(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, train_log_every=4, val_loss_every=0, iterations=20, warmup_steps=0)
    model = build_model(config, RANKS)
    calls = 0

    def poisoned(inputs_BT, targets_BT):
        nonlocal calls
        calls += 1
        loss = model(inputs_BT, targets_BT)
        return loss * float("nan") if calls == 6 else loss

    directory = tmp_path / "run"
    with RunLog(directory) as log, open_loader(config, RANKS) as loader:
        trainer = Trainer(config, model, poisoned, loader, 1, RANKS, log)
        with pytest.raises(TrainingError, match=r"not finite since step 6\b.*log is kept in .*run"):
            trainer.train()
    assert calls == 8, "found at the next log line, not by a wait at every step"
    assert [event["step"] for event in read_events(directory / "log.jsonl", "train")] == [1, 4]
    assert next(read_events(directory / "log.jsonl", "not_finite"))["step"] == 6


def test_averages_only_below_half_the_learning_rate(tiny_config, tmp_path):
    # 8 steps, warmdown 6: the scale is below 0.5 once fewer than 3 steps are left
    _, result, _, trainer = train(tiny_config, tmp_path / "a")
    assert result.averaged_copies == 2
    assert trainer.average.copies == 2
    off = dataclasses.replace(tiny_config, swa_enabled=False)
    assert train(off, tmp_path / "b")[1].averaged_copies == 0


def test_the_learning_rate_reaches_the_optimizers(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, matrix_lr=0.0, scalar_lr=0.0, tied_embed_lr=0.0)
    fresh = build_model(config, RANKS)
    model, _, _, _ = train(config, tmp_path / "run")
    for (name, now), (_, before) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(now, before), name


def stopped(config, directory, monkeypatch, *, after: int, resume: bool = False):
    """Trains until a stop is asked for in step `after` of this process."""
    forward = GPT.forward
    stop = StopRequest(announce=False)
    left = after + 1  # the first is the warm-up's

    def counted(self, *batch):
        nonlocal left
        left -= 1
        if left == 0:
            stop.request("SIGTERM")
        return forward(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", counted)
        patch.setattr(stop, "_see_to_it", lambda: None)  # it is this test that ends, not the process
        with pytest.raises(Stopped, match="of 8"):
            train(config, directory, stop=stop, resume=resume)


def same_weights(one, another) -> list[str]:
    """Names of those that are not."""
    pairs = zip(one.named_parameters(), another.named_parameters(), strict=True)
    return [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]


@pytest.mark.parametrize("order", ["in_order", "shuffled"])
def test_stopped_twice_and_resumed_is_as_if_it_never_stopped(tiny_config, tmp_path, monkeypatch, order):
    """To the bit: weights, averages, losses; the last stop is within the averaging."""
    config = dataclasses.replace(tiny_config, data_order=order, checkpoint_seconds=0.0, iterations=8)
    undisturbed, result, events, trainer = train(config, tmp_path / "a")
    stopped(config, tmp_path / "b", monkeypatch, after=3)
    stopped(config, tmp_path / "b", monkeypatch, after=4, resume=True)
    model, again, others, resumed = train(config, tmp_path / "b", resume=True)
    assert same_weights(undisturbed, model) == []
    assert result.averaged_copies == again.averaged_copies == 2
    assert [torch.equal(a, b) for a, b in zip(trainer.average.means, resumed.average.means, strict=True)].count(0) == 0
    assert [(event["step"], event["train_loss"]) for event in others] == [
        (event["step"], event["train_loss"]) for event in events
    ]


def test_training_time_counts_over_processes(tiny_config, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny_config, checkpoint_seconds=0.0)
    stopped(config, tmp_path / "run", monkeypatch, after=4)
    before = decode_checkpoint(checkpoints_in(tmp_path / "run")[0].read_bytes(), "it").state
    assert (before.step, before.ended) == (4, False)
    _, result, events, _ = train(config, tmp_path / "run", resume=True)
    assert result.seconds > before.train_seconds > 0
    assert result.tokens == 8 * 512
    times = [event["train_seconds"] for event in events]
    assert times == sorted(times)
    limited = dataclasses.replace(config, max_wallclock_seconds=1e-3, iterations=10**6)
    _, used_up, _, _ = train(limited, tmp_path / "run", resume=True)
    assert used_up.steps == 4, "of another limit nothing is left"


def test_a_run_that_had_trained_to_its_end_trains_no_more(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, checkpoint_seconds=1e9)
    first, result, _, trainer = train(config, tmp_path / "run")
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["step-00000008.safetensors"]
    model, again, events, resumed = train(config, tmp_path / "run", resume=True)
    assert same_weights(first, model) == []
    assert (again.steps, again.averaged_copies) == (result.steps, result.averaged_copies)
    assert again.seconds == result.seconds
    assert len(events) == 8
    assert resumed.average.apply() == trainer.average.apply()
    assert same_weights(first, model) == []


def test_a_slow_disk_does_not_hold_the_steps_up(tiny_config, tmp_path, monkeypatch):
    """The first checkpoint is being written until the last step is over; meanwhile no other one is begun."""
    forward, write = GPT.forward, background.write_checkpoint
    gate, calls, begun = threading.Event(), [], []

    def counted(self, *batch):
        calls.append(1)
        if len(calls) == 1 + 8:
            gate.set()
        return forward(self, *batch)

    def slow(path, checkpoint):
        begun.append(checkpoint.state.step)
        assert gate.wait(60)
        write(path, checkpoint)

    monkeypatch.setattr(GPT, "forward", counted)
    monkeypatch.setattr(background, "write_checkpoint", slow)
    _, result, _, _ = train(dataclasses.replace(tiny_config, checkpoint_every=1), tmp_path / "run")
    assert result.steps == 8
    assert begun == [1, 8], "one during the steps, and the last when they were over"
    events = list(read_events(tmp_path / "run" / "log.jsonl", "checkpoint"))
    assert events[0]["written_seconds"] > 5 * events[0]["held_seconds"]


def test_a_disk_that_is_full_at_the_stop_is_an_error(tiny_config, tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("cannot write it: No space left on device")

    monkeypatch.setattr(background, "write_checkpoint", full)
    stop = StopRequest(announce=False)
    monkeypatch.setattr(stop, "_see_to_it", lambda: None)

    def validate() -> float:
        stop.request("SIGTERM")
        return 1.0

    with pytest.raises(StorageError, match="No space left"):
        train(tiny_config, tmp_path / "run", stop=stop, validate=validate)


def test_weights_that_are_not_finite_are_not_saved(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_PLAN", faults.planned({"GOLF_FAULTS": "nan@gradient:5"}))  # of step 4
    config = dataclasses.replace(tiny_config, checkpoint_every=1, train_log_every=100, val_loss_every=0)
    with pytest.raises(TrainingError, match="not finite since step 5"):
        train(config, tmp_path / "run")
    saved = [decode_checkpoint(path.read_bytes(), "it") for path in checkpoints_in(tmp_path / "run")]
    assert all(checkpoint.state.step < 4 for checkpoint in saved)
