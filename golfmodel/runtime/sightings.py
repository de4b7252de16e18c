"""What a rank knows of the others, and whom it finds dead or hanging. Times are seconds that this process was awake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from golfmodel.runtime import liveness

SLOW_PHASES = 4  # times as long without progress where graphs are compiled or one rank works alone
DONE, FAILED, LOST = "done", "failed", "lost the others"


def longest_patience(timeout: float) -> float:
    """Seconds for which a rank may make no progress where it may be slow, by `HANG_TIMEOUT`."""
    return SLOW_PHASES * timeout


@dataclass
class _Sighting:
    """A rank's last record, and since when its beat and its signs of progress are the same."""

    record: dict[str, Any] = field(default_factory=dict)
    beat_at: float = 0.0
    progress_at: float = 0.0

    @property
    def left(self) -> str:
        """How the rank says it left; empty while it is there."""
        return self.record.get("left", "")


class Sightings:
    """Records of all ranks, as they come.

    A record has `host`; `beat`, which grows each time; `place`, `phase`, `slow` and `signs` as `liveness.Position`;
    `stopping`, who asked for a stop; and `left`: empty, DONE, LOST or FAILED with the reason.

    Args:
        rank: this one.
        world_size: how many there are.
        timeout: `HANG_TIMEOUT`.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self._rank, self._timeout = rank, timeout
        self._of = [_Sighting() for _ in range(world_size)]

    def look(self, records: Mapping[int, dict[str, Any]], now: float) -> None:
        """Takes in what was read at `now`."""
        for rank, record in records.items():
            seen = self._of[rank]
            if record["beat"] != seen.record.get("beat"):
                seen.beat_at = now
            if record["signs"] != seen.record.get("signs"):
                seen.progress_at = now
            seen.record = record

    def all_know_of_the_stop(self) -> bool:
        """Whether every other rank was asked to stop too, or has left."""
        return all(self._of[rank].record.get("stopping") or self._of[rank].left for rank in self._others)

    def who_ended(self, now: float, silence: float, *, failed_since: float = 0.0) -> str:
        """A rank that failed at least `failed_since` seconds ago, or was silent for `silence`, in words; or empty."""
        for rank in self._others:
            if self._of[rank].left.startswith(FAILED) and self._quiet(rank, now) >= failed_since:
                return f"{self._named(rank)} {self._of[rank].left}"
        silent = [
            r for r in self._others if self._of[r].record and not self._of[r].left and self._quiet(r, now) > silence
        ]
        if not silent:
            return ""
        first = max(silent, key=lambda rank: self._quiet(rank, now))
        return f"{self.last_seen(first)} has given no sign of life for {self._quiet(first, now):.0f} s"

    def who_hangs(self, now: float) -> str:
        """The rank furthest behind, if nobody at its place has moved for too long, in words; or empty.

        The last one that is there keeps nobody waiting.
        """
        here = [rank for rank, seen in enumerate(self._of) if seen.record and not seen.left]
        last_place = min((self._of[rank].record["place"] for rank in here), default=None)
        behind = [rank for rank in here if self._of[rank].record["place"] == last_place]
        idle = {rank: now - self._of[rank].progress_at for rank in behind}
        if len(here) < 2 or any(idle[rank] <= self._patience(rank) for rank in behind):
            return ""
        worst = max(behind, key=lambda rank: idle[rank])
        return f"{self._named(worst)} has made no progress for {idle[worst]:.0f} s"

    def last_seen(self, rank: int) -> str:
        """A rank whose last word may be older than its last step, in words.

        Ranks begin their steps together, so it was where this one is now.
        """
        record, now = self._of[rank].record, liveness.now()
        if not record:
            return f"rank {rank}"
        (_, step, _), phase = max((tuple(record["place"]), record["phase"]), (now.place, now.phase))
        return f"rank {rank} on host {record['host']} (step {step}, {phase})"

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(len(self._of)) if rank != self._rank]

    def _quiet(self, rank: int, now: float) -> float:
        return now - self._of[rank].beat_at

    def _patience(self, rank: int) -> float:
        return longest_patience(self._timeout) if self._of[rank].record["slow"] else self._timeout

    def _named(self, rank: int) -> str:
        record = self._of[rank].record
        return f"rank {rank} on host {record['host']} (step {record['place'][1]}, {record['phase']})"
