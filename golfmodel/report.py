"""A finished run for people: a few lines of text, and a picture from its log."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golfmodel.runtime.files import write_bytes
from golfmodel.runtime.runlog import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_NAME = "report.png"


def describe(summary: dict[str, Any]) -> str:
    """The scores, bytes and speed of a summary as aligned lines."""
    rows = [
        ("bits per byte, sliding window, read back", _number(summary["val_bpb"], ".4f")),
        ("  read back, windows side by side", _number(summary["val_bpb_int6"], ".4f")),
        ("  after averaging", _number(summary["val_bpb_averaged"], ".4f")),
        ("  last weights", _number(summary["val_bpb_training"], ".4f")),
    ]
    if summary["val_bpb_with_prefix"] is not None:
        rows.append(("  with the paid prefix (not eligible)", _number(summary["val_bpb_with_prefix"], ".4f")))
    eligible = "yes" if summary["eligible"] else "no: " + "; ".join(summary["not_eligible_because"])
    rows += [
        ("artifact + code + prefix, bytes", f"{summary['total_bytes']:,} of {summary['limit_bytes']:,}"),
        ("eligible", eligible),
        ("steps", f"{summary['steps']:,} in {summary['train_seconds']:.1f} s"),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def draw(run_directory: Path) -> str:
    """Draws `report.png` from the run's `log.jsonl` and `summary.json`; returns its path, or why there is none.

    A picture is no part of a result: whatever keeps it from being drawn does not fail the run.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "not drawn, matplotlib is missing (the plot extra)"
    try:
        return str(_draw(run_directory))
    except Exception as error:
        return f"not drawn, {type(error).__name__}: {error}"


def _draw(run_directory: Path) -> Path:
    import matplotlib  # noqa: PLC0415  (an optional extra)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    summary = json.loads((run_directory / "summary.json").read_text())
    train, validation = (_last_of_each_step(run_directory, kind) for kind in ("train", "validation"))
    figure, ((loss, bpb), (rate, size)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    seconds = [event["train_seconds"] for event in train]
    _plot_loss(loss, seconds, train)
    _plot_bits_per_byte(bpb, validation, summary)
    _plot_rate(rate, seconds, train)
    _plot_bytes(size, summary)
    score = _number(summary["val_bpb"], ".4f")
    device = summary["versions"]["gpu"] or "CPU"
    figure.suptitle(f"{run_directory.name}: {score} bits per byte, {summary['world_size']} x {device}")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    pyplot.close(figure)
    path = run_directory / PICTURE_NAME
    write_bytes(path, drawn.getvalue())
    return path


def _last_of_each_step(run_directory: Path, kind: str) -> list[dict[str, Any]]:
    """A run that was resumed has logged some steps twice: those that it took after its last checkpoint."""
    events = {event["step"]: event for event in read_events(run_directory / "log.jsonl", kind)}
    return [events[step] for step in sorted(events)]


def _plot_loss(axes: Axes, seconds: list[float], train: list[dict[str, Any]]) -> None:
    axes.plot(seconds, [event["train_loss"] for event in train], color="tab:blue")
    axes.set(title="training loss", xlabel="training seconds", ylabel="nats a token")
    axes.grid(alpha=0.3)


def _plot_bits_per_byte(axes: Axes, validation: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    times = [event["train_seconds"] for event in validation] + [summary["train_seconds"]]
    values = [event["val_bpb_training"] for event in validation] + [summary["val_bpb_training"]]
    axes.plot(times, values, "o-", color="tab:blue", label="last weights")
    for name, label, marker in (
        ("val_bpb_averaged", "averaged", "s"),
        ("val_bpb_int6", "read back", "v"),
        ("val_bpb", "read back, sliding", "*"),
    ):
        if summary[name] is not None:
            axes.plot([summary["train_seconds"]], [summary[name]], marker, label=f"{label} {summary[name]:.4f}")
    axes.set(title="validation", xlabel="training seconds", ylabel="bits per byte")
    axes.set_xlim(0, 1.05 * summary["train_seconds"])
    axes.legend()
    axes.grid(alpha=0.3)


def _plot_rate(axes: Axes, seconds: list[float], train: list[dict[str, Any]]) -> None:
    axes.plot(seconds, [event["lr_scale"] for event in train], color="tab:orange")
    axes.set(title="learning rate and speed", xlabel="training seconds", ylabel="fraction of the full learning rate")
    axes.set_ylim(0, 1.05)
    axes.yaxis.label.set_color("tab:orange")
    speed = axes.twinx()
    speed.plot(seconds, [event["tokens_per_second"] for event in train], color="tab:green")
    speed.set_ylim(0, 1.3 * max((event["tokens_per_second"] for event in train), default=1.0))
    speed.set_ylabel("tokens a second", color="tab:green")
    axes.grid(alpha=0.3)


def _plot_bytes(axes: Axes, summary: dict[str, Any]) -> None:
    parts = dict(summary["artifact_bytes_by_part"])
    parts["code"] = summary["code_bytes"]
    if summary["prefix_bytes"]:
        parts["paid prefix"] = summary["prefix_bytes"]
    names = list(parts)
    bars = axes.barh(names, [parts[name] for name in names], color="tab:purple")
    axes.bar_label(bars, labels=[f"{parts[name]:,}" for name in names], padding=3)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set(title=f"{summary['total_bytes']:,} of {summary['limit_bytes']:,} bytes", xlabel="bytes")


def _number(value: float | None, shape: str) -> str:
    return "none" if value is None else format(value, shape)
