"""How far this process has come: written by whoever works, read by the watchdog that tells the other ranks."""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """A place in a run.

    Attributes:
        stage: how many phases were entered; the same phases in the same order on every rank.
        step: training steps begun.
        part: how far within the step or phase.
        phase: in words.
        slow: whether a rank may do without a sign of progress for longer here, as where graphs are compiled.
        signs: of progress in all; more than places, as a long phase has one place and gives many signs.
    """

    stage: int = 0
    step: int = 0
    part: int = 0
    phase: str = "starting"
    slow: bool = True
    signs: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """By which ranks are compared."""
        return self.stage, self.step, self.part


_now = Position()


def now() -> Position:
    """The present place."""
    return _now


def enter(phase: str, *, slow: bool = True) -> None:
    """A phase begins."""
    global _now  # noqa: PLW0603  (what is known of a process is the process's)
    _now = _now._replace(stage=_now.stage + 1, part=0, phase=phase, slow=slow, signs=_now.signs + 1)


def begin_step(step: int) -> None:
    """Training step `step`, from 1, begins."""
    global _now  # noqa: PLW0603
    _now = _now._replace(step=step, part=0, signs=_now.signs + 1)


def part_done() -> None:
    """Part of a step is done, the same on every rank."""
    global _now  # noqa: PLW0603
    _now = _now._replace(part=_now.part + 1, signs=_now.signs + 1)


def sign() -> None:
    """Something moved, perhaps on this rank alone."""
    global _now  # noqa: PLW0603
    _now = _now._replace(signs=_now.signs + 1)
