"""`python -m golfmodel.data demo | download | tokenize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from golfmodel.data import demo, download, tokenize
from golfmodel.runtime.errors import front_door

_COMMANDS = {
    "demo": (demo, "build the small corpus that needs no network"),
    "download": (download, "fetch FineWeb and its tokenizer from the public hub"),
    "tokenize": (tokenize, "turn your own text into shards"),
}


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m golfmodel.data", description="Get text to train on.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
