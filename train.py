"""The front door: `torchrun --standalone --nproc_per_node=N train.py`, or `python train.py` for one rank.

Options come from flags, environment variables and presets; `--help` lists them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from golfmodel.config import resolve
from golfmodel.runtime.errors import front_door, leave


@front_door
def main(arguments: Sequence[str]) -> int:
    config = resolve(arguments, os.environ)
    # PyTorch is loaded only now, so that `--help` and a mistyped option answer at once.
    from golfmodel.pipeline import run  # noqa: PLC0415

    run(config)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
