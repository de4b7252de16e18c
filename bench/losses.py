"""The same steps on the same batches by other ways of computing them: `python -m bench.losses --beside MLP_FP8=1`.

Prints how far the losses come apart and writes `losses.json`. How far rounding alone takes them, two ways of computing
the definitions show: `--beside GOLF_KERNELS=reference --beside GOLF_KERNELS=reference,COMPILE=off`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.run_options import RunParser
from bench.step import kernels_chosen
from bench.table import environment, table
from golfmodel.config import Config, resolve
from golfmodel.pipeline import build_model, open_loader
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.distributed import process_group
from golfmodel.runtime.errors import ConfigError, front_door
from golfmodel.runtime.files import write_json
from golfmodel.runtime.runlog import RunLog, read_events
from golfmodel.runtime.versions import versions
from golfmodel.training.trainer import Trainer
from kernels import dispatch

OURS = "as it is"
KERNELS = "GOLF_KERNELS"
LAST = 0.1  # of the steps, whose mean loss is told: one batch's loss is a noisy sample
SHOWN = 8  # steps


def losses(config: Config, kernels: str) -> list[float]:
    """The loss of every training step."""
    torch.compiler.reset()
    with kernels_chosen(kernels), tempfile.TemporaryDirectory() as directory, process_group(config.device, {}) as ranks:
        model = build_model(config, ranks)
        loss = compiled(model, config.compile, ranks.device, gains=model.gains_from_compiling)
        with RunLog(directory) as log, open_loader(config, ranks) as loader:
            trainer = Trainer(config, model, loss, loader, loader.micro_batches_per_step, ranks, log)
            trainer.warm_up()
            trainer.train()
        return [event["train_loss"] for event in read_events(Path(directory) / "log.jsonl", "train")]


def compare(ways: Mapping[str, tuple[Config, str]]) -> dict[str, Any]:
    """What goes into `losses.json`: each way's losses, how far they are from the first's, and the mean of the last.

    Distances are relative: (loss - the first's) / the first's, in root mean square over the steps and at most.
    """
    found = {name: losses(*way) for name, way in ways.items()}
    first = next(iter(found.values()))
    last = max(1, round(LAST * len(first)))

    def described(values: Sequence[float]) -> dict[str, Any]:
        apart = [value / other - 1 for value, other in zip(values, first, strict=True)]
        return {
            "losses": list(values),
            "rms_apart": statistics.fmean(each * each for each in apart) ** 0.5,
            "most_apart": max(map(abs, apart)),
            "mean_of_last": statistics.fmean(values[-last:]),
        }

    config = next(iter(ways.values()))[0]
    return {
        "versions": versions(),
        "config": config.to_dict(),
        "last_steps": last,
        "ways": {name: described(values) for name, values in found.items()},
    }


def render(content: Mapping[str, Any]) -> str:
    """What is in a `losses.json` as Markdown."""
    config, ways = content["config"], content["ways"]
    steps = config["iterations"]
    shown = sorted({round(1 + index * (steps - 1) / (SHOWN - 1)) for index in range(SHOWN)})
    header = ["by", *(f"step {step}" for step in shown), f"last {content['last_steps']}", "apart", "at most"]
    lines = [
        [
            name,
            *(f"{way['losses'][step - 1]:.4f}" for step in shown),
            f"{way['mean_of_last']:.4f}",
            f"{way['rms_apart']:.2e}",
            f"{way['most_apart']:.2e}",
        ]
        for name, way in ways.items()
    ]
    described = (
        f"{environment(content['versions'])}; {steps} steps of {config['train_batch_tokens']:,} tokens. `apart`: the "
        "losses' relative distance from the first row's, in root mean square over the steps."
    )
    return f"{described}\n\n{table(header, lines)}"


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains each way, prints the table and writes the file; returns the exit status."""
    options, of_the_run = _parser().split(arguments)
    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}: must be at least 1")
    of_the_run += ["--iterations", str(options.steps), "--max-wallclock-seconds", "0", "--train-log-every", "1"]
    ways = {OURS: _way(of_the_run, {})}
    for text in options.beside or [f"{KERNELS}=reference"]:
        ways[text] = _way(of_the_run, _assignments(text))
    content = compare(ways)
    write_json(options.output / "losses.json", content)
    print(render(content))
    print(f"losses: {options.output / 'losses.json'}", file=sys.stderr)
    return 0


def _way(of_the_run: Sequence[str], settings: Mapping[str, str]) -> tuple[Config, str]:
    """The config, and what `GOLF_KERNELS` is."""
    flags = [f"--{name.lower().replace('_', '-')}={value}" for name, value in settings.items() if name != KERNELS]
    kernels = settings.get(KERNELS, dispatch.chosen())
    if kernels not in dispatch.CHOICES:
        raise ConfigError(f"--beside has {KERNELS}={kernels}: must be one of {', '.join(dispatch.CHOICES)}")
    return resolve([*of_the_run, *flags], os.environ, program="python -m bench.losses"), kernels


def _assignments(text: str) -> dict[str, str]:
    pairs = [each.partition("=") for each in text.split(",")]
    if not all(name and sign for name, sign, _ in pairs):
        raise ConfigError(f"--beside is {text!r}: must be NAME=VALUE, or several with commas between")
    return {name: value for name, _, value in pairs}


def _parser() -> RunParser:
    parser = RunParser(
        "python -m bench.losses",
        "[--steps N] [--beside NAME=VALUE]... [--output DIR]",
        "The same training steps by other ways of computing them: how far the losses come apart.",
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps of each (default: 200)")
    parser.add_argument(
        "--beside",
        action="append",
        metavar="NAME=VALUE",
        help=f"options that another way has, with commas between; {KERNELS} is one (default: {KERNELS}=reference)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/losses"), help="directory (default: runs/losses)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
