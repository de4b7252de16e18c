from __future__ import annotations

import time

import pytest
import torch

from bench import ceilings
from bench.ceilings import Ceilings
from bench.timing import MAX_ROTATIONS, MeasurementError, Prepared, Times, interleaved, rotations, wall
from bench.tokens import token_batch

CPU = torch.device("cpu")


def test_times_tell_median_and_percentiles():
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0), host=1.0, peak_bytes=0)
    assert times.median == 3.0
    assert times.percentile(20) == pytest.approx(1.8)
    assert times.percentile(80) == pytest.approx(4.2)


@pytest.mark.parametrize(("size", "wanted"), [(0, MAX_ROTATIONS), (1, MAX_ROTATIONS), (16 * 2**20, 10), (2**40, 2)])
def test_rotated_inputs_fill_more_than_the_cache(size, wanted):
    assert rotations(size) == wanted


def test_functions_take_turns_in_every_order_and_inputs_too():
    called = []

    def function(name):
        def call(index):
            called.append((name, index))
            time.sleep(0.002)  # longer than a sample has to be: one call each

        return call

    times = interleaved({name: function(name) for name in "abc"}, sets=2, device=CPU, rounds=4)
    rounds = called[-12:]
    assert [name for name, _ in rounds] == [*"abc", *"bca", *"cab", *"abc"]
    assert [index for _, index in rounds] == [0, 1] * 6
    assert all(len(taken.samples) == 4 for taken in times.values())
    assert all(0.002 <= sample < 0.5 for taken in times.values() for sample in taken.samples)


def test_short_functions_are_called_often_for_a_sample():
    count = 0

    def call(_):
        nonlocal count
        count += 1

    taken = interleaved({"short": call}, sets=1, device=CPU, rounds=3)["short"]
    assert count > 3 * 50
    assert taken.median < 1e-3


def test_what_a_function_finds_prepared_is_not_its_time():
    there = []

    def use(index):
        assert there.pop() == "there"
        time.sleep(0.002)

    def prepare():
        there.append("there")
        time.sleep(0.05)

    taken = interleaved({"prepared": Prepared(prepare, use)}, sets=2, device=CPU, rounds=3)["prepared"]
    assert min(taken.samples) >= 0.002
    assert taken.median < 0.05
    assert taken.host < 0.05


def test_wall_leaves_the_first_call_out():
    durations = iter([0.05, 0.001, 0.001, 0.001])
    times = wall(lambda: time.sleep(next(durations)), device=CPU, rounds=3)
    assert len(times.samples) == 3
    assert max(times.samples) < 0.05


def test_ceilings_bound_time_from_below():
    assert Ceilings(100.0, 10.0).seconds(50.0, 20.0) == 2.0
    assert Ceilings(100.0, 10.0).seconds(500.0, 20.0) == 5.0


def test_ceilings_of_this_machine_are_plausible():
    found = ceilings.measure(CPU)
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second < 1e15


def test_tokens_are_frequent_and_rare():
    tokens = token_batch(8, 4096, 1024, CPU, seed=3)
    assert tokens.shape == (8, 4096)
    assert tokens.dtype == torch.int64
    counts = torch.bincount(tokens.flatten(), minlength=1024)
    assert len(counts) == 1024
    assert counts[0] > 5 * counts[20] > 5 * counts[900:].float().mean()
    assert torch.equal(tokens, token_batch(8, 4096, 1024, CPU, seed=3))
    assert not torch.equal(tokens, token_batch(8, 4096, 1024, CPU, seed=4))


@pytest.mark.gpu
def test_a_copy_on_the_device_takes_what_its_bytes_take():
    device = torch.device("cuda")
    sources = [torch.randint(0, 256, (2**27,), dtype=torch.uint8, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    taken = interleaved({"copy": lambda i: target.copy_(sources[i])}, sets=2, device=device)["copy"]
    assert 2**28 / 6e12 < taken.median < 2**28 / 1e12
    assert taken.host < taken.median
    assert taken.peak_bytes == 0


@pytest.mark.gpu
def test_what_a_function_finds_prepared_is_not_the_hosts_time_on_it():
    x = torch.zeros(2**24, device="cuda")
    prepared = Prepared(lambda: time.sleep(0.005), lambda _: x.add_(1))
    taken = interleaved({"prepared": prepared}, sets=1, device=torch.device("cuda"), rounds=3)["prepared"]
    assert taken.median < 0.001
    assert taken.host < 0.005


@pytest.mark.gpu
def test_more_launches_than_a_queue_holds():
    device = torch.device("cuda")
    x = torch.zeros(2**24, device=device)

    def often(_):
        for _ in range(1500):
            x.add_(1)

    taken = interleaved({"often": often, "once": lambda _: x.add_(1)}, sets=1, device=device, rounds=3)
    assert taken["often"].median == pytest.approx(1500 * taken["once"].median, rel=0.1)
    assert taken["often"].host < 0.05  # not with the time that the queue was held up


@pytest.mark.gpu
def test_memory_is_the_most_that_a_call_holds():
    device = torch.device("cuda")
    x = torch.randn(2**24, device=device)
    taken = interleaved({"twice": lambda _: (x + 1) * 2}, sets=1, device=device, rounds=3)["twice"]
    assert taken.peak_bytes == 2 * x.nbytes


@pytest.mark.gpu
def test_a_function_that_waits_for_the_device_cannot_be_timed():
    x = torch.ones(1, device="cuda")
    with pytest.raises(MeasurementError, match="makes the host wait"):
        interleaved({"waits": lambda _: x.item()}, sets=1, device=torch.device("cuda"), rounds=1)
