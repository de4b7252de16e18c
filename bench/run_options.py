"""Command lines that take every option of a run beside their own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from golfmodel.config import Config
from golfmodel.runtime.distributed import runs_on_gpu
from golfmodel.runtime.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """One whose complaints are typed."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class RunParser(Parser):
    """Parses the command's own options, and leaves a run's to `golfmodel.config.resolve`."""

    def __init__(self, command: str, usage: str, description: str) -> None:
        super().__init__(
            prog=command,
            usage=f"{command} [--preset NAME] {usage} [--option VALUE ...]",
            description=description,
            epilog="Takes every option of a run as well: train.py --help lists them.",
            allow_abbrev=False,
        )
        self.add_argument("--preset", help="a complete config to start from (default: quick on a GPU, demo on a CPU)")
        self.add_argument("--device", help="where to run: auto, cpu or cuda (default: auto)")

    def split(self, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The command's own options, and the run's as `resolve` takes them."""
        options, rest = self.parse_known_args(arguments)
        device = options.device or os.environ.get("DEVICE", Config.device)
        preset = options.preset or os.environ.get("PRESET") or ("quick" if runs_on_gpu(device) else "demo")
        return options, ["--preset", preset, "--device", device, *rest]
