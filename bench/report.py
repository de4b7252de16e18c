"""Results as a page: `python -m bench.report` says what is slow, how far from the limit, and compared with what."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.baseline import DIRECTORY, baseline_path
from bench.results_file import Results, read_results
from bench.table import duration, markdown
from golfmodel.runtime.errors import ConfigError, DataError, front_door
from golfmodel.runtime.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISE = 0.05  # a change in time below it is not told
PROVIDER_COLOURS = {
    "triton": "tab:blue",
    "compile": "tab:orange",
    "eager": "tab:red",
    "copy": "lightgrey",
    "auto": "tab:blue",
    "reference": "tab:orange",
}
CATEGORY_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:grey")


@front_door
def main(arguments: Sequence[str] | None = None) -> int:
    """Writes `report.md` and its pictures."""
    options = _parser().parse_args(arguments)
    results = read_results(options.results or _default_results())
    baseline = None if options.baseline is None else read_results(options.baseline)
    profile = None if options.profile is None else _read_profile(options.profile)
    pictures = draw(results, profile)
    for name, picture in pictures.items():
        write_bytes(options.output / name, picture)
    page = render(results, baseline, profile, list(pictures))
    write_bytes(options.output / "report.md", page.encode())
    print(page)
    print(f"report: {options.output / 'report.md'}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Benchmark results as a Markdown page and pictures."
    )
    parser.add_argument(
        "results", nargs="?", type=Path, help="what `pytest bench/ --benchmark-json=FILE` wrote (default: a baseline)"
    )
    parser.add_argument("--baseline", type=Path, help="results to compare with")
    parser.add_argument("--profile", type=Path, help="profile.json of `python -m bench.profile`, for the breakdown")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory (default: runs/bench)")
    return parser


def _default_results() -> Path:
    """This machine's baseline, or the only one there is."""
    if baseline_path().exists():
        return baseline_path()
    committed = sorted(DIRECTORY.glob("*.json"))
    if len(committed) != 1:
        names = ", ".join(path.name for path in committed) or "none"
        raise ConfigError(f"RESULTS is not given, and {DIRECTORY} has not one baseline but these: {names}")
    return committed[0]


