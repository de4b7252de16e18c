"""From the events of a Chrome trace of training steps to rows: a kernel, its stage, its time, what it had to do.

On a CPU a "kernel" is a PyTorch op, and its time what it spends outside of the ops it calls. A kernel belongs to the
stage during which the host launched it: `loss.backward()` blocks the thread that called it until autograd's own thread
has launched everything. Where an op launches several kernels, all its work is put down to the kind of kernel that takes
the longest; nothing is known of the others.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.ceilings import Ceilings
from bench.kernel_work import PRODUCTS, Work, operation_work, transfer_work
from golfmodel.training.step import STAGES

ATTENTION, MATMUL, TRITON, INDUCTOR, OTHER = CATEGORIES = ("attention", "matmul", "Triton", "Inductor", "other")
OUTSIDE = "outside"  # of every stage

# Of vendors' libraries, for a launch that no op encloses.
_ATTENTION_KERNEL = re.compile(r"flash_(fwd|bwd)|fmha|sdpa", re.IGNORECASE)
_MATMUL_KERNEL = re.compile(r"gemm|nvjet|splitK", re.IGNORECASE)

Event = Mapping[str, Any]  # of a Chrome trace; times in microseconds


@dataclass(frozen=True)
class Row:
    """A kernel in a stage of one step, the mean of the steps profiled."""

    stage: str  # one of `STAGES`, or `OUTSIDE`
    kernel: str  # in full
    category: str  # one of `CATEGORIES`
    calls: float
    seconds: float  # of all calls together, like the next three
    share: float  # of all kernels' time
    bytes: float | None  # None: not known
    flops: float | None
    fraction: float | None  # of the speed that the ceilings allow


@dataclass(frozen=True)
class Breakdown:
    """One step, the mean of the steps profiled."""

    rows: list[Row]  # those first that take the longest
    span_seconds: float  # from the start of a step's first kernel to the end of its last
    idle_seconds: float  # of that, without any kernel running

    @property
    def kernel_seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Seconds by stage and category, in the order of `STAGES` and `CATEGORIES`."""
        return [
            {"stage": stage, "category": category, "seconds": sum(row.seconds for row in rows)}
            for stage in (*STAGES, OUTSIDE)
            for category in CATEGORIES
            if (rows := [row for row in self.rows if (row.stage, row.category) == (stage, category)])
        ]


@dataclass
class _Call:
    """One run of a kernel."""

    kernel: str
    microseconds: float
    launched: float | None  # when the host did, in the trace's microseconds
    running: tuple[float, float] | None  # from when to when something runs; None: within another call
    operations: tuple[Event, ...]  # the ops that the launch is part of, innermost first
    worker: Event | None = None  # the one of them whose work it may be doing
    work: Work | None = None
    category: str = OTHER
    step: int | None = None
    stage: str = OUTSIDE


