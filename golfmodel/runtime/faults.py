"""Faults on demand: the one seam through which tests make a run fail where they want.

`GOLF_FAULTS` lists faults, separated by commas, each `ACTION@POINT`, then `:N` for the N-th time that this process
comes by (1 by default, `*` for every time), then `/RANK` for one rank only:

    GOLF_FAULTS="kill@step:5"                         kill -9 as the fifth training step begins
    GOLF_FAULTS="full@write-step-*:2,nan@gradient:3/1"   two faults; a point may be a pattern, as a shell has them

Actions: `kill` (SIGKILL), `stop` (SIGSTOP: threads and all), `hang` (this thread sleeps for ever), `term` and `int`
(the signals, to itself), `full` (a full disk), `error` (an I/O error), `slow` (half a second), `nan` (for the caller
to carry out).

Points: `warm-up`, `step` and `gradient` of the training loop; `averaging`; `scoring`, at each batch; `read`, before
each micro-batch; `write-NAME`, when the file NAME is written but has not got its name yet.

Faults are for the first try: a process that torchrun has restarted has none.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from golfmodel.runtime.errors import ConfigError

SLOW_SECONDS = 0.5
ACTIONS = ("kill", "stop", "hang", "term", "int", "full", "error", "slow", "nan")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
_ERRORS = {"full": errno.ENOSPC, "error": errno.EIO}
_RULE = re.compile(r"(?P<action>[a-z]+)@(?P<point>[^:/,]+)(:(?P<number>\d+|\*))?(/(?P<rank>\d+))?")


@dataclass
class _Fault:
    action: str
    point: str
    number: int | None  # None: every time
    is_here: bool  # whether it is this rank's
    seen: int = 0


def planned(environment: Mapping[str, str]) -> list[_Fault]:
    """The faults of `GOLF_FAULTS`, other ranks' too.

    Raises:
        ConfigError: one is not written as this module says.
    """
    faults = []
    for text in filter(None, environment.get("GOLF_FAULTS", "").split(",")):
        match = _RULE.fullmatch(text.strip())
        if match is None or match["action"] not in ACTIONS:
            raise ConfigError(f"GOLF_FAULTS has {text!r}: must be ACTION@POINT[:N][/RANK], ACTION {', '.join(ACTIONS)}")
        number = match["number"] or "1"
        is_here = match["rank"] in (None, environment.get("RANK", "0"))
        faults.append(_Fault(match["action"], match["point"], None if number == "*" else int(number), is_here))
    return [] if environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else faults


_PLAN = planned(os.environ) if "GOLF_FAULTS" in os.environ else []


def are_planned(point: str) -> bool:
    """Whether anything is to happen at `point`, on whatever rank: all of them get the same answer."""
    return any(fnmatch.fnmatchcase(point, fault.point) for fault in _PLAN)


def reach(point: str) -> bool:
    """Says that this process has come to `point`, and lets happen what is planned there; nearly free without a plan.

    Returns:
        Whether the caller is to put a NaN into its work.

    Raises:
        OSError: a planned one.
    """
    poisoned = False
    for fault in _PLAN:
        if fault.is_here and fnmatch.fnmatchcase(point, fault.point):
            fault.seen += 1
            if fault.number in (None, fault.seen):
                poisoned |= fault.action == "nan"
                _happen(fault.action)
    return poisoned


def _happen(action: str) -> None:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action in _ERRORS:
        raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]))
    elif action == "hang":
        threading.Event().wait()
    elif action == "slow":
        time.sleep(SLOW_SECONDS)
