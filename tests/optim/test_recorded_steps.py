"""Steps that the optimizers record by themselves: the same steps, whatever changes between them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.optim.groups import Optimizers
from golfmodel.runtime.cuda_graphs import captured
from golfmodel.runtime.determinism import determinism
from golfmodel.training.step import Step

pytestmark = pytest.mark.gpu

STEPS, RECORDED_FROM = 8, 2  # the first step makes the state, so the second has a key of its own


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
        self.prepare(number)
        self.optimizers.step()
        return self.optimizers.is_recorded

    def prepare(self, number: int) -> None:
        """Sets gradients and schedule for a step."""
        generator = torch.Generator().manual_seed(number)
        for parameter, place in zip(self.model.parameters(), self.places, strict=True):
            if place is not None:
                place.copy_(torch.randn(place.shape, generator=generator))
                parameter.grad = place
        self.optimizers.set_schedule(lr_scale=1 / (1 + number), momentum=0.85 + 0.01 * number)

    def end(self) -> dict[str, torch.Tensor]:
        """Weights and state."""
        return {**dict(self.model.named_parameters()), **self.optimizers.state_tensors()}


def both(config: Config, take: Callable[[Training], list[bool]]) -> list[bool]:
    """What `take` says where steps may record themselves; without that it comes to the same weights and state."""
    trainings = [Training(config, records=records) for records in (True, False)]
    was_recorded, never = map(take, trainings)
    assert not any(never)
    ours, theirs = (training.end() for training in trainings)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return was_recorded


def steps(training: Training, numbers: range) -> list[bool]:
    return [training.step(number) for number in numbers]


def steps_around(change: Callable[[Training], None]) -> Callable[[Training], list[bool]]:
    """Four steps, the change, and the rest of them."""

    def take(training: Training) -> list[bool]:
        before = steps(training, range(4))
        change(training)
        return before + steps(training, range(4, STEPS))

    return take


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_recorded_steps_are_the_same_steps(config, implementation, monkeypatch):
    monkeypatch.setenv("GOLF_KERNELS", implementation)
    was_recorded = both(config, lambda training: steps(training, range(STEPS)))
    assert was_recorded == [number >= RECORDED_FROM for number in range(STEPS)]


def move_a_gradient(training: Training) -> None:
    training.places[0] = training.places[0].clone()


def leave_a_gradient_out(training: Training) -> None:
    training.places[0] = None


def load_the_state(training: Training) -> None:
    for optimizer in training.optimizers.all:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def exchange_the_state(training: Training) -> None:
    for optimizer in training.optimizers.all:
        doubled = {p: {entry: 2 * tensor for entry, tensor in own.items()} for p, own in optimizer.state.items()}
        optimizer.state = defaultdict(dict, doubled)


def exchange_the_memory_of_the_weights(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data = parameter.data * 0.5


def change_an_option(training: Training) -> None:
    for group in training.optimizers.param_groups:
        group["weight_decay"] = 0.25


def exchange_a_rate(training: Training) -> None:
    training.optimizers.muon.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda")


def clip_elsewhere(training: Training) -> None:
    training.optimizers.grad_clip_norm = 0.1


CHANGES = (
    move_a_gradient,
    leave_a_gradient_out,
    load_the_state,
    exchange_the_state,
    exchange_the_memory_of_the_weights,
    change_an_option,
    exchange_a_rate,
    clip_elsewhere,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_noticed(config, change: Callable[[Training], None]):
    assert both(config, steps_around(change)) == [False, False, True, True, False, True, True, True]


def test_another_choice_of_kernels_is_noticed(config, monkeypatch):
    def take(training: Training) -> list[bool]:
        monkeypatch.setenv("GOLF_KERNELS", "auto")
        return steps_around(lambda _: monkeypatch.setenv("GOLF_KERNELS", "reference"))(training)

    assert both(config, take) == [False, False, True, True, False, True, True, True]


def test_state_that_is_gone_is_noticed(config):
    def clear_the_state(training: Training) -> None:
        for optimizer in training.optimizers.all:
            optimizer.state.clear()

    # as at the start it takes a step to make it
    assert both(config, steps_around(clear_the_state)) == [False, False, True, True] * 2


def test_single_tensors_of_the_state_may_be_exchanged_once_the_graph_is_forgotten(config):
    def exchange(training: Training) -> None:
        training.optimizers.forget()
        for optimizer in training.optimizers.all:
            for state in optimizer.state.values():
                state.update({entry: 2 * tensor for entry, tensor in state.items()})

    assert both(config, steps_around(exchange)) == [False, False, True, True, False, True, True, True]


def skew_a_matrix_gradient(training: Training) -> None:
    matrix = training.optimizers.muon.param_groups[0]["params"][0]
    index = next(index for index, parameter in enumerate(training.model.parameters()) if parameter is matrix)
    training.places[index] = training.places[index].t().contiguous().t()


def keep_a_rate_on_the_host(training: Training) -> None:
    training.optimizers.adam.param_groups[0]["lr"] = torch.tensor(0.5)


def leave_all_gradients_out(training: Training) -> None:
    training.places = [None] * len(training.places)


LAUNCHED = (skew_a_matrix_gradient, keep_a_rate_on_the_host, leave_all_gradients_out)


@pytest.mark.parametrize("change", LAUNCHED, ids=lambda change: change.__name__)
def test_what_a_graph_could_not_follow_is_launched(config, change: Callable[[Training], None]):
    assert both(config, steps_around(change)) == [False, False, True, True, False, False, False, False]


def test_steps_on_another_device_than_the_current_one_are_launched(config):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def take(training: Training) -> list[bool]:
        with torch.cuda.device(0):
            return steps(training, range(STEPS))

    with torch.cuda.device(1):
        assert not any(both(config, take))


def test_a_step_that_somebody_else_records_is_theirs_alone(config):
    def take(training: Training) -> list[bool]:
        steps(training, range(RECORDED_FROM))  # the next one would record itself
        training.prepare(RECORDED_FROM)
        captured(training.optimizers.step, torch.device("cuda", torch.cuda.current_device())).replay()
        return [training.optimizers.is_recorded]

    assert both(config, take) == [False]


def test_a_recorded_step_gives_its_memory_back_to_a_recorded_whole(config, monkeypatch):
    monkeypatch.setattr("golfmodel.training.step.UNRECORDED_STEPS", 0)
    training = Training(config, records=True)
    tokens = torch.zeros(2, config.train_seq_len, dtype=torch.int64, device="cuda")
    training.model(tokens, tokens).backward()  # compiles
    training.model.zero_grad()
    assert steps(training, range(STEPS))[-1]
    step = Step(training.model, training.optimizers, 1, torch.device("cuda"))
    assert bool(torch.isfinite(step([(tokens, tokens)])))
    assert step.is_recorded
    assert not training.optimizers.is_recorded


def test_a_replay_runs_on_the_stream_it_is_asked_for_on(config):
    side = torch.cuda.Stream()

    def take(training: Training) -> list[bool]:
        was_recorded = steps(training, range(4))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            was_recorded += steps(training, range(4, STEPS))
        torch.cuda.current_stream().wait_stream(side)
        return was_recorded

    assert both(config, take) == [number >= RECORDED_FROM for number in range(STEPS)]


def test_gradients_that_backward_puts_where_it_will(config):
    def train(*, records: bool) -> tuple[list[float], list[torch.Tensor]]:
        training = Training(config, records=records)
        losses = []
        for number in range(40):
            generator = torch.Generator().manual_seed(number)
            tokens_BT = torch.randint(2, config.vocab_size, (4, config.train_seq_len), generator=generator).cuda()
            loss = training.model(tokens_BT, tokens_BT)
            loss.backward()
            training.optimizers.step()
            losses.append(float(loss.detach()))
        return losses, list(training.model.parameters())

    with determinism(True):
        ours, theirs = train(records=True), train(records=False)
    assert ours[0] == theirs[0]
    assert all(map(torch.equal, ours[1], theirs[1]))


def test_a_replay_waits_for_nothing_and_counts_as_a_change_of_the_weights(config):
    training = Training(config, records=True)
    assert steps(training, range(4))[-1]
    parameters = list(training.model.parameters())
    before = [parameter._version for parameter in parameters]
    training.prepare(4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.optimizers.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(parameter._version > version for parameter, version in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
