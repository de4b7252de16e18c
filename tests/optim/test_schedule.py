from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golfmodel.config import Config
from golfmodel.optim.schedule import learning_rate_scale, muon_momentum

TIMED = Config(max_wallclock_seconds=600.0, warmdown_iters=3000)
COUNTED = Config(max_wallclock_seconds=0.0, iterations=1000, warmdown_iters=200)


@pytest.mark.parametrize(
    ("step", "elapsed", "expected"),
    [
        (0, 0.0, 1.0),
        (1, 0.1, 1.0),
        (2999, 299.9, 1.0),
        (3000, 300.0, 1.0),  # 300 s left, a warmdown of 3000 steps of 0.1 s
        (4500, 450.0, 0.5),
        (5700, 570.0, 0.1),
        (6000, 600.0, 0.0),
        (6001, 600.1, 0.0),
        (10, 599.0, 1 / (3000 * 59.9)),
    ],
)
def test_by_the_clock(step, elapsed, expected):
    assert learning_rate_scale(TIMED, step, elapsed) == pytest.approx(expected, abs=1e-12)


def test_by_the_clock_a_first_step_that_took_all_the_time():
    assert learning_rate_scale(TIMED, 0, 700.0) == 0.0
    assert learning_rate_scale(TIMED, 1, 600.0) == 0.0


def test_by_the_clock_a_warmdown_longer_than_the_run_starts_below_1():
    # 0.3 s a step: 2000 steps fit, a warmdown of 3000 would take 900 s.
    assert learning_rate_scale(TIMED, 1000, 300.0) == pytest.approx(300 / 900)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (799, 1.0), (800, 1.0), (801, 0.995), (900, 0.5), (999, 0.005), (1000, 0.0)]
)
def test_by_the_step(step, expected):
    assert learning_rate_scale(COUNTED, step, 12345.0) == pytest.approx(expected)


def test_by_the_step_beyond_the_end():
    assert learning_rate_scale(COUNTED, 1500, 0.0) == 0.0


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_without_a_warmdown_the_rate_is_constant(seconds):
    config = Config(max_wallclock_seconds=seconds, warmdown_iters=0)
    for step, elapsed in ((0, 0.0), (10, 1.0), (6000, 600.0), (20000, 700.0)):
        assert learning_rate_scale(config, step, elapsed) == 1.0


@settings(deadline=None, derandomize=True)
@given(
    limit=st.sampled_from([0.0, 1.0, 600.0]),
    warmdown=st.integers(0, 10_000),
    step_seconds=st.floats(1e-4, 100.0),
    iterations=st.integers(1, 10_000),
)
def test_it_never_rises_nor_leaves_its_range(limit, warmdown, step_seconds, iterations):
    config = Config(max_wallclock_seconds=limit, warmdown_iters=warmdown, iterations=iterations)
    steps = sorted({0, 1, 2, 3, 10, 100, 1000, 10_000, iterations - 1, iterations})
    scales = [learning_rate_scale(config, step, step * step_seconds) for step in steps]
    assert all(0.0 <= scale <= 1.0 for scale in scales)
    # Rounding of (time left) / (mean step time) may lift it by a unit in the last place.
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(scales))


def test_momentum_ramps_linearly():
    config = Config(muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500)
    for step, expected in ((0, 0.92), (1, 0.92 + 0.07 / 1500), (750, 0.955), (1499, 0.99 - 0.07 / 1500)):
        assert muon_momentum(config, step) == pytest.approx(expected, abs=1e-12)
    for step in (1500, 1501, 20000):
        assert muon_momentum(config, step) == 0.99


def test_momentum_without_a_ramp():
    config = Config(muon_momentum=0.95, muon_momentum_warmup_steps=0)
    assert muon_momentum(config, 0) == muon_momentum(config, 1) == 0.95
