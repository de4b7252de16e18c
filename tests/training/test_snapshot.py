"""Everything of a run comes back from its copies, and what does not fit the model is refused before that."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from states import a_state

from golfmodel.model.gpt import GPT
from golfmodel.optim.averaging import WeightAverage
from golfmodel.optim.groups import Optimizers
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import CheckpointError
from golfmodel.training.checkpoint import Checkpoint
from golfmodel.training.snapshot import CPU_RANDOM, Expected, Training

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


class Parts:
    """A model that has trained `steps` steps on gradients by seed, each with a copy in its average."""

    def __init__(self, config, steps: int) -> None:
        torch.manual_seed(config.seed)
        self.model = GPT(config)
        self.optimizers, self.average = Optimizers(self.model, config), WeightAverage(self.model.parameters())
        self.training = Training(self.model, self.optimizers, self.average, RANKS)
        for step in range(steps):
            self.step(step)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.optimizers.step()
        self.average.add()


@pytest.fixture
def saved(tiny_config) -> Checkpoint:
    config = dataclasses.replace(tiny_config, compute_dtype="bfloat16")
    parts = Parts(config, 2)
    tensors = parts.training.copied()
    return Checkpoint(a_state(config, step=2, averaged_copies=2), tensors)


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(tiny_config, compute_dtype="bfloat16")


def test_the_copies_are_copies_of_everything(config):
    parts = Parts(config, 2)
    before = parts.training.copied()
    parts.step(2)
    torch.rand(1)
    after = parts.training.copied()
    assert before.keys() == after.keys()
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not unchanged
    for part in ("weight/input.token.weight", "optimizer/input.token.weight.exp_avg", "mean/input.token.weight"):
        assert part in before


def test_a_fresh_run_goes_on_in_the_same_bits(config, saved):
    undisturbed, resumed = Parts(config, 2), Parts(config, 0)
    torch.manual_seed(123)
    resumed.training.restore(saved)
    state = torch.get_rng_state()
    assert torch.equal(state, saved.tensors[CPU_RANDOM][0])
    for parts in (undisturbed, resumed):
        parts.step(2)
        torch.set_rng_state(state)
    ours, theirs = resumed.training.copied(), undisturbed.training.copied()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_rank_that_the_checkpoint_does_not_know_keeps_its_random_state(config, saved):
    parts = Parts(config, 0)
    one_of_two = dataclasses.replace(RANKS, rank=1)
    parts.training._ranks = one_of_two
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parts.training.restore(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_saved_is_what_is_expected(config, saved):
    with torch.device("meta"):
        expected = Expected(GPT(config))
    expected.check(saved, "it")
    assert sum(tensor.nbytes for tensor in saved.tensors.values()) < expected.max_bytes < 40 * 2**20


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("weight/input.token.weight"), "unmatched: weight/input.token.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "unmatched: more"),
        (lambda t: t.pop("optimizer/input.token.weight.step"), r"unmatched: optimizer/input\.token\.weight\.step"),
        (lambda t: t.pop("mean/input.token.weight"), "unmatched: mean/"),
        (lambda t: t.pop(CPU_RANDOM), "unmatched: random/cpu"),
        (lambda t: t.update({CPU_RANDOM: t[CPU_RANDOM].repeat(2, 1)}), r"random/cpu is .* of shape \(2, "),
        (lambda t: t.update({CPU_RANDOM: torch.zeros_like(t[CPU_RANDOM])}), "no state of PyTorch's random generator"),
        (
            lambda t: t.update({"weight/input.token.weight": t["weight/input.token.weight"].T.contiguous()}),
            r"shape \(64, 1024\), this model's is torch.bfloat16 of shape \(1024, 64\)",
        ),
        (
            lambda t: t.update({"weight/input.token.weight": t["weight/input.token.weight"].float()}),
            "is torch.float32 of shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(config, saved, change, what):
    change(saved.tensors)
    with pytest.raises(CheckpointError, match=f"^it: .*{what}"):
        Expected(GPT(config)).check(saved, "it")
