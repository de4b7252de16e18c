"""A step beside its parts written out; and on a GPU, that its graph is the same step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.optim.groups import Optimizers
from golfmodel.runtime import faults
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.determinism import determinism
from golfmodel.training.step import STAGES, UNRECORDED_STEPS, Step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STEPS = UNRECORDED_STEPS + 4


@pytest.fixture
def config(tiny_options) -> Config:
    return Config(**{**tiny_options, "grad_clip_norm": 0.3})


def micro_batches(config: Config, step: int, count: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(step)
    shape = (count, 2, 4, config.train_seq_len)
    tokens = torch.randint(2, config.vocab_size, shape, generator=generator).to(device)
    return [tuple(pair.unbind()) for pair in tokens]


def built(config: Config, device: torch.device, *, records: bool = True) -> tuple[GPT, Optimizers]:
    torch.manual_seed(0)
    model = GPT(config).to(device)
    return model, Optimizers(model, config, records=records)


def set_schedule(optimizers: Optimizers, number: int) -> None:
    optimizers.set_schedule(lr_scale=1 / (1 + number), momentum=0.85 + 0.01 * number)


def train(config: Config, device: torch.device, steps: range, *, records: bool, count: int = 2):
    """Losses and weights of steps with a schedule that changes."""
    model, optimizers = built(config, device, records=records)
    loss = compiled(model, config.compile, device, gains=model.gains_from_compiling)
    step = Step(loss, optimizers, count, device, records=records)
    losses = []
    for number in steps:
        set_schedule(optimizers, number)
        losses.append(float(step(iter(micro_batches(config, number, count, device)))))
    assert step.is_recorded == (records and device.type == "cuda" and len(steps) > UNRECORDED_STEPS)
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def test_a_step_is_the_mean_of_its_micro_batches_then_the_optimizers(config):
    losses, weights = train(config, CPU, range(2), records=True)
    model, optimizers = built(config, CPU)
    for number in range(2):
        set_schedule(optimizers, number)
        parts = [model(*each) / 2 for each in micro_batches(config, number, 2, CPU)]
        for part in parts:
            part.backward()
        optimizers.step()
        assert losses[number] == float(sum(parts).detach())
    assert all(map(torch.equal, weights, model.parameters()))


def test_micro_batches_are_read_one_by_one_where_nothing_is_recorded(config):
    model, optimizers = built(config, CPU)
    seen = []

    def loss(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        seen.append("loss")
        return model(inputs_BT, targets_BT)

    def read():
        for each in micro_batches(config, 0, 2, CPU):
            seen.append("read")
            yield each

    Step(loss, optimizers, 2, CPU)(read())
    assert seen == ["read", "loss", "read", "loss"]


def test_a_fault_in_the_gradients_is_of_a_step(config, monkeypatch):
    monkeypatch.setattr(faults, "_PLAN", faults.planned({"GOLF_FAULTS": "nan@gradient:2"}))
    losses, weights = train(config, CPU, range(3), records=True)
    assert [math.isnan(loss) for loss in losses] == [False, False, True]
    assert any(bool(weight.isnan().any()) for weight in weights)


@pytest.fixture
def on_gpu(config) -> Iterator[Config]:
    sizes = {"num_layers": 3, "model_dim": 256, "num_heads": 4, "train_seq_len": 256, "eval_seq_len": 256}
    with determinism(True):
        yield dataclasses.replace(config, compute_dtype="bfloat16", **sizes)
    torch.compiler.reset()


EVERY_OPTION = {"qat_enabled": True, "mtp_num_heads": 1, "tie_embeddings": False}
OPTIONS = {
    "as it comes": {},
    "every option": EVERY_OPTION,
    "FP8": {"mlp_fp8": True},
    "compiled": {"compile": "on"},
    "documents": {"document_boundaries": True, **EVERY_OPTION},  # compiled by itself
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "implementation"),
    [*((name, "auto") for name in OPTIONS), ("as it comes", "reference")],
)
def test_a_recorded_step_is_the_same_step(on_gpu, options, implementation, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", implementation)
    config = dataclasses.replace(on_gpu, **OPTIONS[options])
    expected = train(config, GPU, range(STEPS), records=False)
    found = train(config, GPU, range(STEPS), records=True)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.gpu
def test_a_recorded_step_goes_on_from_what_is_put_in_place(on_gpu):
    """As after warm-up and on resuming: weights and state change between replays, and the graph takes them up."""
    expected = train(on_gpu, GPU, range(STEPS), records=False)
    model, optimizers = built(on_gpu, GPU)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    step = Step(model, optimizers, 2, GPU)
    for number in range(STEPS):  # throw-away
        step(micro_batches(on_gpu, 100 + number, 2, GPU))
    assert step.is_recorded
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), start)
    optimizers.reset()

    def go_on(steps: range) -> list[float]:
        losses = []
        for number in steps:
            set_schedule(optimizers, number)
            losses.append(float(step(micro_batches(on_gpu, number, 2, GPU))))
        return losses

    losses = go_on(range(3))
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    go_on(range(50, 52))  # elsewhere
    optimizers.load_state_tensors(saved)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), weights)
    losses += go_on(range(3, 4))
    step.forget()  # and recorded anew
    losses += go_on(range(4, STEPS))
    assert losses == expected[0]
    assert all(map(torch.equal, model.parameters(), expected[1]))


@pytest.mark.gpu
def test_a_recorded_step_is_one_launch_and_never_waits(on_gpu):
    model, optimizers = built(on_gpu, GPU)
    step = Step(model, optimizers, 1, GPU)
    batches = micro_batches(on_gpu, 0, 1, GPU)
    for _ in range(UNRECORDED_STEPS + 1):
        step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_schedule(optimizers, 1)
        step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step(batches)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["cudaGraphLaunch"] == 1
    assert sum(count for name, count in calls.items() if "LaunchKernel" in name) <= 2  # the copies of the inputs
    assert not calls.keys() & set(STAGES)
    assert bool(torch.isfinite(step(batches)))


@pytest.mark.gpu
def test_a_micro_batch_of_another_shape_is_refused(on_gpu):
    model, optimizers = built(on_gpu, GPU)
    step = Step(model, optimizers, 1, GPU)
    [(inputs_BT, targets_BT)] = micro_batches(on_gpu, 0, 1, GPU)
    for _ in range(UNRECORDED_STEPS + 1):
        step([(inputs_BT, targets_BT)])
    with pytest.raises(ValueError, match=r"shapes \[\[1, 256\], \[1, 256\]\]: the recorded step takes \[4, 256\]"):
        step([(inputs_BT[:1], targets_BT[:1])])


@pytest.mark.gpu
def test_a_failed_recording_leaves_nothing_behind(on_gpu):
    """Not in the middle of a backward, whose gradients were to lie in the graph's memory, nor after it."""
    expected = train(on_gpu, GPU, range(STEPS), records=False)
    model, optimizers = built(on_gpu, GPU)
    fails = {"now": False}

    def loss(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        value = model(inputs_BT, targets_BT)
        if fails["now"] and any(parameter.grad is not None for parameter in model.parameters()):
            raise ZeroDivisionError  # at the second micro-batch
        return value

    step = Step(loss, optimizers, 2, GPU)
    losses = []
    for number in range(STEPS):
        set_schedule(optimizers, number)
        if number == UNRECORDED_STEPS:
            fails["now"] = True
            with pytest.raises(ZeroDivisionError):
                step(micro_batches(on_gpu, number, 2, GPU))
            fails["now"] = False
            assert not step.is_recorded
            assert all(parameter.grad is None for parameter in model.parameters())
        losses.append(float(step(micro_batches(on_gpu, number, 2, GPU))))
    assert losses == expected[0]
    assert all(map(torch.equal, model.parameters(), expected[1]))
