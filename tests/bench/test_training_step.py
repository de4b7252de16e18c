from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.step import TrainingStep, kernels_chosen
from golfmodel.config import Config, resolve
from golfmodel.training.step import STAGES

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_options) -> Config:
    return Config(**{**tiny_options, "bigram_vocab_size": 0, "compile": "off"})


def test_flops_are_those_of_the_products_and_of_causal_attention(config):
    step = TrainingStep(config, CPU, kernels="reference")
    with FlopCounterMode(display=False) as counter:
        step.forward_and_backward(0)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counted.items() if "attention" not in op)
    # The counter takes attention's products in full and knows no causal mask.
    length, width = config.train_seq_len, config.model_dim
    attention = step.tokens * 7.0 * config.num_layers * length * width
    assert step.flops == pytest.approx(products + attention, rel=1e-3)


def test_the_seed_step_is_as_much_work_as_the_project_says():
    """11.5 TFLOP of products and 5.8 of attention at 98,304 tokens."""
    config = resolve(["--preset", "seed", "--train-batch-tokens", "2048", "--micro-batch-tokens", "2048"], {})
    flops = TrainingStep(config, CPU).flops * 48
    assert flops == pytest.approx(17.3e12, rel=0.01)


def test_a_step_trains_and_frees_its_gradients(config):
    step = TrainingStep(config, CPU, kernels="reference")
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    losses = [float(step(index)) for index in range(6)]
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
    assert step.state_bytes > sum(parameter.nbytes for parameter in step.model.parameters())


def test_settling_takes_steps_and_on_a_cpu_counts_no_bytes(config):
    step = TrainingStep(config, CPU, kernels="reference")
    weights = [parameter.detach().clone() for parameter in step.model.parameters()]
    assert step.settle() == 0
    assert not all(map(torch.equal, weights, step.model.parameters()))


@pytest.mark.gpu
def test_a_settled_step_needs_more_than_its_state(config):
    step = TrainingStep(dataclasses.replace(config, device="cuda"), torch.device("cuda"))
    assert step.settle() > step.state_bytes


def test_parts_leave_out_what_they_say(config):
    step = TrainingStep(config, CPU, kernels="reference")
    weights = [parameter.detach().clone() for parameter in step.model.parameters()]
    step.forward_and_backward(0)
    assert all(map(torch.equal, weights, step.model.parameters()))
    alone = step.optimizers_alone(records=False)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    alone(0)
    assert not all(map(torch.equal, weights, step.model.parameters()))
    moved = [parameter.detach().clone() for parameter in step.model.parameters()]
    alone(1)
    assert not all(map(torch.equal, moved, step.model.parameters()))


@pytest.mark.gpu
def test_optimizers_alone_are_replayed_where_they_may_be(config):
    step = TrainingStep(dataclasses.replace(config, device="cuda"), torch.device("cuda"))
    launched = []
    for records in (False, True):
        alone = step.optimizers_alone(records=records)
        alone(0)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            alone(1)
            torch.cuda.synchronize()
        calls = {event.key: event.count for event in profiler.key_averages()}
        launched.append((calls.get("cudaGraphLaunch", 0), any("LaunchKernel" in name for name in calls)))
    assert launched == [(0, True), (1, False)]


def test_profilers_see_the_stages(config):
    step = TrainingStep(config, CPU, kernels="reference")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(0)
    assert set(STAGES) <= {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("before", [None, "triton"])
def test_the_choice_of_kernels_is_put_back(monkeypatch, before):
    monkeypatch.delenv("GOLF_KERNELS", raising=False)
    if before is not None:
        monkeypatch.setenv("GOLF_KERNELS", before)
    with kernels_chosen("reference"):
        assert os.environ["GOLF_KERNELS"] == "reference"
    assert os.environ.get("GOLF_KERNELS") == before
