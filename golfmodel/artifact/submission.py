"""What a submission weighs, and whether it keeps the challenge's rules."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golfmodel.runtime.errors import ArtifactError
from golfmodel.runtime.versions import PROJECT_ROOT

LIMIT_BYTES = 16_000_000
LIMIT_TRAIN_SECONDS = 600.0
SCORING_MODULE = "golfmodel.evaluation.__main__"

_IMPORT_SECONDS = 300
_IMPORT_PROGRAM = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
importlib.import_module(sys.argv[2])
print()
print(json.dumps({name: getattr(module, "__file__", None) for name, module in sys.modules.items()}))
"""


@dataclass(frozen=True)
class Submission:
    """The sizes and the training time that the rules limit.

    Attributes:
        artifact_bytes: the artifact file.
        code_bytes: every project file that a scoring run loads, uncompressed.
        prefix_bytes: the paid prefix's file; 0 without one.
        train_seconds: None where it is not known, as when only an artifact is scored.
        scored: whether `val_bpb` was measured.
        limit_bytes: the most that the three may add up to.
    """

    artifact_bytes: int
    code_bytes: int
    prefix_bytes: int = 0
    train_seconds: float | None = None
    scored: bool = True
    limit_bytes: int = LIMIT_BYTES

    @property
    def total_bytes(self) -> int:
        """Artifact, code and prefix together."""
        return self.artifact_bytes + self.code_bytes + self.prefix_bytes

    @property
    def not_eligible_because(self) -> list[str]:
        """Every rule that the submission breaks, in words; empty for an eligible one."""
        reasons = []
        if self.total_bytes > self.limit_bytes:
            over = self.total_bytes - self.limit_bytes
            reasons.append(f"{self.total_bytes:,} bytes, {over:,} over the limit of {self.limit_bytes:,}")
        if self.prefix_bytes:
            reasons.append("it uses a paid prefix, which is made of validation tokens")
        if self.train_seconds is not None and not self.train_seconds <= LIMIT_TRAIN_SECONDS:
            reasons.append(f"it trained {self.train_seconds} s, over the limit of {LIMIT_TRAIN_SECONDS} s")
        if not self.scored:
            reasons.append("its val_bpb was not measured (EVAL_STRIDE is 0)")
        return reasons

    @property
    def eligible(self) -> bool:
        """Whether no rule is broken."""
        return not self.not_eligible_because

    def summary(self) -> dict[str, Any]:
        """The entries of `summary.json` that say all this."""
        return {
            "artifact_bytes": self.artifact_bytes,
            "code_bytes": self.code_bytes,
            "prefix_bytes": self.prefix_bytes,
            "total_bytes": self.total_bytes,
            "limit_bytes": self.limit_bytes,
            "eligible": self.eligible,
            "not_eligible_because": self.not_eligible_because,
        }


def check_submission(
    artifact: str | Path,
    *,
    prefix: str | Path | None = None,
    train_seconds: float | None = None,
    scored: bool = True,
    code_files: Iterable[Path] | None = None,
) -> Submission:
    """Weighs the files of a submission.

    Args:
        artifact: the artifact file.
        prefix: the paid prefix's file, if one is used.
        train_seconds: how long training took; None where it is not known.
        scored: whether `val_bpb` was measured.
        code_files: the files that count as code; `scoring_files()` by default.

    Raises:
        ArtifactError: a file is missing, or the scoring program cannot be imported.
    """
    return Submission(
        artifact_bytes=_file_bytes(Path(artifact)),
        code_bytes=code_bytes(scoring_files() if code_files is None else code_files),
        prefix_bytes=0 if prefix is None else _file_bytes(Path(prefix)),
        train_seconds=train_seconds,
        scored=scored,
    )


def scoring_files(module: str = SCORING_MODULE, root: Path = PROJECT_ROOT) -> list[Path]:
    """Every file below `root` that running `module` loads, sorted.

    The module is imported in a fresh interpreter. Imports inside functions, which only a run would reach, are
    followed through the sources of what that loaded, so the list is the same on every machine.

    Raises:
        ArtifactError: `module` cannot be imported.
    """
    root = root.resolve()
    files = _loaded_files(module, root)
    pending = list(files)
    while pending:
        for file in _imported_files(pending.pop(), root):
            if file not in files:
                files.add(file)
                pending.append(file)
    return sorted(files)


def code_bytes(files: Iterable[Path]) -> int:
    """The files' sizes together, uncompressed."""
    return sum(_file_bytes(file) for file in files)


def _loaded_files(module: str, root: Path) -> set[Path]:
    command = [sys.executable, "-c", _IMPORT_PROGRAM, str(root), module]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"cannot list the files that {module} loads: {error}") from error
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ArtifactError(f"cannot list the files that {module} loads: importing it failed: {cause}")
    loaded: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return {
        found
        for name, file in loaded.items()
        for found in _module_files(name, root)
        if file is not None and found == Path(file).resolve()
    }


def _imported_files(file: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that the import statements in `file` name, wherever they stand in it."""
    package = ".".join(file.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield from _module_files(name, root)


def _module_files(name: str, root: Path) -> Iterator[Path]:
    """The files of the module `name` and of the packages around it, where they lie below `root`."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield file.resolve()


def _file_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be measured: {error.strerror or error}") from error
