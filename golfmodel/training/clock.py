"""Training time: what counts, and when to stop so that a limit is kept."""

from __future__ import annotations

import time
from collections import deque

import torch

RECENT_STEPS = 20
SLOWER_BY = 1.25  # a step may be this much slower than every recent one
AFTER_A_STEP = 0.05  # seconds for what follows the last step: an average, a log line, the device's last wait


class TrainingClock:
    """Seconds of training so far; validation and everything else between `pause` and `resume` does not count.

    The host runs ahead of a GPU by at most `STEPS_IN_FLIGHT` steps (`wait_for_room`), so host time is device time to
    within that.
    """

    STEPS_IN_FLIGHT = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counted = 0.0
        self._since: float | None = None
        self._last_lap = 0.0
        self._laps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._in_flight: deque[torch.cuda.Event] = deque()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._counted + running

    @property
    def slowest(self) -> float:
        """Seconds of the slowest recent step; 0 before the first."""
        return max(self._laps, default=0.0)

    def restore(self, seconds: float, slowest: float) -> None:
        """Goes on from an earlier process's training time and slowest recent step; before the first `resume`."""
        self._counted = self._last_lap = seconds
        if slowest:
            self._laps.append(slowest)

    def resume(self) -> None:
        """Counts from now on, once the device has finished what came before."""
        self._synchronize()
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops counting, once the device has finished every step."""
        self._synchronize()
        self._counted, self._since = self.seconds, None

    def step_launched(self) -> None:
        """Marks the end of a step on the device and records how long it kept the host."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._in_flight.append(event)
        now = self.seconds
        self._laps.append(now - self._last_lap)
        self._last_lap = now

    def wait_for_room(self) -> None:
        """Waits until fewer than `STEPS_IN_FLIGHT` steps are unfinished on the device."""
        while len(self._in_flight) >= self.STEPS_IN_FLIGHT:
            self._in_flight.popleft().synchronize()

    def end_of_next_step(self) -> float:
        """When a step launched now would be over at the latest, were it `SLOWER_BY` times the slowest recent one."""
        slowest = SLOWER_BY * self.slowest
        return self.seconds + (len(self._in_flight) + 1) * slowest + AFTER_A_STEP

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._in_flight.clear()
