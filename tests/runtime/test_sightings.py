"""Three ranks, seen by rank 0, with a limit of 10 s."""

from __future__ import annotations

import pytest

from golfmodel.runtime import liveness
from golfmodel.runtime.sightings import DONE, FAILED, LOST, SLOW_PHASES, Sightings

LIMIT = 10.0


class Others:
    """What ranks say, second by second."""

    def __init__(self) -> None:
        self.seen = Sightings(0, 3, LIMIT)
        self.now = 0.0
        self.records = {
            rank: {
                "host": f"host{rank}",
                "beat": 0,
                "place": [1, 5, 0],
                "phase": "training",
                "slow": False,
                "signs": 0,
                "stopping": "",
                "left": "",
            }
            for rank in range(3)
        }

    def go_on(self, seconds: float, *, silent: tuple[int, ...] = (), idle: tuple[int, ...] = (), **changes) -> None:
        for rank, record in self.records.items():
            record.update(changes)
            if rank not in idle and rank not in silent:
                record["signs"] += 1
        self.look()  # news at once, then time goes by
        for _ in range(round(seconds)):
            self.now += 1
            for rank, record in self.records.items():
                record["beat"] += rank not in silent
                record["signs"] += rank not in silent and rank not in idle
            self.look()

    def look(self) -> None:
        self.seen.look({rank: dict(record) for rank, record in self.records.items()}, self.now)

    def verdict(self) -> str:
        return self.seen.who_ended(self.now, LIMIT, failed_since=5) or self.seen.who_hangs(self.now)


@pytest.fixture
def others(monkeypatch) -> Others:
    monkeypatch.setattr(liveness, "_now", liveness.Position())  # other tests have gone places
    return Others()


def test_nobody_before_anything_was_heard():
    seen = Sightings(0, 3, LIMIT)
    assert seen.who_ended(1e9, LIMIT) == seen.who_hangs(1e9) == ""
    assert seen.last_seen(2) == "rank 2"


def test_nobody_while_all_go_on(others):
    others.go_on(100)
    assert others.verdict() == ""


def test_the_one_that_is_silent(others):
    others.go_on(10, silent=(2,))
    assert others.verdict() == ""
    others.go_on(1, silent=(2,))
    assert others.verdict().startswith("rank 2 on host host2 (step 5, training) has given no sign of life for 11 s")


def test_the_one_that_was_silent_first(others):
    others.go_on(5, silent=(2,))
    others.go_on(11, silent=(1, 2))
    assert others.verdict().startswith("rank 2")


def test_of_ranks_that_wait_for_one_the_one(others):
    for rank in (0, 2):
        others.records[rank]["place"] = [1, 6, 0]
    others.go_on(10, idle=(0, 1, 2))
    assert others.verdict() == ""
    others.go_on(1, idle=(0, 1, 2))
    assert others.verdict() == "rank 1 on host host1 (step 5, training) has made no progress for 11 s"


def test_of_ranks_at_one_place_the_one_that_moved_least(others):
    others.go_on(3, idle=(2,))
    others.go_on(11, idle=(0, 1, 2))
    assert others.verdict().startswith("rank 2")


def test_a_silent_one_was_where_this_one_is_now(others, monkeypatch):
    monkeypatch.setattr(liveness, "_now", liveness.Position(stage=1, step=9, phase="training"))
    others.go_on(11, silent=(2,))
    assert others.verdict().startswith("rank 2 on host host2 (step 9, training) has given no sign of life")


def test_nobody_hangs_while_the_last_one_moves(others):
    """As when one rank writes the artifact and the others wait at the same place or a later one."""
    others.records[2]["place"] = [2, 0, 0]
    others.go_on(100, idle=(0, 2))
    assert others.verdict() == ""


def test_slow_phases_take_longer(others):
    others.go_on(SLOW_PHASES * LIMIT, idle=(0, 1, 2), slow=True)
    assert others.verdict() == ""
    others.go_on(1, idle=(0, 1, 2), slow=True)
    assert "no progress" in others.verdict()


def test_one_that_failed_gets_a_moment_to_end_the_others_by_itself(others):
    others.records[1]["left"] = f"{FAILED}: DataError: a bad shard"
    others.go_on(4, silent=(1,))
    assert others.verdict() == ""
    assert "DataError" in others.seen.who_ended(others.now, LIMIT)
    others.go_on(1, silent=(1,))
    assert others.verdict() == "rank 1 on host host1 (step 5, training) failed: DataError: a bad shard"


@pytest.mark.parametrize("how", [DONE, LOST])
def test_those_that_left_are_not_missed(others, how):
    others.records[1]["left"] = how
    others.go_on(100, silent=(1,))
    assert others.verdict() == ""


def test_the_last_one_there_takes_the_time_it_needs(others):
    for rank in (1, 2):
        others.records[rank]["left"] = DONE
    others.go_on(1000, idle=(0,))
    assert others.verdict() == ""


def test_whether_all_know_of_the_stop(others):
    others.go_on(1)
    assert not others.seen.all_know_of_the_stop()
    others.records[1]["stopping"] = "SIGTERM"
    others.go_on(1)
    assert not others.seen.all_know_of_the_stop()
    others.records[2]["left"] = DONE
    others.go_on(1)
    assert others.seen.all_know_of_the_stop()
