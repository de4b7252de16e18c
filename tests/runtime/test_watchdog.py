"""The watchdog of rank 0 of two, in this process, with rank 1 played by the test through a store."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
import torch.distributed as dist

from golfmodel.runtime import watchdog as watchdog_module
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import DataError, RankError
from golfmodel.runtime.stopping import Stopped, StopRequest
from golfmodel.runtime.watchdog import Watchdog

OTHER = {
    "host": "elsewhere",
    "beat": 1,
    "place": [10**6, 7, 0],
    "phase": "training",
    "slow": False,
    "signs": 1,
    "stopping": "",
    "left": "",
}


class Peer:
    """Rank 1, which beats until it is told not to."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.record = store, dict(OTHER)
        self.silent = threading.Event()
        self.say()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def say(self, **changes: object) -> None:
        self.record.update(changes, beat=self.record["beat"] + 1, signs=self.record["signs"] + 1)
        self.store.set("golf-watchdog/1", json.dumps(self.record))

    def hears(self) -> dict:
        return json.loads(self.store.get("golf-watchdog/0"))

    def _beat(self) -> None:
        while not self.silent.wait(0.02):
            self.say()


@pytest.fixture
def store():
    return dist.HashStore()


@pytest.fixture
def peer(store):
    peer = Peer(store)
    yield peer
    peer.silent.set()


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """Whom the watchdog ended the process for; here it only stops watching."""
    blamed: list[str] = []

    def end(self, who):
        blamed.append(who)
        self._over.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(watchdog_module, "ALREADY_ENDING", 1.0)
    return blamed


@pytest.fixture
def stop(monkeypatch) -> StopRequest:
    """One that is only noted."""
    stop = StopRequest(announce=False)
    monkeypatch.setattr(stop, "_see_to_it", lambda: None)
    return stop


def watch(store, stop, timeout: float = 1.0) -> Watchdog:
    return Watchdog(Ranks(rank=0, world_size=2, device=torch.device("cpu"), store=store), stop, timeout)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.01)


def test_one_rank_needs_none(stop):
    with Watchdog(Ranks(rank=0, world_size=1, device=torch.device("cpu")), stop, 1.0) as watchdog:
        assert watchdog.farewell() == 0


def test_a_rank_that_falls_silent_ends_the_run(store, peer, stop, ended):
    with watch(store, stop):
        peer.silent.set()
        wait_for(lambda: ended)
    assert ended[0].startswith("rank 1 on host elsewhere (step 7, training) has given no sign of life")


def test_everyone_is_known_from_the_start(store, stop, ended):
    """One that dies at once has a name, too: the watch begins when all have said theirs."""
    late = threading.Timer(0.2, lambda: store.set("golf-watchdog/1", json.dumps(OTHER)))
    late.start()
    with watch(store, stop) as watchdog:
        assert "rank 1 on host elsewhere" in watchdog._seen.last_seen(1)


def test_a_rank_that_beats_is_left_alone_and_hears_how_this_one_left(store, peer, stop, ended):
    with watch(store, stop):
        first = peer.hears()["beat"]
        wait_for(lambda: peer.hears()["beat"] > first + 20)
    assert not ended
    assert peer.hears()["left"] == "done"


def test_a_store_that_does_not_answer_is_not_waited_for(store, peer, stop, ended, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with watch(store, stop) as watchdog:
        gate = threading.Event()
        monkeypatch.setattr(watchdog, "_publish", gate.wait)
        wait_for(lambda: ended)
        gate.set()
    assert ended == ["the launcher, who keeps the store where ranks meet, has been silent for 1 s"]


def test_a_stop_that_another_rank_heard_is_heard_here(store, peer, stop, ended):
    with watch(store, stop) as watchdog:
        peer.say(stopping="SIGTERM")
        wait_for(lambda: stop.requested)
        assert stop.requested == "SIGTERM on rank 1"
        assert watchdog.farewell() == 0
        assert peer.hears()["stopping"] == "SIGTERM on rank 1"
        assert peer.hears()["left"] == "done"
    assert not ended


def test_a_farewell_to_the_dead_names_them(store, peer, stop, ended):
    with watch(store, stop, timeout=2.0) as watchdog:
        stop.request("SIGTERM")
        peer.silent.set()
        watchdog.farewell()
    assert "rank 1" in ended[0]


def leave_by(error: BaseException, store, stop) -> BaseException | None:
    """What comes out of the watchdog when `error` goes in, from the place where collectives raise theirs."""
    try:
        with watch(store, stop):
            code = compile("raise error", watchdog_module.__file__.replace("watchdog.py", "distributed.py"), "exec")
            exec(code, {"error": error})
    except BaseException as out:
        return out
    return None


def test_a_collective_that_fails_for_a_death_names_the_dead(store, peer, stop, ended):
    peer.silent.set()
    out = leave_by(RuntimeError("Connection closed by peer"), store, stop)
    assert isinstance(out, RankError)
    assert "rank 1 on host elsewhere (step 7, training)" in str(out)
    assert peer.hears()["left"] == "lost the others"


def test_a_collective_that_fails_for_a_failure_says_which(store, peer, stop, ended):
    peer.silent.set()
    peer.say(left="failed: DataError: shard 3")
    out = leave_by(RuntimeError("Connection closed by peer"), store, stop)
    assert isinstance(out, RankError)
    assert "failed: DataError: shard 3; this run ends; --resume goes on" in str(out)


def test_a_collective_that_fails_while_all_stop_is_part_of_the_stop(store, peer, stop, ended):
    stop.request("SIGTERM")
    peer.silent.set()
    peer.say(left="done")
    assert isinstance(leave_by(RuntimeError("Connection closed by peer"), store, stop), Stopped)


def test_an_error_of_this_rank_stays_and_is_told(store, peer, stop, ended):
    out = leave_by(DataError("shard 3"), store, stop)
    assert isinstance(out, DataError)
    assert peer.hears()["left"] == "failed: DataError: shard 3"


def test_a_bug_of_this_rank_stays_itself(store, peer, stop, ended):
    with pytest.raises(RuntimeError, match="a bug"), watch(store, stop):
        raise RuntimeError("a bug")
    assert peer.hears()["left"] == "failed: RuntimeError: a bug"
