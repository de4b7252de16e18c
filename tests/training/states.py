"""A run state for tests to start from."""

from __future__ import annotations

from typing import Any

from golfmodel.config import Config
from golfmodel.training.checkpoint import RunState


def a_state(config: Config, **changes: Any) -> RunState:
    """Of a run of one rank before its first step, but for `changes`."""
    values: dict[str, Any] = {
        "step": 0,
        "train_seconds": 0.0,
        "slowest_step": 0.0,
        "ended": False,
        "last_logged": (0, 0.0),
        "averaged_copies": 0,
        "batches": {},
        "resumed_at": (),
        "world_size": 1,
        "config": config.to_dict(),
        "inputs": {},
        "code": "0" * 64,
    }
    return RunState(**{**values, **changes})
