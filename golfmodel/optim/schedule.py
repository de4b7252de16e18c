"""Learning rate and momentum as functions of the step and the training time."""

from __future__ import annotations

from golfmodel.config import Config


def learning_rate_scale(config: Config, step: int, elapsed_seconds: float) -> float:
    """The fraction of the full learning rate at a step: 1, then linear to 0 over `WARMDOWN_ITERS` steps.

    With a time limit the fraction is (time left) / (WARMDOWN_ITERS * mean step time), at most 1, so that it reaches 0
    when the time does. Without one it is (steps left) / WARMDOWN_ITERS.

    Args:
        config: gives `ITERATIONS`, `WARMDOWN_ITERS` and `MAX_WALLCLOCK_SECONDS`.
        step: steps taken so far.
        elapsed_seconds: training time so far.
    """
    if config.warmdown_iters == 0:
        return 1.0
    if config.max_wallclock_seconds == 0:
        return min(1.0, max(0, config.iterations - step) / config.warmdown_iters)
    mean_step_seconds = elapsed_seconds / max(step, 1)
    left = max(0.0, config.max_wallclock_seconds - elapsed_seconds)
    length = config.warmdown_iters * mean_step_seconds
    return left / length if left < length else 1.0


def muon_momentum(config: Config, step: int) -> float:
    """Muon's momentum at a step: linear from its start to its final value over the ramp."""
    ramp = config.muon_momentum_warmup_steps
    fraction = min(1.0, step / ramp) if ramp else 1.0
    return (1 - fraction) * config.muon_momentum_warmup_start + fraction * config.muon_momentum
