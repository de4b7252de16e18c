"""Work that is recorded: when, and on a GPU that the optimizers' is the same step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.optim.groups import Optimizers
from golfmodel.optim.repeated import MOST_RECORDINGS, Repeated, Situation


class Log(list):
    """Stands in for CUDA graphs: says what is recorded, launched and replayed."""

    def replay(self) -> None:
        self.append("replay")


@pytest.fixture
def log(monkeypatch) -> Log:
    log = Log()

    def graph(recorded: Log, **_: object) -> nullcontext:
        recorded.append("record")
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: log)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return log


def asked(repeated: Repeated, log: Log, situation: Situation) -> list[str]:
    """What is done when it is asked for."""
    log.clear()
    is_replay = repeated(lambda: log.append("work"), situation)
    assert is_replay == (log == ["replay"])
    return list(log)


LAUNCHED, RECORDED, REPLAYED = ["work"], ["record", "work", "replay"], ["replay"]


def test_work_in_one_situation_is_launched_then_recorded_then_replayed(log):
    repeated, tensor = Repeated(torch.device("cpu")), torch.zeros(3)
    done = [asked(repeated, log, Situation([tensor], (tensor.data_ptr(),))) for _ in range(4)]
    assert done == [LAUNCHED, RECORDED, REPLAYED, REPLAYED]
    assert repeated.is_recorded


@pytest.mark.parametrize(
    "other",
    [
        lambda tensor: Situation([torch.zeros(3)], (1,)),  # an equal tensor, but another
        lambda tensor: Situation([tensor, tensor], (1,)),
        lambda tensor: Situation([tensor], (2,)),
    ],
    ids=["object", "count", "value"],
)
def test_another_situation_is_launched(log, other: Callable[[torch.Tensor], Situation]):
    repeated, tensor = Repeated(torch.device("cpu")), torch.zeros(3)
    first, second = Situation([tensor], (1,)), other(tensor)
    done = [asked(repeated, log, situation) for situation in (first, first, second, first, second, second, second)]
    assert done == [LAUNCHED, RECORDED, LAUNCHED, LAUNCHED, LAUNCHED, RECORDED, REPLAYED]


def test_what_changes_again_and_again_is_launched_in_the_end(log):
    repeated = Repeated(torch.device("cpu"))
    done = [asked(repeated, log, Situation([], (number // 2,))) for number in range(2 * MOST_RECORDINGS + 4)]
    assert done == [LAUNCHED, RECORDED] * MOST_RECORDINGS + [LAUNCHED] * 4
    assert not repeated.is_recorded


def test_a_recording_that_fails_leaves_no_graph(log):
    repeated, situation = Repeated(torch.device("cpu")), Situation([], ())

    def failing() -> None:
        raise RuntimeError("out of memory")

    assert asked(repeated, log, situation) == LAUNCHED
    with pytest.raises(RuntimeError, match="out of memory"):
        repeated(failing, situation)
    assert not repeated.is_recorded
    assert asked(repeated, log, situation) == RECORDED


STEPS, RECORDED_FROM = 8, 2  # the first step makes the state, so the second is in a situation of its own


@pytest.fixture
def config(tiny_options) -> Config:
    return Config(**{**tiny_options, "grad_clip_norm": 0.3, "compute_dtype": "bfloat16", "tie_embeddings": False})


class Training:
    """A model on a GPU and its optimizers; gradients are given, and lie at one place each."""

    def __init__(self, config: Config, *, records: bool) -> None:
        torch.manual_seed(0)
        self.model = GPT(config).cuda()
        self.optimizers = Optimizers(self.model, config, records=records)
        self.places = [torch.empty_like(parameter) for parameter in self.model.parameters()]

    def step(self, number: int) -> bool:
        """Returns whether it is recorded after it."""
        generator = torch.Generator().manual_seed(number)
        for parameter, place in zip(self.model.parameters(), self.places, strict=True):
            place.copy_(torch.randn(place.shape, generator=generator))
            parameter.grad = place
        self.optimizers.set_schedule(lr_scale=1 / (1 + number), momentum=0.85 + 0.01 * number)
        self.optimizers.step()
        return self.optimizers.is_recorded

    def end(self) -> dict[str, torch.Tensor]:
        """Weights and state."""
        return {**dict(self.model.named_parameters()), **self.optimizers.state_tensors()}


def move_a_gradient(training: Training) -> None:
    training.places[0] = training.places[0].clone()


def skew_a_matrix_gradient(training: Training) -> None:
    matrix = training.optimizers.muon.param_groups[0]["params"][0]
    index = next(index for index, parameter in enumerate(training.model.parameters()) if parameter is matrix)
    training.places[index] = training.places[index].t().contiguous().t()


def load_the_state(training: Training) -> None:
    for optimizer in training.optimizers.all:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def exchange_the_state(training: Training) -> None:
    for optimizer in training.optimizers.all:
        for state in optimizer.state.values():
            state.update({entry: 2 * tensor for entry, tensor in state.items()})


def change_an_option(training: Training) -> None:
    for group in training.optimizers.param_groups:
        group["weight_decay"] = 0.25


def exchange_a_rate(training: Training) -> None:
    training.optimizers.muon.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda")


def clip_elsewhere(training: Training) -> None:
    training.optimizers.grad_clip_norm = 0.1


def exchange_the_weights(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data = parameter.data * 0.5


CHANGES = (
    move_a_gradient,
    load_the_state,
    exchange_the_state,
    change_an_option,
    exchange_a_rate,
    clip_elsewhere,
    exchange_the_weights,
)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_recorded_steps_are_the_same_steps(config, implementation, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", implementation)
    found = []
    for records in (True, False):
        training = Training(config, records=records)
        was_recorded = [training.step(number) for number in range(STEPS)]
        assert was_recorded == [records and number >= RECORDED_FROM for number in range(STEPS)]
        found.append(training.end())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_noticed(config, change: Callable[[Training], None]):
    found = []
    for records in (True, False):
        training = Training(config, records=records)
        was_recorded = [training.step(number) for number in range(4)]
        change(training)
        was_recorded += [training.step(number) for number in range(4, STEPS)]
        if records:
            assert was_recorded == [False, False, True, True, False, True, True, True]
        found.append(training.end())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.gpu
def test_gradients_that_the_kernels_cannot_take_where_they_lie_are_not_recorded(config):
    training = Training(config, records=True)
    skew_a_matrix_gradient(training)
    assert not any([training.step(number) for number in range(STEPS)])


@pytest.mark.gpu
def test_a_replay_waits_for_nothing_and_counts_as_a_change_of_the_weights(config):
    training = Training(config, records=True)
    for number in range(3):
        training.step(number)
    assert training.optimizers.is_recorded
    parameters = list(training.model.parameters())
    before = [parameter._version for parameter in parameters]
    for parameter, place in zip(parameters, training.places, strict=True):
        parameter.grad = place
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.optimizers.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(parameter._version > version for parameter, version in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
