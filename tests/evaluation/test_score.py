"""Scores of a made-up model whose every loss is known: totals for any batch size and number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golfmodel.evaluation.evaluator import Evaluator
from golfmodel.evaluation.score import Score, score_text
from golfmodel.evaluation.windows import plan_windows
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import DataError

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, world_size=1, device=CPU)


@dataclass(frozen=True)
class CountingText:
    """Token i of the text is i, so that a target says where in the text it is."""

    tokens: np.ndarray
    target_bytes: np.ndarray

    @staticmethod
    def of(num_targets: int) -> CountingText:
        target_bytes = np.random.default_rng(1).integers(0, 5, num_targets).astype(np.int32)
        return CountingText(np.arange(num_targets + 1, dtype=np.uint16), target_bytes)


def costs(num_targets: int) -> Tensor:
    """Nats of every target: whole numbers, so that sums are exact, and random, so that no two sums agree."""
    return torch.randint(1, 2**20, (num_targets,), generator=torch.Generator().manual_seed(0)).float()


class Model:
    """Token losses by place in the text; remembers the shapes it was asked for."""

    def __init__(self, num_targets: int) -> None:
        self.costs, self.shapes = costs(num_targets), set()

    def __call__(self, tokens_RT: Tensor, targets_RT: Tensor) -> Tensor:
        assert tokens_RT.dtype == targets_RT.dtype == torch.int64
        assert tokens_RT.is_contiguous()
        assert targets_RT.is_contiguous()
        assert torch.equal(targets_RT, tokens_RT + 1)
        assert torch.equal(tokens_RT, tokens_RT[:, :1] + torch.arange(tokens_RT.size(1)))
        assert not torch.is_grad_enabled()
        self.shapes.add(tuple(tokens_RT.shape))
        return self.costs[targets_RT - 1]


@pytest.fixture
def partial_sums(monkeypatch) -> None:
    """Ranks that do not speak: `reduce_sum` gives this rank's own part."""
    monkeypatch.setattr(Ranks, "reduce_sum", lambda _ranks, value: value)


def score_on(world_size: int, num_targets: int, length: int, stride: int, **options) -> tuple[Score, list[Model]]:
    """The score of all ranks together, added by hand, and each rank's model."""
    text, windows = CountingText.of(num_targets), plan_windows(num_targets, length, stride)
    models, parts = [], []
    for rank in range(world_size):
        models.append(Model(num_targets))
        ranks = Ranks(rank=rank, world_size=world_size, device=CPU)
        parts.append(score_text(models[-1], text, windows, ranks, **options))
    assert len({part.num_bytes for part in parts}) == 1
    total = Score(
        nats=sum(part.nats for part in parts),
        nats_after_prefix=sum(part.nats_after_prefix for part in parts),
        num_bytes=parts[0].num_bytes,
        num_targets=sum(part.num_targets for part in parts),
    )
    return total, models


def assert_whole(score: Score, num_targets: int, prefix: int = 0) -> None:
    assert score.num_targets == num_targets
    assert score.nats == costs(num_targets).double().sum().item()
    assert score.nats_after_prefix == costs(num_targets)[prefix:].double().sum().item()
    assert score.num_bytes == CountingText.of(num_targets).target_bytes.sum()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("batch_tokens", [1, 8, 24, 100, 10**6])
@pytest.mark.parametrize(("num_targets", "stride"), [(8, 3), (9, 8), (61, 1), (61, 3), (64, 8), (203, 5)])
@pytest.mark.usefixtures("partial_sums")
def test_every_target_once_for_any_batch_size_and_number_of_ranks(num_targets, stride, batch_tokens, world_size):
    score, models = score_on(world_size, num_targets, 8, stride, batch_tokens=batch_tokens)
    assert_whole(score, num_targets)
    # One shape for all batches and ranks, so that a compiled model is compiled once; within what was asked for,
    # unless a single row is more.
    shapes = set().union(*(model.shapes for model in models))
    assert len(shapes) == 1
    rows, length = shapes.pop()
    assert length == 8
    assert rows == 1 or rows * length * world_size <= batch_tokens


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    length=st.integers(1, 20),
    more=st.integers(0, 100),
    stride=st.integers(1, 20),
    batch_tokens=st.integers(1, 300),
    world_size=st.integers(1, 5),
    prefix=st.integers(0, 130),
)
def test_every_target_once_for_any_text(length, more, stride, batch_tokens, world_size, prefix):
    num_targets = length + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "reduce_sum", lambda _ranks, value: value)
        score, _ = score_on(
            world_size, num_targets, length, min(stride, length), batch_tokens=batch_tokens, prefix_targets=prefix
        )
    assert_whole(score, num_targets, prefix)