def analyse(
    events: Iterable[Event],
    machine: Ceilings,
    launches: Mapping[str, Sequence[Work]],
    inductor: Mapping[str, float | None],
) -> Breakdown:
    """What the steps in a trace spend their time on.

    Args:
        events: the `traceEvents` of a Chrome trace of whole steps, with shapes.
        machine: its ceilings.
        launches: the work of each launch of one step by kernel, in their order, as `watched_launches` gives them.
        inductor: bytes of a call by Inductor's kernel, as `inductor_bytes` gives them.

    Raises:
        ValueError: the trace holds no step.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"] in STAGES
    )
    steps = sum(name == STAGES[0] for _, _, name in ranges)
    if not steps:
        raise ValueError(f"the trace holds no range named {STAGES[0]!r}")
    calls = _device_calls(complete) or _host_calls(complete)
    for call in calls:
        call.step, call.stage = _place(call.launched, ranges)
        call.category = _category(call, launches)
    _set_work_of_operations(calls)
    _set_work_of_inductor(calls, inductor)
    _set_work_of_launches(calls, launches, steps)
    spans = [_span([call.running for call in calls if call.running and call.step == step]) for step in range(steps)]
    return Breakdown(
        rows=_rows(calls, steps, machine),
        span_seconds=1e-6 * sum(span for span, _ in spans) / steps,
        idle_seconds=1e-6 * sum(span - busy for span, busy in spans) / steps,
    )


def _device_calls(events: list[Event]) -> list[_Call]:
    """Everything that ran on a GPU, found through its launch, or else its op; none on a CPU."""
    operations = [event for event in events if event.get("cat") == "cpu_op"]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    by_id = {event["args"]["External id"]: event for event in operations if "External id" in event.get("args", {})}
    parents = _parents([*operations, *launches.values()])
    calls = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        arguments = event.get("args", {})
        launch = launches.get(arguments.get("correlation"))
        operation = by_id.get(arguments.get("External id")) if launch is None else parents.get(id(launch))
        started = launch or operation
        around = tuple(_upwards(operation, parents))
        on_kernel = event["cat"] == "kernel"
        calls.append(
            _Call(
                kernel=event["name"],
                microseconds=event["dur"],
                launched=None if started is None else started["ts"],
                running=(event["ts"], event["ts"] + event["dur"]),
                operations=around,
                worker=next((each for each in around if _work_of(each)), None) if on_kernel else None,
                work=None if on_kernel else transfer_work(event),
            )
        )
    return calls


def _host_calls(events: list[Event]) -> list[_Call]:
    """Every op as a call that takes the time it spends outside of the ops it calls."""
    operations = [event for event in events if event.get("cat") == "cpu_op"]
    parents = _parents(operations)
    own = {id(event): event["dur"] for event in operations}
    for event in operations:
        if id(event) in parents:
            own[id(parents[id(event)])] -= event["dur"]
    return [
        _Call(
            kernel=event["name"],
            microseconds=max(own[id(event)], 0.0),  # rounded ends may overlap by a nanosecond
            launched=event["ts"],
            running=None if id(event) in parents else (event["ts"], event["ts"] + event["dur"]),
            operations=tuple(_upwards(event, parents)),
            worker=event if _work_of(event) else None,
        )
        for event in operations
    ]


def _parents(events: Iterable[Event]) -> dict[int, Event]:
    """By `id` of an event, the innermost op around its start, on the same thread."""
    threads: dict[tuple[Any, Any], list[Event]] = {}
    for event in events:
        threads.setdefault((event.get("pid"), event["tid"]), []).append(event)
    parents = {}
    for several in threads.values():
        around: list[Event] = []
        for event in sorted(several, key=lambda each: (each["ts"], -each["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if around:
                parents[id(event)] = around[-1]
            if event["cat"] == "cpu_op":
                around.append(event)
    return parents


def _upwards(event: Event | None, parents: Mapping[int, Event]) -> Iterator[Event]:
    while event is not None:
        yield event
        event = parents.get(id(event))


def _place(moment: float | None, ranges: list[tuple[float, float, str]]) -> tuple[int | None, str]:
    """The number of the step and the stage in which something was launched."""
    index = -1 if moment is None else bisect.bisect_right(ranges, moment, key=lambda each: each[0]) - 1
    if index < 0 or moment > ranges[index][1]:
        return None, OUTSIDE
    return sum(name == STAGES[0] for _, _, name in ranges[: index + 1]) - 1, ranges[index][2]


def _category(call: _Call, launches: Mapping[str, Any]) -> str:
    if call.kernel in launches:
        return TRITON
    if call.kernel.startswith("triton_"):
        template = call.kernel.startswith("triton_tem_")
        if template and "flex_attention" in call.kernel:
            return ATTENTION
        return MATMUL if template and "mm" in call.kernel else INDUCTOR
    names = [event["name"] for event in call.operations]
    if any(name.startswith("aten::") and "attention" in name for name in names):
        return ATTENTION
    if any(name in PRODUCTS for name in names):
        return MATMUL
    if _ATTENTION_KERNEL.search(call.kernel):
        return ATTENTION
    return MATMUL if _MATMUL_KERNEL.search(call.kernel) else OTHER


def _set_work_of_operations(calls: list[_Call]) -> None:
    """Gives the work of an op to those of its kernels that take the longest over all ops of the same shapes."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    by_worker: dict[int, list[_Call]] = {}
    for call in calls:
        if call.worker is not None:
            of_kind = times.setdefault(_kind(call.worker), {})
            of_kind[call.kernel] = of_kind.get(call.kernel, 0.0) + call.microseconds
            by_worker.setdefault(id(call.worker), []).append(call)
    for several in by_worker.values():
        worker = several[0].worker
        longest = max((call.kernel for call in several), key=times[_kind(worker)].__getitem__)
        doing = [call for call in several if call.kernel == longest]
        work = _work_of(worker)
        for call in doing:
            call.work = Work(work.bytes / len(doing), work.flops / len(doing))


