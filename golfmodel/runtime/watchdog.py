"""Ranks that watch each other: one that dies or hangs ends the run, named by those that live."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from golfmodel.runtime import liveness
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import GolfError, RankError
from golfmodel.runtime.sightings import DONE, FAILED, LOST, Sightings
from golfmodel.runtime.stopping import Stopped, StopRequest

ALREADY_ENDING = 5.0  # seconds in which to find out who died, where something has shown that someone did
DEAD = 0.6  # of that: the silence that tells
STATUS = 1
ADVICE = "this run ends; --resume goes on from its newest checkpoint"


class Watchdog:
    """Two threads on every rank: one tells the store where ranks met how far this rank is and reads the others' word,
    one judges. With one rank there is nothing to watch.

    A rank hangs

    - if its threads are silent for `timeout` seconds, as those of a process that was stopped or killed are, or the
      machine's;
    - if it is the furthest behind and gives no sign of progress for `timeout` seconds. A sign is a step begun, a part
      of it done, or anything that a progress bar counts. Where graphs are compiled or one rank works while the others
      wait (warm-up, validation, and all that follows training) it has four times as long;
    - if the store itself is silent for `timeout` seconds, when rank 0, or the launcher, which keeps it, does.

    Each rank that finds so says who, on which host, and at which step, and ends its process with status 1; torchrun
    then ends the others. While this process is being asked to stop, 5 s of silence are enough: then somebody has seen
    a death already. A wish to stop that one rank heard reaches the others here.

    Args:
        timeout: `HANG_TIMEOUT`, seconds.
    """

    def __init__(self, ranks: Ranks, stop: StopRequest, timeout: float) -> None:
        self._ranks, self._stop, self._timeout = ranks, stop, timeout
        self._interval = min(0.5, timeout / 10)
        self._host = socket.gethostname()
        self._beat = 0
        self._left = ""
        self._seen = Sightings(ranks.rank, ranks.world_size, timeout)
        self._awake = self._answered_at = 0.0
        self._lock = threading.Lock()  # of the two lines above
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._ranks.store is not None:
            # a client of its own: one that waits in a call keeps all other threads from it
            self._store = self._ranks.store.clone()
            self._store.set_timeout(timedelta(seconds=self._timeout))
            self._publish()
            with suppress(RuntimeError):  # it may die before its first word
                self._store.wait([_key(rank) for rank in range(self._ranks.world_size)])
                self._exchange_once()
            for work, name in ((self._exchange, "watchdog"), (self._judge, "watchdog-judge")):
                threading.Thread(target=work, name=name, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ranks.store is None:
            return
        if error is None or isinstance(error, Stopped):
            self._leave(DONE)
        elif isinstance(error, GolfError) or not _came_of_talking(trace):
            self._leave(f"{FAILED}: {type(error).__name__}: {error}".splitlines()[0][:300])
        else:
            self._leave(LOST)
            if blamed := self._wait_for_who_ended():
                raise RankError(f"{blamed}; {ADVICE}") from error
            if self._stop.requested:
                raise Stopped("with the others") from error  # who heard of it a moment earlier

    def farewell(self) -> int:
        """Waits a little until every rank has heard of the wish to stop; the status to leave with."""
        if self._ranks.store is None:
            return 0
        deadline = time.monotonic() + ALREADY_ENDING
        while time.monotonic() < deadline:
            with self._lock:
                known = self._seen.all_know_of_the_stop()
            # once more around, for them to hear of this rank too
            self._over.wait(2 * self._interval if known else self._interval)
            if known:
                break
        else:
            with self._lock:
                blamed = self._seen.who_ended(self._awake, DEAD * ALREADY_ENDING)
            if blamed:
                self._end(blamed)
        self._leave(DONE)
        return 0

    def _leave(self, how: str) -> None:
        """Tells the others that, and how, this rank leaves, and stops watching them unless they are needed still."""
        self._left = how
        with suppress(RuntimeError):
            self._publish()
        if how != LOST:
            self._over.set()

    def _publish(self) -> None:
        now = liveness.now()
        self._beat += 1
        record = {
            "host": self._host,
            "beat": self._beat,
            "place": now.place,
            "phase": now.phase,
            "slow": now.slow,
            "signs": now.signs,
            "stopping": self._stop.requested,
            "left": self._left,
        }
        self._store.set(_key(self._ranks.rank), json.dumps(record))

    def _exchange(self) -> None:
        with suppress(RuntimeError):  # the store is gone and will not come back; the judge counts how long
            while not self._over.is_set():
                self._exchange_once()
                self._over.wait(self._interval)

    def _exchange_once(self) -> None:
        self._publish()
        known = [rank for rank in range(self._ranks.world_size) if self._store.check([_key(rank)])]
        texts = self._store.multi_get([_key(rank) for rank in known])
        records = {rank: json.loads(text) for rank, text in zip(known, texts, strict=True)}
        with self._lock:
            self._answered_at = self._awake
            self._seen.look(records, self._awake)
        for rank, record in records.items():
            if record["stopping"] and rank != self._ranks.rank:
                self._stop.request(f"{record['stopping'].split(' on ')[0]} on rank {rank}")

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            with self._lock:
                # a process that was itself stopped for a while has not heard the others meanwhile
                self._awake += min(now - last, 2 * self._interval)
            last = now
            with self._lock:
                blamed = self._verdict()
            if blamed:
                self._end(blamed)

    def _verdict(self) -> str:
        """Who ended or hangs, in words; empty for nobody."""
        silence = min(self._timeout, ALREADY_ENDING) if self._stop.requested else self._timeout
        if self._awake - self._answered_at > silence:
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            keeper = "the launcher" if agent else self._seen.last_seen(0)
            return f"{keeper}, who keeps the store where ranks meet, has been silent for {silence:.0f} s"
        # one that failed gets a moment in which the others fail of it by themselves
        return self._seen.who_ended(self._awake, silence, failed_since=ALREADY_ENDING) or self._seen.who_hangs(
            self._awake
        )

    def _wait_for_who_ended(self) -> str:
        """Waits until it is clear which other rank is gone; empty where all go on."""
        deadline = time.monotonic() + ALREADY_ENDING
        while time.monotonic() < deadline:
            time.sleep(self._interval)
            with self._lock:
                if blamed := self._seen.who_ended(self._awake, DEAD * ALREADY_ENDING):
                    return blamed
        return ""

    def _end(self, blamed: str) -> NoReturn:
        print(f"error (rank {self._ranks.rank}): {blamed}; {ADVICE}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(STATUS)


def _key(rank: int) -> str:
    return f"golf-watchdog/{rank}"


def _came_of_talking(trace: TracebackType | None) -> bool:
    """Whether an error came out of a collective: its innermost frame is ours that talk, or torch.distributed's."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = Path(trace.tb_frame.f_code.co_filename)
    ours = file == Path(__file__).with_name("distributed.py")
    return ours or Path(torch.__file__).parent / "distributed" in file.parents
