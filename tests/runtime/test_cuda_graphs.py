"""Calls that are recorded: when, and what becomes of the graph if something changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from golfmodel.runtime import cuda_graphs
from golfmodel.runtime.cuda_graphs import MOST_WASTED_GRAPHS, WORTHWHILE_REPLAYS, GraphedCall, GraphKey, captured

DEVICE = torch.device("cuda", 0)


class Log(list):
    """Stands in for CUDA graphs: says what is recorded, launched and replayed."""

    def capture_begin(self, **_: object) -> None:
        self.append("record")

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        self.append("replay")


@pytest.fixture
def log(monkeypatch) -> Iterator[Log]:
    log = Log()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: log)
    for name in ("Stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda of: nullcontext())
    yield log
    cuda_graphs._stream.cache_clear()


def asked(graphed: GraphedCall, log: Log, key: GraphKey) -> list[str]:
    """What is done when it is asked for."""
    log.clear()
    is_replay = graphed(lambda: log.append("work"), key)
    assert is_replay == (log == ["replay"])
    return list(log)


LAUNCHED, RECORDED, REPLAYED = ["work"], ["record", "work", "replay"], ["replay"]


def test_calls_of_one_key_are_launched_then_recorded_then_replayed(log):
    graphed, tensor = GraphedCall(DEVICE), torch.zeros(3)
    done = [asked(graphed, log, GraphKey([tensor], (tensor.data_ptr(),))) for _ in range(4)]
    assert done == [LAUNCHED, RECORDED, REPLAYED, REPLAYED]
    assert graphed.is_recorded


@pytest.mark.parametrize(
    "other",
    [
        lambda tensor: GraphKey([torch.zeros(3)], (1,)),  # an equal tensor, but another
        lambda tensor: GraphKey([tensor, tensor], (1,)),
        lambda tensor: GraphKey([tensor], (2,)),
    ],
    ids=["object", "count", "value"],
)
def test_a_call_of_another_key_is_launched(log, other: Callable[[torch.Tensor], GraphKey]):
    graphed, tensor = GraphedCall(DEVICE), torch.zeros(3)
    first, second = GraphKey([tensor], (1,)), other(tensor)
    done = [asked(graphed, log, key) for key in (first, first, second, first, second, second, second)]
    assert done == [LAUNCHED, RECORDED, LAUNCHED, LAUNCHED, LAUNCHED, RECORDED, REPLAYED]


def test_a_call_without_a_key_drops_the_graph(log):
    graphed, key = GraphedCall(DEVICE), GraphKey([], (1,))
    done = [asked(graphed, log, each) for each in (key, key, None, key, key)]
    assert done == [LAUNCHED, RECORDED, LAUNCHED, LAUNCHED, RECORDED]


def test_what_is_forgotten_is_launched_next(log):
    graphed, key = GraphedCall(DEVICE), GraphKey([], (1,))
    for _ in range(3):
        asked(graphed, log, key)
    graphed.forget()
    assert not graphed.is_recorded
    assert [asked(graphed, log, key) for _ in range(3)] == [LAUNCHED, RECORDED, REPLAYED]


def test_what_changes_again_and_again_is_launched_in_the_end(log):
    graphed = GraphedCall(DEVICE)
    done = [asked(graphed, log, GraphKey([], (number // 2,))) for number in range(2 * MOST_WASTED_GRAPHS + 4)]
    assert done == [LAUNCHED, RECORDED] * MOST_WASTED_GRAPHS + [LAUNCHED] * 4
    assert graphed.has_given_up


def test_recordings_that_were_worth_their_while_are_not_counted(log):
    graphed = GraphedCall(DEVICE)
    for number in range(2 * MOST_WASTED_GRAPHS):
        done = [asked(graphed, log, GraphKey([], (number,))) for _ in range(2 + WORTHWHILE_REPLAYS)]
        assert done == [LAUNCHED, RECORDED] + [REPLAYED] * WORTHWHILE_REPLAYS


def test_a_recording_that_fails_leaves_no_graph_and_is_not_tried_again(log):
    graphed, key = GraphedCall(DEVICE), GraphKey([], ())

    def failing() -> None:
        raise RuntimeError("out of memory")

    assert asked(graphed, log, key) == LAUNCHED
    with pytest.raises(RuntimeError, match="out of memory"):
        graphed(failing, key)
    assert not graphed.is_recorded
    assert [asked(graphed, log, key) for _ in range(3)] == [LAUNCHED] * 3


def test_what_there_is_no_memory_to_record_is_launched(log):
    graphed, key = GraphedCall(DEVICE), GraphKey([], ())

    def work() -> None:
        log.append("work")
        if log == ["record", "work"]:
            raise torch.OutOfMemoryError

    done = []
    for _ in range(3):
        log.clear()
        assert not graphed(work, key)
        done.append(list(log))
    assert done == [LAUNCHED, ["record", "work", "work"], LAUNCHED]


@pytest.mark.gpu
def test_work_on_another_device_than_the_first_graphs_is_recorded():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for index in (0, 1):
        x = torch.zeros(3, device=f"cuda:{index}")
        with torch.cuda.device(x.device):
            x.add_(1)
        graph = captured(lambda x=x: x.add_(1), x.device)
        assert x.tolist() == [1, 1, 1]
        graph.replay()
        assert x.tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_after_a_failed_recording_others_go_on():
    x, before = torch.zeros(3, device="cuda:0"), torch.cuda.current_stream()

    def failing() -> None:
        x.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        captured(failing, x.device)
    assert torch.cuda.current_stream() == before
    captured(lambda: x.add_(2), x.device).replay()
    assert x.tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_to_record_leaves_the_cache_of_memory():
    x = torch.zeros(3, device="cuda:0")
    torch.empty(2**26, device=x.device)  # given back to the cache at once
    before = torch.cuda.memory_reserved(x.device)
    captured(lambda: x.add_(1), x.device)
    assert torch.cuda.memory_reserved(x.device) >= before