def _kind(operation: Event) -> tuple[Any, ...]:
    return operation["name"], str(operation["args"].get("Input Dims"))


def _work_of(operation: Event) -> Work | None:
    return operation_work(operation["name"], operation.get("args", {}))


def _set_work_of_inductor(calls: list[_Call], inductor: Mapping[str, float | None]) -> None:
    for call in calls:
        if call.category == INDUCTOR:
            moved = inductor.get(call.kernel)
            if moved is None and call.operations:  # the launch itself may say, where two kernels share a name
                gigabytes = call.operations[0].get("args", {}).get("kernel_num_gb")
                moved = None if gigabytes is None else 1e9 * float(gigabytes)
            call.work = None if moved is None else Work(moved)


def _set_work_of_launches(calls: list[_Call], launches: Mapping[str, Sequence[Work]], steps: int) -> None:
    """Gives every call of a kernel the work of the launch of the same number within a step."""
    by_kernel: dict[str, list[_Call]] = {}
    for call in calls:
        if call.category == TRITON:
            by_kernel.setdefault(call.kernel, []).append(call)
    for kernel, several in by_kernel.items():
        works = launches[kernel]
        if len(several) != steps * len(works) or any(call.launched is None for call in several):
            continue
        for index, call in enumerate(sorted(several, key=lambda call: call.launched)):
            call.work = works[index % len(works)]


def _span(running: list[tuple[float, float]]) -> tuple[float, float]:
    """From the first begin to the last end, and how much of that is covered."""
    if not running:
        return 0.0, 0.0
    running = sorted(running)
    covered, reached = 0.0, running[0][0]
    for begin, end in running:
        covered += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return reached - running[0][0], covered


def _rows(calls: list[_Call], steps: int, machine: Ceilings) -> list[Row]:
    total = sum(call.microseconds for call in calls)
    grouped: dict[tuple[str, str, str], list[_Call]] = {}
    for call in calls:
        grouped.setdefault((call.stage, call.kernel, call.category), []).append(call)
    rows = []
    for (stage, kernel, category), several in grouped.items():
        spent = sum(call.microseconds for call in several)
        seconds = 1e-6 * spent / steps
        works = [call.work for call in several]
        moved = None if None in works else sum(work.bytes for work in works) / steps
        counted = moved is not None and all(work.flops is not None for work in works)
        flops = sum(work.flops for work in works) / steps if counted else None
        known = moved is not None and seconds > 0
        rows.append(
            Row(
                stage=stage,
                kernel=kernel,
                category=category,
                calls=len(several) / steps,
                seconds=seconds,
                share=spent / total if total else 0.0,
                bytes=moved,
                flops=flops,
                fraction=machine.seconds(moved, flops or 0.0) / seconds if known else None,
            )
        )
    return sorted(rows, key=lambda row: row.seconds, reverse=True)
