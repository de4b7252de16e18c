"""What counts as code, what it all weighs, and when a submission is not eligible."""

from __future__ import annotations

from pathlib import Path

import pytest

from golfmodel.artifact.submission import (
    LIMIT_BYTES,
    PROJECT_ROOT,
    SCORING_MODULE,
    Submission,
    check_submission,
    code_bytes,
    scoring_files,
)
from golfmodel.runtime.errors import ArtifactError


def project(root: Path, **sources: str) -> Path:
    """Writes modules, dots in their names given as double underscores; packages get an `__init__.py`."""
    for name, source in sources.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    for directory in [path.parent for path in root.rglob("*.py")]:
        if directory != root:
            (directory / "__init__.py").touch()
    return root


def names(root: Path, module: str) -> list[str]:
    return [path.relative_to(root.resolve()).as_posix() for path in scoring_files(module, root)]


def test_files_are_those_that_the_import_loads(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        app__main="import app.used, helper, json\nfrom app.sub import leaf\nfrom app.sub.inner import VALUE",
        app__used="",
        app__unused="",
        app__sub__leaf="",
        app__sub__inner="VALUE = 1",
        app__sub__other="",
        helper="",
        stranger="",
    )
    assert names(root, "app.main") == [
        "app/__init__.py",
        "app/main.py",
        "app/sub/__init__.py",
        "app/sub/inner.py",
        "app/sub/leaf.py",
        "app/used.py",
        "helper.py",
    ]


def test_imports_that_wait_inside_functions_count(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        app__main="def run():\n    from app import late\n    import app.deep.deeper\n    import math, nowhere",
        app__late="class Late:\n    def go(self):\n        from . import later\n        from .deep.other import thing",
        app__later="raise RuntimeError('is never imported, only read')",
        app__deep__deeper="",
        app__deep__other="thing = 1",
        app__deep__unused="",
    )
    assert names(root, "app.main") == [
        "app/__init__.py",
        "app/deep/__init__.py",
        "app/deep/deeper.py",
        "app/deep/other.py",
        "app/late.py",
        "app/later.py",
        "app/main.py",
    ]


def test_modules_that_no_import_statement_names_count_if_they_load(tmp_path: Path) -> None:
    root = project(tmp_path, app__main="import importlib\nimportlib.import_module('app.by_' + 'name')", app__by_name="")
    assert "app/by_name.py" in names(root, "app.main")


def test_an_environment_inside_the_project_does_not_count(tmp_path: Path) -> None:
    main = "import sys, importlib\nsys.path.insert(0, '.venv/lib')\nimport vendored, app\n"
    root = project(tmp_path, main=main + "importlib.import_module('shadowed')", app__x="", shadowed="")
    project(tmp_path / ".venv" / "lib", vendored="", shadowed="")
    assert names(root, "main") == ["app/__init__.py", "main.py"]


def test_what_a_module_prints_does_not_matter(tmp_path: Path) -> None:
    root = project(tmp_path, main="print('hello', end='')\nimport helper", helper="")
    assert names(root, "main") == ["helper.py", "main.py"]


def test_a_scoring_program_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    root = project(tmp_path, main="import helper", helper="raise OSError('no such device')")
    with pytest.raises(ArtifactError, match="files that main loads: importing it failed: OSError: no such device"):
        scoring_files("main", root)
    with pytest.raises(ArtifactError, match="No module named 'nothing'"):
        scoring_files("nothing", root)


def test_the_real_scoring_program() -> None:
    files = scoring_files()
    shown = [path.relative_to(PROJECT_ROOT).as_posix() for path in files]
    assert shown == sorted(set(shown))
    assert SCORING_MODULE.replace(".", "/") + ".py" in shown
    for needed in ("golfmodel/__init__.py", "golfmodel/artifact/container.py", "golfmodel/model/gpt.py"):
        assert needed in shown
    assert "kernels/reference.py" in shown
    assert not [name for name in shown if not name.startswith(("golfmodel/", "kernels/"))]
    assert "golfmodel/pipeline.py" not in shown
    assert code_bytes(files) == sum(len(path.read_bytes()) for path in files)
    assert code_bytes(files) < LIMIT_BYTES / 20


def test_code_is_weighed_uncompressed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x" * 1000)
    (tmp_path / "b.py").write_bytes("é\n".encode())
    assert code_bytes([tmp_path / "a.py", tmp_path / "b.py"]) == 1003
    assert code_bytes([]) == 0
    with pytest.raises(ArtifactError, match=r"c\.py: cannot be measured: No such file"):
        code_bytes([tmp_path / "c.py"])


def test_a_submission_adds_up_the_files_own_sizes(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(5000))
    (tmp_path / "code.py").write_bytes(bytes(300))
    (tmp_path / "prefix").write_bytes(bytes(20))
    plain = check_submission(tmp_path / "model", code_files=[tmp_path / "code.py"], train_seconds=599.0)
    assert (plain.artifact_bytes, plain.code_bytes, plain.prefix_bytes) == (5000, 300, 0)
    assert plain.total_bytes == 5300
    assert plain.eligible
    paid = check_submission(tmp_path / "model", code_files=[tmp_path / "code.py"], prefix=tmp_path / "prefix")
    assert paid.total_bytes == 5320
    assert not paid.eligible
    with pytest.raises(ArtifactError, match="none: cannot be measured"):
        check_submission(tmp_path / "none", code_files=[])
    with pytest.raises(ArtifactError, match="none: cannot be measured"):
        check_submission(tmp_path / "model", prefix=tmp_path / "none", code_files=[])


def test_by_default_the_code_is_the_scoring_program(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(10))
    assert check_submission(tmp_path / "model").code_bytes == code_bytes(scoring_files())


@pytest.mark.parametrize(
    ("submission", "reasons"),
    [
        (Submission(15_900_000, 100_000, train_seconds=600.0), []),
        (Submission(15_900_000, 100_000), []),
        (Submission(15_900_000, 100_001), ["16,000,001 bytes, 1 over the limit of 16,000,000"]),
        (Submission(1, 1, prefix_bytes=1), ["it uses a paid prefix, which is made of validation tokens"]),
        (Submission(1, 1, train_seconds=600.01), ["it trained 600.01 s, over the limit of 600.0 s"]),
        (Submission(1, 1, train_seconds=float("nan")), ["it trained nan s, over the limit of 600.0 s"]),
        (
            Submission(10, 20, prefix_bytes=30, train_seconds=604.0, limit_bytes=50),
            [
                "60 bytes, 10 over the limit of 50",
                "it uses a paid prefix, which is made of validation tokens",
                "it trained 604.0 s, over the limit of 600.0 s",
            ],
        ),
    ],
)
def test_eligibility(submission: Submission, reasons: list[str]) -> None:
    assert submission.not_eligible_because == reasons
    assert submission.eligible == (not reasons)
    assert submission.summary() == {
        "artifact_bytes": submission.artifact_bytes,
        "code_bytes": submission.code_bytes,
        "prefix_bytes": submission.prefix_bytes,
        "total_bytes": submission.artifact_bytes + submission.code_bytes + submission.prefix_bytes,
        "limit_bytes": submission.limit_bytes,
        "eligible": not reasons,
        "not_eligible_because": reasons,
    }


def test_the_limit_is_the_challenge_s() -> None:
    assert LIMIT_BYTES == 16_000_000
    assert Submission(1, 1).limit_bytes == LIMIT_BYTES
