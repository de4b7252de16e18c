from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from golfmodel.pipeline import build_model, open_loader
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import TrainingError
from golfmodel.runtime.runlog import RunLog, read_events
from golfmodel.training.trainer import Trainer

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def train(config, directory, *, loss=None, validate=None):
    """Trains `config` and returns (model, result, the log's train events, trainer)."""
    with RunLog(directory) as log, open_loader(config, RANKS) as loader:
        model = build_model(config, RANKS)
        trainer = Trainer(config, model, loss or model, loader, loader.micro_batches_per_step, RANKS, log, validate)
        trainer.warm_up()
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
    config = dataclasses.replace(tiny_config, max_wallclock_seconds=1.5, iterations=10**6, train_log_every=10**6)
    _, result, _, _ = train(config, tmp_path / "run")
    assert 0.5 < result.seconds <= 1.5
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
