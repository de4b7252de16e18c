"""The errors a user can cause, one base class, and how a front door reports them and ends."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class GolfError(Exception):
    """Something the user can mend; the message names the thing, its value and what would be valid."""


class ConfigError(GolfError, ValueError):
    """An option that is unknown, malformed, impossible, or at odds with another."""


class DataError(GolfError, ValueError):
    """A corpus, shard or tokenizer that is missing, damaged, or does not fit the model."""


class ArtifactError(GolfError, ValueError):
    """An artifact or paid prefix that is damaged, foreign, or does not fit the text."""


class TrainingError(GolfError, RuntimeError):
    """A training run that cannot go on, such as one whose loss is no longer finite."""


class CheckpointError(GolfError, ValueError):
    """A checkpoint that is damaged, foreign, or not of this run."""


class RankError(GolfError, RuntimeError):
    """Another rank died, failed or hangs."""


class StorageError(GolfError, OSError):
    """A file or directory that cannot be written."""


def front_door(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command's `main`: a `GolfError` becomes one line on stderr and exit status 2.

    Under torchrun, ranks other than 0 say which they are.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs)
        except GolfError as error:
            rank = os.environ.get("RANK", "0")
            print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
            return 2
        except BrokenPipeError:
            # Whoever read the output has left, as `| head` does. The interpreter would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return guarded


def leave(status: int) -> NoReturn:
    """Ends a front door's process with `status`.

    One of several ranks ends at once, without Python's shutdown: a gloo thread that comes to free the tensors of the
    last collective during it aborts the process (seen with torch 2.13, in 2 of 16 runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(status)
    sys.exit(status)
