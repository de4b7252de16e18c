"""Any training script of the challenge beside ours: in turn, on the same shards, batch and GPUs.

Batches are the same; what a script makes of one is its own: on one GPU most take a step in 8 parts, ours in parts of
MICRO_BATCH_TOKENS (both 98,304 tokens at the default batch).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.tokens import token_batch
from bench.watched_run import Contender, Run, run_once
from golfmodel.config import Config, resolve
from golfmodel.data import demo
from golfmodel.data.shards import find_shards, split_marker, write_shard
from golfmodel.runtime.errors import ConfigError, DataError, front_door
from golfmodel.runtime.files import write_bytes, write_json
from golfmodel.runtime.versions import PROJECT_ROOT, versions

OUR_SCRIPT = PROJECT_ROOT / "train.py"
OURS, OUR_REFERENCE = "ours", "ours, GOLF_KERNELS=reference"
SAME_FOR_ALL = ("TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN", "VOCAB_SIZE")
BY_OPTION = {"DATA_PATH": "--data-path", "TOKENIZER_PATH": "--tokenizer-path"}
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}

CLOCKS_AGREE_WITHIN = 0.03
MIN_TRAINING_TOKENS, MAX_TRAINING_TOKENS, VALIDATION_TOKENS = 1_000_000, 8_000_000, 65_536
CONTROL_PIECES = 3  # <unk>, <s> and </s>, the first of the vocabulary


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Compares and reports; the exit status is 1 if a run was cut short."""
    options = _parser().parse_args(arguments)
    _check(options)
    warm_up = options.warm_up_steps
    steps = -(-options.steps // warm_up) * warm_up
    if steps != options.steps:
        print(f"measuring {steps} steps, a multiple of --warm-up-steps {warm_up}", file=sys.stderr)
    config, contenders = _line_up(options, warm_up, warm_up + steps)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-peer-", ignore_cleanup_errors=True) as temporary:
        workspace = Path(temporary)
        data = _corpus(options, config, warm_up + steps, workspace / "data")
        for number, each in interleaved(contenders, options.rounds):
            # Compiled code is kept from a contender's first run to its next and taken from nowhere else, so that every
            # contender's first run starts cold.
            own = workspace / f"cache-{contenders.index(each)}"
            caches = {variable: str(own / kind) for variable, kind in CACHES.items()}
            run = run_once(
                dataclasses.replace(each, settings={**caches, **each.settings, **data}),
                number,
                workspace / f"run-{len(runs)}",
                nproc=options.nproc,
                batch_tokens=config.train_batch_tokens,
                warm_up=warm_up,
                last_step=warm_up + steps,
                timeout=options.timeout,
            )
            runs.append(run)
            outcome = run.problem or f"{run.ms_per_step:.2f} ms/step, first step after {run.first_step_seconds:.1f} s"
            print(f"round {number + 1}, {each.name}: {outcome}", file=sys.stderr, flush=True)
    result = {
        "script": str(options.script),
        "data": str(options.data_path or "synthetic"),
        "nproc": options.nproc or 1,
        "batch_tokens": config.train_batch_tokens,
        "train_seq_len": config.train_seq_len,
        "warm_up_steps": warm_up,
        "steps": steps,
        "rounds": options.rounds,
        "environment": {each.name: each.settings for each in contenders},
        "summary": summarize(runs, config.train_batch_tokens),
        "runs": [dataclasses.asdict(run) for run in runs],
        "versions": versions(),
    }
    print(report(result))
    if options.output:
        write_json(options.output, result)
    return 1 if any(run.problem for run in runs) else 0


def _line_up(options: argparse.Namespace, warm_up: int, iterations: int) -> tuple[Config, list[Contender]]:
    """Our config, and who runs with which variables, before those that name data and caches."""
    common, peer, our = (
        _settings(flag, texts)
        for flag, texts in (("--env", options.env), ("--peer-env", options.peer_env), ("--our-env", options.our_env))
    )
    defaults = {
        "ITERATIONS": str(iterations),
        "MAX_WALLCLOCK_SECONDS": "0",
        "VAL_LOSS_EVERY": "0",
        # A warmdown would start at once in so short a run, and with it what scripts do late in a run only.
        "WARMDOWN_ITERS": "0",
        # In every script a log line waits for the device. Lines this far apart mark both ends of what is measured and
        # disturb little of what lies between.
        "TRAIN_LOG_EVERY": str(warm_up),
    }
    config = resolve([], {**os.environ, **defaults, **common, **our})
    config.rows_per_micro_batch(options.nproc or 1)  # or it says why ranks cannot share the batch
    shared = {**defaults, **common, **{name: str(getattr(config, name.lower())) for name in SAME_FOR_ALL}}
    script = options.script.resolve()
    contenders = [
        Contender(OURS, OUR_SCRIPT, {**shared, **our}),
        Contender(f"{script.parent.name}/{script.name}", script, {**shared, **peer}),
    ]
    if options.reference:
        contenders.append(Contender(OUR_REFERENCE, OUR_SCRIPT, {**shared, **our, "GOLF_KERNELS": "reference"}))
    for each in contenders:
        told = each.settings["ITERATIONS"]
        if not told.isdecimal() or int(told) < iterations:
            raise ConfigError(
                f"ITERATIONS of {each.name} is {told!r}: must be at least {iterations}, warm-up and steps"
            )
    return config, contenders


def interleaved(contenders: Sequence[Contender], rounds: int) -> Iterator[tuple[int, Contender]]:
    """(round, contender): all of them every round, from the other end every other round."""
    for number in range(rounds):
        yield from ((number, each) for each in (contenders if number % 2 == 0 else reversed(contenders)))


def _settings(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping.

    Raises:
        ConfigError: one is malformed, or names a variable that has an option of its own or must be the same for all.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{flag} is {text!r}: must be NAME=VALUE, such as NUM_LAYERS=8")
        if name in BY_OPTION:
            raise ConfigError(f"{flag} sets {name}: use {BY_OPTION[name]}")
        if flag != "--env" and name in SAME_FOR_ALL:
            raise ConfigError(f"{flag} sets {name}, which must be the same for all: use --env")
        settings[name] = value
    return settings


def _check(options: argparse.Namespace) -> None:
    if not options.script.is_file():
        raise ConfigError(f"--script is {options.script}: no such file; name a training script such as train_gpt.py")
    for name in ("steps", "warm_up_steps", "rounds", "nproc", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: must be above 0")
    if (options.data_path is None) != (options.tokenizer_path is None):
        raise ConfigError("--data-path and --tokenizer-path belong together: name both, or neither for random tokens")
    if options.tokenizer_path and not options.tokenizer_path.is_file():
        raise ConfigError(f"--tokenizer-path is {options.tokenizer_path}: no such file")


def _corpus(options: argparse.Namespace, config: Config, iterations: int, directory: Path) -> dict[str, str]:
    """The variables that name the shards and the tokenizer, those of the options or random ones."""
    if options.data_path:
        for split in ("train", "val"):
            pattern = f"fineweb{split_marker(split)}*.bin"
            if not any(path.match(pattern) for path in find_shards(options.data_path, split)):
                raise DataError(f"--data-path {options.data_path} has no {pattern}, which the challenge's scripts read")
        return {"DATA_PATH": str(options.data_path.resolve()), "TOKENIZER_PATH": str(options.tokenizer_path.resolve())}
    if config.vocab_size != demo.DEMO_VOCAB_SIZE:
        raise ConfigError(
            f"VOCAB_SIZE is {config.vocab_size}: random tokens have {demo.DEMO_VOCAB_SIZE} pieces; name other shards "
            "with --data-path and --tokenizer-path"
        )
    tokens = min(config.train_batch_tokens * iterations, MAX_TRAINING_TOKENS)
    tokenizer = synthetic_corpus(directory, max(tokens, MIN_TRAINING_TOKENS, 2 * config.train_batch_tokens))
    return {"DATA_PATH": str(directory), "TOKENIZER_PATH": str(tokenizer)}


def synthetic_corpus(directory: Path, training_tokens: int) -> Path:
    """Writes random tokens as a shard a split, and a tokenizer; returns the tokenizer's path."""
    for seed, (split, count) in enumerate((("train", training_tokens), ("val", VALIDATION_TOKENS))):
        tokens = token_batch(1, count + 1, demo.DEMO_VOCAB_SIZE, torch.device("cpu"), seed=seed)[0]
        # Moves the frequent ids past the pieces that part documents, which then are thousands of tokens long.
        tokens = (tokens + CONTROL_PIECES) % demo.DEMO_VOCAB_SIZE
        write_shard(directory / f"fineweb{split_marker(split)}000000.bin", tokens.numpy())
    train, _ = demo.split_documents(demo.read_standard_library(demo.standard_library()))
    write_bytes(directory / demo.DEMO_TOKENIZER, demo.train_tokenizer([document.text for document in train]))
    return directory / demo.DEMO_TOKENIZER


def summarize(runs: Sequence[Run], batch_tokens: int) -> dict[str, dict[str, Any]]:
    """Figures by contender over its rounds; None where they are not known of every run.

    Time per step as median, least and most; tokens a second at the median; seconds to the first step in the first run
    (cold) and the median of the later ones (warm); bytes of the largest peak.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run.contender for run in runs):
        of_name = [run for run in runs if run.contender == name]
        paces, peaks = [run.ms_per_step for run in of_name], [run.peak_memory_bytes for run in of_name]
        cold, *warm = (run.first_step_seconds for run in of_name)
        whole = None not in paces
        found[name] = {
            "ms_per_step": statistics.median(paces) if whole else None,
            "ms_per_step_min": min(paces) if whole else None,
            "ms_per_step_max": max(paces) if whole else None,
            "tokens_per_second": 1e3 * batch_tokens / statistics.median(paces) if whole else None,
            "first_step_seconds_cold": cold,
            "first_step_seconds_warm": statistics.median(warm) if warm else None,
            "peak_memory_bytes": None if None in peaks else max(peaks),
        }
    return found


def report(result: Mapping[str, Any]) -> str:
    """What `main` found, as Markdown: a table, what it says, and what it was measured with."""
    lines = ["| script | ms/step | tokens/s | first step after s | peak memory GB |", "| --- | --- | --- | --- | --- |"]
    for name, figures in result["summary"].items():
        pace, rate = "cut short", ""
        if figures["ms_per_step"] is not None:
            pace = "{ms_per_step:.2f} ({ms_per_step_min:.2f} to {ms_per_step_max:.2f})".format(**figures)
            rate = f"{figures['tokens_per_second']:,.0f}"
        warm, peak = figures["first_step_seconds_warm"], figures["peak_memory_bytes"]
        wait = f"{figures['first_step_seconds_cold']:.1f}" + ("" if warm is None else f", then {warm:.1f}")
        lines.append(
            f"| {name} | {pace} | {rate} | {wait} | {'not measured' if peak is None else f'{peak / 1e9:.2f}'} |"
        )
    return "\n".join(
        (
            *lines,
            "",
            *_conclusions(result["summary"]),
            *_remarks(result["runs"]),
            "",
            "median (least to most) of {rounds} rounds in turn; {steps} steps after {warm_up_steps}; {batch_tokens:,} "
            "tokens a step in rows of {train_seq_len:,}; ranks: {nproc}; data: {data}".format(**result),
            ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value is not None),
        )
    )


def _conclusions(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if any(figures["ms_per_step"] is None for figures in summary.values()):
        return ["no claim: a run was cut short"]
    ours, *others = ((name, figures["ms_per_step"]) for name, figures in summary.items())
    return [f"ours is {pace / ours[1]:.2f} times as fast per step as {name}" for name, pace in others]


def _remarks(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of single runs."""
    remarks = []
    for run in runs:
        said, where = [], f"round {run['round'] + 1}, {run['contender']}"
        by_arrival = run["ms_per_step_by_arrival"]
        if run["problem"]:
            said.append(run["problem"])
        if run["first_step"] > 1:
            said.append(f"its first line was about step {run['first_step']}")
        if run["clock"] == "arrival_ms":
            said.append("it prints no training time in ms: timed by when its lines came")
        elif by_arrival and abs(by_arrival / run["ms_per_step"] - 1) > CLOCKS_AGREE_WITHIN:
            said.append(f"by when its lines came, {by_arrival:.2f} ms/step")
        remarks += [f"{where}: {each}" for each in said]
    return remarks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peer",
        description="Runs a training script of the challenge beside this project's train.py, in turn on the same data, "
        "batch and GPUs, and reports time per step, tokens per second, time to the first step and device memory.",
        epilog="Scripts see this environment, with ITERATIONS and TRAIN_LOG_EVERY set to what is measured, "
        "MAX_WALLCLOCK_SECONDS, VAL_LOSS_EVERY and WARMDOWN_ITERS to 0, and batch, row length and vocabulary to ours; "
        "--env beats all of these. The rest is each script's default: give both one model, as with --env NUM_LAYERS=8. "
        "The exit status is 1 if a run was cut short, 2 for a mistake or a script that takes no step.",
    )
    add = parser.add_argument
    add("--script", type=Path, required=True, metavar="FILE", help="the other script, run as it is")
    for flag, whom in (("--env", "all scripts"), ("--peer-env", "the other script"), ("--our-env", "ours")):
        add(flag, action="append", default=[], metavar="K=V", help=f"a variable for {whom}; repeatable")
    add("--reference", action="store_true", help="also run ours without Triton kernels (GOLF_KERNELS=reference)")
    add("--steps", type=int, default=60, metavar="N", help="measured, a multiple of the warm-up (default %(default)s)")
    warm_up_help = "before those; better 10 or more, as scripts log each of the first 10 (default %(default)s)"
    add("--warm-up-steps", type=int, default=20, metavar="N", help=warm_up_help)
    add("--rounds", type=int, default=2, metavar="N", help="runs of each, in turn (default %(default)s)")
    add("--data-path", type=Path, metavar="DIR", help="fineweb_*.bin shards (default: random tokens)")
    add("--tokenizer-path", type=Path, metavar="FILE", help="the SentencePiece model of those shards")
    add("--nproc", type=int, metavar="N", help="start N ranks with torchrun (default: one process without it)")
    add("--output", type=Path, metavar="FILE", help="write all figures there, too, as JSON")
    timeout_help = "to wait for a step, compilation included, before a run is given up (default %(default)s)"
    add("--timeout", type=float, default=900.0, metavar="SECONDS", help=timeout_help)
    return parser


if __name__ == "__main__":
    # Ended by `timeout` or a scheduler, it ends as if interrupted, and with it the script that runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
