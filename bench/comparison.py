"""One op by every provider, timed in turn: what a call takes, how near the machine's limit, and who is faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.ceilings import Ceilings
from bench.subjects import Subject
from bench.timing import ROUNDS, Timed, Times, interleaved, rotations
from kernels import dispatch
from kernels.testing import MismatchError, for_tensors, tensors_of

TRITON, COMPILE, EAGER, COPY = "triton", "compile", "eager", "copy"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was timed, the times, the work they stand for."""

    suite: str  # "op", "step", "artifact" or "scoring"
    name: str
    shape: str
    dtype: str
    part: str  # of the work: "forward", "backward", "whole step" ...
    provider: str
    times: Times
    ceilings: Ceilings
    bytes_moved: float = 0.0  # at least: every input read once, every output written once
    flops: float = 0.0
    tokens: int = 0
    speedups: dict[str, float] = field(default_factory=dict)  # over other providers, by their names
    equivalence: str = "not checked"  # "passed", "not checked", or how the check failed

    @property
    def fraction(self) -> float | None:
        """Of the speed that the ceilings allow; None where the work is not counted."""
        if not (self.bytes_moved or self.flops):
            return None
        return self.ceilings.seconds(self.bytes_moved, self.flops) / self.times.median

    def info(self) -> dict[str, Any]:
        """Everything but the samples, in SI units, for a results file."""
        median = self.times.median
        return {
            "suite": self.suite,
            "name": self.name,
            "shape": self.shape,
            "dtype": self.dtype,
            "part": self.part,
            "provider": self.provider,
            "p20": self.times.percentile(20),
            "p80": self.times.percentile(80),
            "host_seconds": self.times.host,
            "peak_bytes": self.times.peak_bytes,
            "bytes_moved": self.bytes_moved,
            "flops": self.flops,
            "tokens_per_second": self.tokens / median if self.tokens else None,
            "bytes_per_second": self.bytes_moved / median if self.bytes_moved else None,
            "flops_per_second": self.flops / median if self.flops else None,
            "fraction_of_ceiling": self.fraction,
            "speedups": self.speedups,
            "equivalence": self.equivalence,
        }


_verdicts: dict[tuple[str, str, str, torch.device], str] = {}


def equivalence(subject: Subject, device: torch.device) -> str:
    """Says "passed", or how the public op differs from its reference on this device; checked once in a process."""
    key = (subject.op, subject.dtype, subject.checked_as, device)
    if key not in _verdicts:
        try:
            subject.check(device)
            _verdicts[key] = "passed"
        except MismatchError as error:
            _verdicts[key] = f"failed: {error}"
    return _verdicts[key]


def providers(subject: Subject, device: torch.device) -> list[str]:
    """Who can run an op there: "triton", where it has a kernel that runs; "compile", on a GPU; "eager"; a "copy"."""
    runnable = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return [
        *([TRITON] if runnable and not dispatch.without_kernel([subject.op]) else []),
        *([COMPILE] if device.type == "cuda" else []),
        EAGER,
        *([] if subject.flops else [COPY]),
    ]


def compare(
    subject: Subject, direction: str, device: torch.device, ceilings: Ceilings, *, rounds: int = ROUNDS
) -> dict[str, Row]:
    """Times an op by each of its `providers`: the public op, its reference compiled and eager, a copy of as many bytes.

    A speed-up is given only where the op's equivalence check passed in this process.
    """
    inputs = _inputs(subject, device)
    sets = len(inputs)
    functions = {TRITON: subject.function, COMPILE: subject.definition, EAGER: subject.definition}
    wanted = providers(subject, device)
    if COMPILE in wanted:
        # one code object keeps few compiled forms, and past those silently runs eager
        torch.compiler.reset()
        functions[COMPILE] = torch.compile(subject.definition, fullgraph=True, dynamic=False)
    prepare = _PREPARED[direction]
    timed, moved = {}, 0.0
    for name in wanted:
        if name != COPY:
            timed[name], moved = prepare(subject, functions[name], inputs)
    if COPY in wanted:
        timed[COPY] = _copy(int(moved), sets, device)
    times = interleaved(timed, sets=sets, device=device, rounds=rounds)

    passed = equivalence(subject, device) if TRITON in wanted else "not checked"
    rows = {}
    for name, measured in times.items():
        ours = name == TRITON
        others = [other for other in times if other != TRITON] if ours and passed == "passed" else []
        rows[name] = Row(
            suite="op",
            name=subject.op,
            shape=subject.shape,
            dtype=subject.dtype,
            part=direction,
            provider=name,
            times=measured,
            ceilings=ceilings,
            bytes_moved=moved,
            flops=0.0 if name == COPY else subject.flops * (2 if direction == "backward" else 1),
            speedups={other: times[other].median / measured.median for other in others},
            equivalence=passed if ours else "not checked",
        )
    return rows


def prepared(subject: Subject, direction: str, device: torch.device) -> tuple[Timed, int]:
    """The public op as a function to time, and how many sets of inputs it takes in turn."""
    inputs = _inputs(subject, device)
    return _PREPARED[direction](subject, subject.function, inputs)[0], len(inputs)


def _inputs(subject: Subject, device: torch.device) -> list[dict[str, Any]]:
    """As many that the cache does not hold them from one turn to the next."""
    first = subject.draw(device, 0)
    sets = rotations(2 * sum(tensor.nbytes for tensor in tensors_of(first)))
    return [first, *(subject.draw(device, seed) for seed in range(1, sets))]


def _forward(subject: Subject, function: Callable[..., Any], inputs: list[dict[str, Any]]) -> tuple[Timed, float]:
    outputs = function(**inputs[0])
    moved = sum(tensor.nbytes for tensor in tensors_of([inputs[0], outputs]))
    return lambda index: function(**inputs[index]), moved


def _backward(subject: Subject, function: Callable[..., Any], inputs: list[dict[str, Any]]) -> tuple[Timed, float]:
    """The gradients of every differentiable input, from outputs and their gradients that are there already."""
    ready: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
    # a graph that is walked more than once must not give its memory away
    with torch._functorch.config.patch(donated_buffer=False):
        for arguments in inputs:
            leaves = {
                name: for_tensors(lambda x: x.detach().requires_grad_(), arguments[name])
                for name in subject.differentiable
            }
            outputs = list(tensors_of(function(**{**arguments, **leaves})))
            ready.append((outputs, list(tensors_of(leaves)), [torch.randn_like(output) for output in outputs]))

    def gradients(index: int) -> tuple[Tensor, ...]:
        outputs, leaves, upstream = ready[index]
        return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    inputs_counted = [value for name, value in inputs[0].items() if name not in subject.alike]
    gradients_counted = [inputs[0][name] for name in subject.differentiable if name not in subject.alike]
    moved = sum(tensor.nbytes for tensor in tensors_of([inputs_counted, gradients_counted, ready[0][2]]))
    return gradients, moved - subject.unread


_PREPARED = {"forward": _forward, "backward": _backward}


def _copy(moved: int, sets: int, device: torch.device) -> Timed:
    sources = [torch.randint(0, 256, (max(moved // 2, 1),), dtype=torch.uint8, device=device) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    return lambda index: targets[index].copy_(sources[index])
