from __future__ import annotations

import pytest
import torch

from golfmodel.training import clock as clock_module
from golfmodel.training.clock import AFTER_A_STEP, RECENT_STEPS, SLOWER_BY, TrainingClock


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time in seconds, as its only element."""
    time = [1000.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: time[0])
    return time


@pytest.fixture
def clock(now) -> TrainingClock:
    return TrainingClock(torch.device("cpu"))


def take_step(clock: TrainingClock, now: list[float], seconds: float) -> None:
    clock.wait_for_room()
    now[0] += seconds
    clock.step_launched()


def over(now: float, slowest: float) -> float:
    """When the next step must be over, by the forecast's definition."""
    return pytest.approx(now + SLOWER_BY * slowest + AFTER_A_STEP)


def test_counts_only_while_it_runs(clock, now):
    assert clock.seconds == 0.0
    now[0] += 5  # building the model
    clock.resume()
    now[0] += 2
    assert clock.seconds == pytest.approx(2)
    clock.pause()
    now[0] += 100  # a validation
    assert clock.seconds == pytest.approx(2)
    clock.resume()
    now[0] += 3
    assert clock.seconds == pytest.approx(5)
    clock.pause()
    assert clock.seconds == pytest.approx(5)


def test_the_next_step_is_expected_to_be_as_slow_as_the_slowest(clock, now):
    clock.resume()
    assert clock.end_of_next_step() == over(0, 0)
    for seconds in (0.5, 2.0, 1.0):
        take_step(clock, now, seconds)
    assert clock.end_of_next_step() == over(3.5, 2.0)
    now[0] += 0.25
    assert clock.end_of_next_step() == over(3.75, 2.0)


def test_a_slow_step_is_forgotten_in_time(clock, now):
    clock.resume()
    take_step(clock, now, 30.0)
    for _ in range(RECENT_STEPS - 1):
        take_step(clock, now, 1.0)
    assert clock.end_of_next_step() == over(30 + RECENT_STEPS - 1, 30)
    take_step(clock, now, 1.0)
    assert clock.end_of_next_step() == over(30 + RECENT_STEPS, 1)


def test_a_validation_does_not_make_a_step_slow(clock, now):
    clock.resume()
    take_step(clock, now, 1.0)
    clock.pause()
    now[0] += 500
    clock.resume()
    take_step(clock, now, 1.0)
    assert clock.seconds == pytest.approx(2)
    assert clock.end_of_next_step() == over(2, 1)


def test_an_earlier_process_counts(clock, now):
    clock.restore(590.0, 2.0)
    assert clock.slowest == 2.0
    clock.resume()
    assert clock.seconds == pytest.approx(590)
    assert clock.end_of_next_step() == over(590, 2.0)
    take_step(clock, now, 1.0)
    assert clock.seconds == pytest.approx(591)
    for _ in range(RECENT_STEPS - 1):
        take_step(clock, now, 0.1)
    assert clock.slowest == pytest.approx(1.0)


def test_a_run_that_asks_before_each_step_keeps_its_limit(clock, now):
    """As the trainer does: it stops where the next step could end too late."""
    clock.resume()
    steps = 0
    while not steps or clock.end_of_next_step() <= 600.0:
        take_step(clock, now, 7.0 + steps % 3)
        steps += 1
    assert 600.0 - 2.5 * 9.0 < clock.seconds <= 600.0


def test_a_last_step_slower_than_every_recent_one_still_keeps_the_limit(clock, now):
    clock.resume()
    while clock.end_of_next_step() + 0.1 <= 600.0:
        take_step(clock, now, 0.1)
    assert clock.end_of_next_step() <= 600.0
    take_step(clock, now, 0.1 * 1.2)
    assert 599.5 < clock.seconds <= 600.0


@pytest.mark.gpu
def test_on_a_gpu_it_waits_for_the_device():
    clock = TrainingClock(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    clock.resume()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(6):
        clock.wait_for_room()
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
        clock.step_launched()
    end.record()
    clock.pause()
    assert clock.seconds >= 0.95 * begin.elapsed_time(end) / 1000