def _read_profile(path: Path) -> dict[str, Any]:
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        stages = [(entry["stage"], entry["category"], float(entry["seconds"])) for entry in profile["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no profile.json: {type(error).__name__} {error}") from error
    if not stages:
        raise DataError(f"{path} holds no stages")
    return profile


def render(
    results: Results, baseline: Results | None, profile: dict[str, Any] | None, pictures: Sequence[str] = ()
) -> str:
    """The page in Markdown."""
    sections = [
        "# Benchmarks",
        results.described,
        "`of ceiling` is the least time that the copy's and the matmul's rate allow for the bytes read and written at "
        "least and the operations, over the time taken; `newton_schulz` is given those of its definition, each product "
        "in full, and does fewer. Times are medians, in turn with the others of a comparison; `host` is what a call "
        "costs the CPU. A speed-up stands only where the op passed its equivalence check in the same run.",
        "## Where time is left",
        _losses(results),
        *([] if baseline is None else ["## Since the baseline", _changes(results, baseline)]),
        *([] if profile is None else ["## One training step", _stages(profile)]),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        "## Everything",
        markdown(list(results.rows.values())),
    ]
    return "\n\n".join(sections) + "\n"


def _losses(results: Results) -> str:
    """Our own rows whose work is counted, those first that lose the most time against the ceiling."""
    lines = []
    ours = [row for row in results.rows.values() if row["provider"] in ("triton", "auto")]
    ours = [row for row in ours if row["fraction_of_ceiling"] is not None]
    for row in sorted(ours, key=lambda row: row["median"] * (row["fraction_of_ceiling"] - 1)):
        slower = [f"{other} ({1 / factor:.2f}x as long)" for other, factor in row["speedups"].items() if factor < 1]
        faster = [f"{other} {factor:.2f}x" for other, factor in row["speedups"].items() if factor >= 1]
        lines.append(
            f"| {row['name']} {row['shape']} | {row['part']} | {duration(row['median'])} | "
            f"{duration(row['median'] * row['fraction_of_ceiling'])} | {row['fraction_of_ceiling']:.0%} | "
            f"{', '.join(faster)} | {', '.join(each for each in slower if not each.startswith('copy'))} |"
        )
    if not lines:
        return "No row of our own kernels is among these results."
    header = "| what | part | takes | at least | of ceiling | faster than | slower than |\n" + "| --- " * 7 + "|"
    return "\n".join([header, *lines])


def _changes(results: Results, baseline: Results) -> str:
    """Rows in both whose time changed by more than noise, as times and as parts of each run's own ceilings."""
    lines = []
    for name, row in results.rows.items():
        before = baseline.rows.get(name)
        if before is None:
            continue
        change = row["median"] / before["median"] - 1
        fractions = (before["fraction_of_ceiling"], row["fraction_of_ceiling"])
        shares = "" if None in fractions else f"{fractions[0]:.1%} to {fractions[1]:.1%}"
        if abs(change) > NOISE:
            lines.append(
                (
                    change,
                    f"| {name.split('::')[-1]} | {duration(before['median'])} | {duration(row['median'])} | "
                    f"{change:+.1%} | {shares} |",
                )
            )
    both = len(results.rows.keys() & baseline.rows.keys())
    said = f"Against {baseline.path.name} ({baseline.described}): {len(lines)} of {both} rows moved by more than 5%."
    if not lines:
        return said
    header = "| row | before | now | change | of ceiling |\n" + "| --- " * 5 + "|"
    return "\n".join([said, "", header, *(line for _, line in sorted(lines, reverse=True))])


def _stages(profile: dict[str, Any]) -> str:
    total = sum(entry["seconds"] for entry in profile["stages"])
    lines = ["| stage | kind of kernel | time | share |", "| --- | --- | --- | --- |"]
    for entry in profile["stages"]:
        share = entry["seconds"] / total
        lines.append(f"| {entry['stage']} | {entry['category']} | {duration(entry['seconds'])} | {share:.1%} |")
    return "\n".join(lines)


def draw(results: Results, profile: dict[str, Any] | None) -> dict[str, bytes]:
    """PNGs by file name: those for which there are results.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: PLC0415  (an optional extra)
    except ModuleNotFoundError as error:
        raise ConfigError("matplotlib is missing: install the plot extra, pip install '.[plot]'") from error
    matplotlib.use("Agg")
    rows = list(results.rows.values())
    pictures = {}
    counted = [row for row in rows if row["suite"] == "op" and row["fraction_of_ceiling"] is not None]
    if counted:
        pictures["roofline.png"] = _roofline(of_the_model(counted), results.described)
    if profile is not None:
        pictures["breakdown.png"] = _breakdown(profile)
    grown = [row for name, row in results.rows.items() if "::test_step_of_tokens[" in name]
    if len(grown) > 1:
        pictures["tokens.png"] = _tokens(grown, results.described)
    return pictures


def of_the_model(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows at each op's last shape, which is the model's; what is added to a shape, as in `48x2048+skip`, is kept
    apart. All shapes would make a picture that nobody can read.
    """

    def kind(row: dict[str, Any]) -> tuple[str, ...]:
        return row["name"], row["part"], row["shape"].partition("+")[2]

    last = {kind(row): row["shape"] for row in rows}
    return [row for row in rows if row["shape"] == last[kind(row)]]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    from matplotlib import pyplot  # noqa: PLC0415

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    pyplot.close(figure)
    return drawn.getvalue()


def _roofline(rows: list[dict[str, Any]], described: str) -> bytes:
    """For each op a bar by provider: how much of the speed that the ceilings allow."""
    providers = [name for name in PROVIDER_COLOURS if any(row["provider"] == name for row in rows)]
    groups = list(dict.fromkeys((row["name"], row["shape"], row["part"]) for row in rows))
    found = {(row["name"], row["shape"], row["part"], row["provider"]): row for row in rows}
    figure, axes = _figure(12, 1.5 + 0.17 * len(groups) * len(providers))
    height = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        places = [index + number * height for index, group in enumerate(groups) if (*group, provider) in found]
        present = [found[(*group, provider)] for group in groups if (*group, provider) in found]
        shares = [min(100 * row["fraction_of_ceiling"], 110) for row in present]  # small ones sit in a cache
        bars = axes.barh(places, shares, height, color=PROVIDER_COLOURS[provider], label=provider)
        axes.bar_label(bars, labels=[duration(row["median"]) for row in present], padding=2, fontsize=6)
    axes.set_yticks([index + 0.4 for index in range(len(groups))], [" ".join(group) for group in groups], fontsize=7)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlabel="% of the ceiling (copy for bytes, matmul for operations)", xlim=(0, 115))
    axes.set_title(described, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return _png(figure)


def _breakdown(profile: dict[str, Any]) -> bytes:
    """A bar for each stage of the step, its kinds of kernels on top of each other."""
    stages = list(dict.fromkeys(entry["stage"] for entry in profile["stages"]))
    categories = list(dict.fromkeys(entry["category"] for entry in profile["stages"]))
    figure, axes = _figure(11, 1.5 + 0.6 * len(stages))
    left = [0.0] * len(stages)
    for number, category in enumerate(categories):
        seconds = [
            1e3 * sum(e["seconds"] for e in profile["stages"] if (e["stage"], e["category"]) == (stage, category))
            for stage in stages
        ]
        colour = CATEGORY_COLOURS[number % len(CATEGORY_COLOURS)]
        bars = axes.barh(stages, seconds, left=left, color=colour, label=category)
        axes.bar_label(bars, [f"{each:.1f}" if each > 0.5 else "" for each in seconds], label_type="center", fontsize=8)
        left = [before + each for before, each in zip(left, seconds, strict=True)]
    found = profile["versions"]
    axes.set(xlabel="ms on the device", title=f"one training step, {found['gpu'] or 'CPU'}, torch {found['torch']}")
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize=8)
    return _png(figure)


def _tokens(rows: list[dict[str, Any]], described: str) -> bytes:
    """Time of a step against the tokens in it, and what that is a second."""
    rows = sorted(rows, key=lambda row: row["tokens_per_second"] * row["median"])
    tokens = [row["tokens_per_second"] * row["median"] for row in rows]
    figure, axes = _figure(8, 4.5)
    axes.plot(tokens, [1e3 * row["median"] for row in rows], "o-", color="tab:blue")
    axes.set(xlabel="tokens a step", ylabel="ms a step", xlim=(0, None), ylim=(0, None))
    axes.yaxis.label.set_color("tab:blue")
    axes.set_title(described, fontsize=6)
    speed = axes.twinx()
    speed.plot(tokens, [row["tokens_per_second"] for row in rows], "s--", color="tab:green")
    speed.set_ylabel("tokens a second", color="tab:green")
    speed.set_ylim(0, None)
    axes.grid(alpha=0.3)
    return _png(figure)


if __name__ == "__main__":
    sys.exit(main())