@pytest.mark.usefixtures("partial_sums")
def test_ranks_share_the_windows_evenly():
    windows = plan_windows(108, 8, 5)
    rows_asked = [0, 0, 0, 0]
    for rank in range(4):

        def count(tokens_RT: Tensor, _targets_RT: Tensor, rank: int = rank) -> Tensor:
            rows_asked[rank] += len(tokens_RT)
            return torch.zeros(tokens_RT.shape)

        score_text(count, CountingText.of(108), windows, Ranks(rank, 4, CPU), batch_tokens=1)
    assert len(windows) == 21
    assert sorted(rows_asked) == [5, 5, 5, 6]


@pytest.mark.parametrize("prefix", [0, 1, 7, 8, 30, 61])
def test_a_prefix_costs_nothing_and_changes_no_other_figure(prefix):
    windows = plan_windows(61, 8, 3)
    score = score_text(Model(61), CountingText.of(61), windows, ALONE, batch_tokens=40, prefix_targets=prefix)
    assert_whole(score, 61, prefix)


def test_a_cost_outside_the_scored_targets_does_not_count():
    """Targets seen again as context, and the rows that fill the last batch, may even be infinite."""
    windows = plan_windows(30, 8, 3)
    counted: set[int] = set()

    def once(_tokens_RT: Tensor, targets_RT: Tensor) -> Tensor:
        losses = torch.ones(targets_RT.shape)
        for place in np.ndindex(*targets_RT.shape):
            target = int(targets_RT[place])
            losses[place] = math.inf if target in counted else 1.0
            counted.add(target)
        return losses

    # Windows come in order, so a target is first seen by the window that scores it.
    score = score_text(once, CountingText.of(30), windows, ALONE, batch_tokens=5 * 8)
    assert score.nats == 30.0


def test_figures_of_a_score():
    score = Score(nats=6 * math.log(2), nats_after_prefix=3 * math.log(2), num_bytes=12, num_targets=4)
    assert score.bits_per_byte == pytest.approx(0.5)
    assert score.bits_per_byte_with_prefix == pytest.approx(0.25)


def test_sums_are_kept_in_float64():
    """A float32 sum of this many tenths is off by 1e-5 of itself."""
    num_targets = 60_000
    text = CountingText.of(num_targets)

    def tenth(tokens_RT: Tensor, _targets_RT: Tensor) -> Tensor:
        return torch.full(tokens_RT.shape, 0.1)

    score = score_text(tenth, text, plan_windows(num_targets, 64, 64), ALONE, batch_tokens=64 * 7)
    assert score.nats == pytest.approx(num_targets * float(np.float32(0.1)), rel=1e-12)


def evaluator(num_targets: int, stride: int) -> Evaluator:
    return Evaluator(CountingText.of(num_targets), ALONE, length=8, stride=stride, batch_tokens=50)


def test_evaluator_scores_the_whole_text_both_ways():
    both = evaluator(61, 3)
    assert_whole(both.side_by_side(Model(61)), 61)
    assert_whole(both.sliding(Model(61), prefix_targets=5), 61, prefix=5)


class Contexts:
    """Costs of 1 where a target stands at least `least` inputs into its row, and 1000 elsewhere."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, tokens_RT: Tensor, _targets_RT: Tensor) -> Tensor:
        place_T = torch.arange(tokens_RT.size(1))
        return torch.where(place_T >= self.least, 1.0, 1000.0).expand(tokens_RT.shape)


def test_sliding_targets_have_context_and_those_side_by_side_need_not():
    both = evaluator(61, 3)
    # Only the first window's first 8 - 3 targets have less than 5 tokens before their own.
    assert both.sliding(Contexts(5)).nats == 5 * 1000 + 56
    assert both.side_by_side(Contexts(5)).nats > 30 * 1000


def test_no_sliding_score_with_stride_0():
    assert evaluator(61, 0).sliding(Model(61)) is None
    assert_whole(evaluator(61, 0).side_by_side(Model(61)), 61)


def test_an_evaluator_refuses_a_text_shorter_than_a_window():
    with pytest.raises(DataError, match=r"7 targets.*EVAL_SEQ_LEN 8"):
        evaluator(7, 3)
