"""Work that is recorded: when, and what becomes of it if something changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from golfmodel.runtime import recording
from golfmodel.runtime.recording import MOST_WASTED, WORTH, Repeated, Situation, recorded

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
    recording._stream.cache_clear()


def asked(repeated: Repeated, log: Log, situation: Situation) -> list[str]:
    """What is done when it is asked for."""
    log.clear()
    is_replay = repeated(lambda: log.append("work"), situation)
    assert is_replay == (log == ["replay"])
    return list(log)


LAUNCHED, RECORDED, REPLAYED = ["work"], ["record", "work", "replay"], ["replay"]


def test_work_in_one_situation_is_launched_then_recorded_then_replayed(log):
    repeated, tensor = Repeated(DEVICE), torch.zeros(3)
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
    repeated, tensor = Repeated(DEVICE), torch.zeros(3)
    first, second = Situation([tensor], (1,)), other(tensor)
    done = [asked(repeated, log, situation) for situation in (first, first, second, first, second, second, second)]
    assert done == [LAUNCHED, RECORDED, LAUNCHED, LAUNCHED, LAUNCHED, RECORDED, REPLAYED]


def test_without_a_situation_all_is_forgotten(log):
    repeated, situation = Repeated(DEVICE), Situation([], (1,))
    done = [asked(repeated, log, each) for each in (situation, situation, None, situation, situation)]
    assert done == [LAUNCHED, RECORDED, LAUNCHED, LAUNCHED, RECORDED]


def test_what_is_forgotten_is_launched_next(log):
    repeated, situation = Repeated(DEVICE), Situation([], (1,))
    for _ in range(3):
        asked(repeated, log, situation)
    repeated.forget()
    assert not repeated.is_recorded
    assert [asked(repeated, log, situation) for _ in range(3)] == [LAUNCHED, RECORDED, REPLAYED]


def test_what_changes_again_and_again_is_launched_in_the_end(log):
    repeated = Repeated(DEVICE)
    done = [asked(repeated, log, Situation([], (number // 2,))) for number in range(2 * MOST_WASTED + 4)]
    assert done == [LAUNCHED, RECORDED] * MOST_WASTED + [LAUNCHED] * 4
    assert repeated.has_given_up


def test_recordings_that_were_worth_their_while_are_not_counted(log):
    repeated = Repeated(DEVICE)
    for number in range(2 * MOST_WASTED):
        done = [asked(repeated, log, Situation([], (number,))) for _ in range(2 + WORTH)]
        assert done == [LAUNCHED, RECORDED] + [REPLAYED] * WORTH


def test_a_recording_that_fails_leaves_no_graph_and_is_not_tried_again(log):
    repeated, situation = Repeated(DEVICE), Situation([], ())

    def failing() -> None:
        raise RuntimeError("out of memory")

    assert asked(repeated, log, situation) == LAUNCHED
    with pytest.raises(RuntimeError, match="out of memory"):
        repeated(failing, situation)
    assert not repeated.is_recorded
    assert [asked(repeated, log, situation) for _ in range(3)] == [LAUNCHED] * 3


def test_what_there_is_no_memory_to_record_is_launched(log):
    repeated, situation = Repeated(DEVICE), Situation([], ())

    def work() -> None:
        log.append("work")
        if log == ["record", "work"]:
            raise torch.OutOfMemoryError

    done = []
    for _ in range(3):
        log.clear()
        assert not repeated(work, situation)
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
        graph = recorded(lambda x=x: x.add_(1), x.device)
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
        recorded(failing, x.device)
    assert torch.cuda.current_stream() == before
    recorded(lambda: x.add_(2), x.device).replay()
    assert x.tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_to_record_leaves_the_cache_of_memory():
    x = torch.zeros(3, device="cuda:0")
    torch.empty(2**26, device=x.device)  # given back to the cache at once
    before = torch.cuda.memory_reserved(x.device)
    recorded(lambda: x.add_(1), x.device)
    assert torch.cuda.memory_reserved(x.device) >= before
