"""A results file of `pytest bench/`, read back: its rows, and what they were measured with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golfmodel.runtime.errors import DataError


@dataclass(frozen=True)
class Results:
    """What one run measured."""

    path: Path
    environment: dict[str, Any]  # versions
    commit: str | None
    ceilings: dict[str, float]  # what `vars` of a `bench.ceilings.Ceilings` is
    rows: dict[str, dict[str, Any]]  # by the test's name: what `Row.info` gives, and the median in seconds

    @property
    def described(self) -> str:
        """GPU, versions, commit and ceilings in one line."""
        found, ceilings = self.environment, self.ceilings
        commit = (self.commit or "no commit")[:12]
        return (
            f"{found['gpu'] or 'CPU'}, driver {found['driver'] or 'none'}, torch {found['torch']}, triton "
            f"{found['triton'] or 'none'}, Python {found['python']}, commit {commit}; copy "
            f"{ceilings['bytes_per_second'] / 1e12:.2f} TB/s, matmul {ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s"
        )


def read_results(path: Path) -> Results:
    """Reads what `--benchmark-json` or `--record-baseline` wrote.

    Raises:
        DataError: there is no such file, or it is no results file of these suites.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {
            row["fullname"]: {**row["extra_info"], "median": row["stats"]["median"]} for row in content["benchmarks"]
        }
        results = Results(path, content["machine_info"], content["commit"], content["ceilings"], rows)
        described = results.described
    except FileNotFoundError as error:
        raise DataError(f"there is no results file {path}: run `pytest bench/ --benchmark-json={path}`") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no results file of `pytest bench/`: {type(error).__name__} {error}") from error
    if not rows or not described:
        raise DataError(f"{path} holds no rows")
    return results
