"""Markdown: tables, of results above all, and what they were measured with in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADER = ("what", "part", "by", "median", "p20 to p80", "rate", "of ceiling", "host", "peak memory", "faster than")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def environment(found: Mapping[str, Any]) -> str:
    """What `golfmodel.runtime.versions.versions` gives, in a line."""
    return (
        f"{found['gpu'] or 'CPU'}, driver {found['driver'] or 'none'}, torch {found['torch']}, triton "
        f"{found['triton'] or 'none'}, commit {(found['commit'] or 'none')[:12]}"
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; `rows` are what `Row.info` gives, with their `median` in seconds."""
    return table(HEADER, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    fraction = row["fraction_of_ceiling"]
    return (
        f"{row['name']} {row['shape']} {row['dtype']}",
        row["part"],
        row["provider"],
        duration(row["median"]),
        f"{duration(row['p20'])} to {duration(row['p80'])}",
        _rate(row),
        "" if fraction is None else f"{fraction:.0%}",
        duration(row["host_seconds"]),
        "" if not row["peak_bytes"] else f"{row['peak_bytes'] / 1e6:,.1f} MB",
        _speedups(row),
    )


def _rate(row: Mapping[str, Any]) -> str:
    if row["flops_per_second"]:
        return f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s"
    if row["bytes_per_second"]:
        return f"{row['bytes_per_second'] / 1e9:,.0f} GB/s"
    if row["tokens_per_second"]:
        return f"{row['tokens_per_second']:,.0f} tokens/s"
    return ""


def _speedups(row: Mapping[str, Any]) -> str:
    if row["equivalence"].startswith("failed"):
        return f"not said: {row['equivalence']}"
    return ", ".join(f"{other} {factor:.2f}x" for other, factor in row["speedups"].items())


def duration(seconds: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"
