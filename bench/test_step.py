"""The training step: whole, without its optimizers, and these alone; and how it grows with the tokens of a step.

On a GPU the whole step is a replay of its CUDA graph, as in training. Its parts are launched kernel by kernel, which
costs the host more, and the device the gaps between dependent kernels; the optimizers also as they record themselves,
on gradients that lie still.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.ceilings import Ceilings
from bench.comparison import Row, equivalence
from bench.step import TrainingStep
from bench.subjects import subjects
from bench.timing import interleaved
from golfmodel.config import Config, resolve

ON_GPU = torch.cuda.is_available()
STEP_PRESETS = ("quick", "default") if ON_GPU else ("demo",)
IMPLEMENTATIONS = ("auto", "reference") if ON_GPU else ("reference",)
RECORDED = "optimizers, recorded"
PARTS = ("whole step", "forward and backward", "optimizers", *([RECORDED] if ON_GPU else []))
ROWS_OF_A_STEP = (6, 12, 24, 48) if ON_GPU else (2, 4, 8)
ROUNDS = 10


def config_of(preset: str) -> Config:
    """A preset's config with the micro-batch that one of the eight GPUs of the main job has."""
    config = resolve(["--preset", preset], {})
    if preset == "demo":
        return config
    return dataclasses.replace(config, train_batch_tokens=98_304, micro_batch_tokens=98_304)


def measure(config: Config, implementations: tuple[str, ...], ceilings: Ceilings) -> Iterator[Row]:
    """Every part of a step with each choice of `GOLF_KERNELS`, interleaved."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    torch.compiler.reset()
    steps = {choice: TrainingStep(config, device, kernels=choice) for choice in implementations}
    peak_bytes = {choice: step.settle() for choice, step in steps.items()}
    timed = {}
    for choice, step in steps.items():
        functions = [step, step.forward_and_backward, step.optimizers_alone(records=False)]
        if ON_GPU:
            functions.append(step.optimizers_alone(records=True))
        timed.update({(choice, part): function for part, function in zip(PARTS, functions, strict=True)})
    times = interleaved(timed, sets=2, device=device, rounds=ROUNDS)
    verdict = "not checked"
    if set(implementations) == {"auto", "reference"}:
        verdicts = [equivalence(subject, device) for subject in subjects(on_gpu=ON_GPU)]
        verdict = next((each for each in verdicts if each != "passed"), "passed")
    for (choice, part), taken in times.items():
        step = steps[choice]
        # A replay allocates nothing. What the whole step's graph holds was counted when it was recorded; that of the
        # optimizers holds what their launches need.
        launched = times[choice, "optimizers"] if part == RECORDED else taken
        peak = peak_bytes[choice] if part == "whole step" else launched.peak_bytes + step.state_bytes
        faster = choice == "auto" and verdict == "passed"
        yield Row(
            suite="step",
            name="training step",
            shape=f"{step.rows}x{config.train_seq_len}, {config.num_layers} layers",
            dtype=config.compute_dtype,
            part=part,
            provider=choice,
            times=dataclasses.replace(taken, peak_bytes=peak if ON_GPU else 0),
            ceilings=ceilings,
            flops=0.0 if part.startswith("optimizers") else step.flops,
            tokens=step.tokens,
            speedups={"reference": times["reference", part].median / taken.median} if faster else {},
            equivalence=verdict if choice == "auto" else "not checked",
        )


@pytest.fixture(scope="module")
def measured(ceilings: Ceilings) -> Callable[[Config, tuple[str, ...]], dict[tuple[str, str], Row]]:
    kept: dict[Config, dict[tuple[str, str], Row]] = {}

    def rows_of(config: Config, implementations: tuple[str, ...]) -> dict[tuple[str, str], Row]:
        rows = kept.get(config, {})
        if not {choice for choice, _ in rows}.issuperset(implementations):
            rows = {(row.provider, row.part): row for row in measure(config, implementations, ceilings)}
            kept[config] = rows
        return rows

    return rows_of


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", STEP_PRESETS)
def test_step(preset: str, implementation: str, part: str, measured: Callable, record: Callable[[Row], None]) -> None:
    record(measured(config_of(preset), IMPLEMENTATIONS)[implementation, part])


@pytest.mark.parametrize("rows", ROWS_OF_A_STEP)
def test_step_of_tokens(rows: int, measured: Callable, record: Callable[[Row], None]) -> None:
    config = config_of(STEP_PRESETS[0])
    tokens = rows * config.train_seq_len
    config = dataclasses.replace(config, train_batch_tokens=tokens, micro_batch_tokens=tokens)
    record(measured(config, ("auto",))["auto", "whole step"])
