"""Times of functions that are compared with each other: taken in turn, on inputs that the cache does not hold."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# What one call of a function does; the number says which of the rotated inputs to use.
Timed = Callable[[int], object]

# Inputs that are used in turn fill at least this much: an H100 and an H200 cache 50 MB.
ROTATED_BYTES = 160 * 2**20
MAX_ROTATIONS = 64

ROUNDS = 20
SAMPLE_SECONDS = 1e-3  # device time of one sample, at least, so that an event's 0.5 us do not count
MAX_CALLS = 24  # of one sample: a queue holds 1,024 launches
BEHIND = 0.1  # of a call's time that is still to come when the host has queued all of it, where it did not fit
MAX_SLEEP_SECONDS = 0.5


class MeasurementError(RuntimeError):
    """A time that would not be what it says."""


class Prepared:
    """A function that finds something used up by its last call in place again, which does not count as its time.

    Args:
        prepare: puts it there; gives the device nothing to do.
        function: what is timed.
    """

    def __init__(self, prepare: Callable[[], object], function: Timed) -> None:
        self._prepare, self._function = prepare, function
        self.preparing = 0.0  # seconds, of all calls

    def __call__(self, index: int) -> object:
        begin = time.perf_counter()
        self._prepare()
        self.preparing += time.perf_counter() - begin
        return self._function(index)


@dataclass(frozen=True)
class Times:
    """Seconds per call: one sample a round, and the host's share of a call."""

    samples: tuple[float, ...]
    host: float
    peak_bytes: int  # allocated during one call beyond what was there before; 0 on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: int) -> float:
        """The sample below which `percent` of the samples lie, by linear interpolation."""
        return float(torch.tensor(self.samples, dtype=torch.float64).quantile(percent / 100))


def rotations(bytes_of_a_call: int) -> int:
    """How many sets of inputs it takes so that none is still in the cache when its turn comes."""
    return max(2, min(MAX_ROTATIONS, -(-ROTATED_BYTES // max(bytes_of_a_call, 1))))


def interleaved(
    functions: Mapping[str, Timed], *, sets: int, device: torch.device, rounds: int = ROUNDS
) -> dict[str, Times]:
    """Times each function by name: all of them once in every round, so that a slow moment hits them alike.

    On a GPU a sample is the time between two events around several calls that all wait in the queue before the first
    one starts, so gaps between launches do not count; that they did wait is checked. A call of more launches than a
    queue holds counts if the queue was full at its start and the device still well behind the host at its end. On a CPU
    a sample is wall time.

    Args:
        sets: how many sets of inputs there are; calls take them in turn.
        rounds: samples of each.

    Raises:
        MeasurementError: the device ran ahead of the host even so, or a call waited for it.
    """
    clock = _Device(device) if device.type == "cuda" else _Host()
    for function in functions.values():
        for index in range(min(sets, 3)):  # compiles, and fills what is cached by input
            function(index)
    calls = {name: clock.calls_of_a_sample(function, sets) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    hosts: dict[str, list[float]] = {name: [] for name in functions}
    position = 0
    names = list(functions)
    with _no_garbage_collection():
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds, host = clock.sample(functions[name], position, calls[name], sets)
                position += calls[name]
                samples[name].append(seconds)
                hosts[name].append(host)
    return {
        name: Times(tuple(samples[name]), statistics.median(hosts[name]), clock.peak_bytes(functions[name]))
        for name in names
    }


def wall(function: Callable[[], object], *, device: torch.device, rounds: int) -> Times:
    """Wall times of calls that do much on the host and wait for the device; one call before them is not counted."""
    function()
    samples = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - begin)
    return Times(tuple(samples), statistics.median(samples), peak_bytes=0)


def _seconds_of_calls(function: Timed, position: int, calls: int, sets: int) -> float:
    """Calls it on the inputs from `position` on; returns how long that took the host."""
    begin, prepared = time.perf_counter(), _preparing(function)
    for index in range(position, position + calls):
        function(index % sets)
    return time.perf_counter() - begin - (_preparing(function) - prepared)


def _preparing(function: Timed) -> float:
    """Seconds that went into preparing its calls so far."""
    return function.preparing if isinstance(function, Prepared) else 0.0


class _Host:
    """A CPU, which runs a function when it is called."""

    def calls_of_a_sample(self, function: Timed, sets: int) -> int:
        seconds, _ = self.sample(function, 0, 1, sets)
        return max(1, min(100, round(SAMPLE_SECONDS / seconds)))

    def sample(self, function: Timed, position: int, calls: int, sets: int) -> tuple[float, float]:
        seconds = _seconds_of_calls(function, position, calls, sets) / calls
        return seconds, seconds

    def peak_bytes(self, function: Timed) -> int:
        return 0


class _Device:
    """A GPU, which works off a queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cycles_per_second = self._sleep_rate()
        self._long_enough: dict[Timed, float] = {}  # seconds that the queue has to be held up
        self._least_host: dict[Timed, float] = {}  # seconds a call

    def _sleep_rate(self) -> float:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        begin, end = self._events()
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (begin.elapsed_time(end) * 1e-3)

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def calls_of_a_sample(self, function: Timed, sets: int) -> int:
        seconds, _ = self.sample(function, 0, 1, sets)
        return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / seconds)))

    def sample(self, function: Timed, position: int, calls: int, sets: int) -> tuple[float, float]:
        asleep = self._long_enough.get(function, 1e-4 * calls + 5e-4)
        while asleep <= MAX_SLEEP_SECONDS:
            torch.cuda.synchronize(self.device)
            begin, end = self._events()
            torch.cuda._sleep(int(asleep * self.cycles_per_second))
            begin.record()
            with _no_waiting():
                host = _seconds_of_calls(function, position, calls, sets)
                queued = time.perf_counter()
            waited = not begin.query()
            end.record()
            end.synchronize()
            behind = time.perf_counter() - queued
            seconds = begin.elapsed_time(end) * 1e-3
            # Where the queue is full the host waits, and takes longer than it has to.
            least = self._least_host[function] = min(host / calls, self._least_host.get(function, float("inf")))
            was_full = asleep >= 2 * least * calls
            if waited or (was_full and behind >= BEHIND * seconds):
                self._long_enough[function] = asleep
                return seconds / calls, host / calls if waited else least
            asleep = 2 * max(asleep, least * calls)
        raise MeasurementError(
            f"the device did not wait for the host through {MAX_SLEEP_SECONDS} s: a call takes the host "
            f"{1e3 * host / calls:.1f} ms"
        )

    def peak_bytes(self, function: Timed) -> int:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function(0)
        return torch.cuda.max_memory_allocated(self.device) - before


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes an error of a call that waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says at each change that not everything is noticed
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            raise MeasurementError(
                f"a call makes the host wait for the device, so it cannot be timed: {error}"
            ) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _no_garbage_collection:
    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            gc.enable()
