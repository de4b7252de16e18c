"""`./run` on machines that lack something: what it says, and that it stops there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golfmodel.runtime.versions import PROJECT_ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with nothing but the script."""
    shutil.copy(PROJECT_ROOT / "run", tmp_path / "run")
    return tmp_path


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "run"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def fake_python(directory: Path, body: str) -> str:
    """An interpreter that answers the script's questions as `body` says, by what it is asked to run."""
    path = directory / "fake-python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_command_it_says_what_there_is(checkout):
    result = run(checkout)
    assert result.returncode == 0
    assert "./run demo" in result.stdout
    assert "./run test" in result.stdout


def test_an_unknown_command_is_named(checkout):
    result = run(checkout, "tset")
    assert result.returncode == 1
    assert "tset" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_missing_venv_module_is_named(checkout):
    python = fake_python(checkout, f'case "$*" in *ensurepip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac')
    result = run(checkout, "setup", PYTHON=python)
    assert result.returncode == 1
    assert "python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_passed_over(checkout):
    empty = checkout / "empty"
    empty.mkdir()
    for name in ("bash", "dirname", "uname", "env"):
        (empty / name).symlink_to(shutil.which(name))
    python = fake_python(checkout, "exit 1")
    result = run(checkout, "setup", PYTHON=python, PATH=str(empty))
    assert result.returncode == 1
    assert "Python 3.10 or newer" in result.stderr


def test_a_python_whose_torch_sees_a_gpu_is_reused(checkout):
    # asked on standard input whether its torch sees a GPU, the fake says yes; asked for a venv, it says how
    python = fake_python(
        checkout,
        f'case "$*" in -) exit 0 ;; "-m venv"*) echo "VENV $*"; exit 3 ;; *) exec {sys.executable} "$@" ;; esac',
    )
    result = run(checkout, "setup", PYTHON=python)
    assert result.returncode == 1
    assert "reusing the torch" in result.stdout
    assert "VENV -m venv --clear --system-site-packages .venv" in result.stdout


def test_the_packages_of_a_reused_virtual_environment_are_seen(checkout):
    """A venv made from a venv sees the packages of neither by itself."""
    assert sys.prefix != sys.base_prefix, "the suite runs in .venv"
    python = fake_python(checkout, f'case "$*" in -) exit 0 ;; *) exec {sys.executable} "$@" ;; esac')
    result = run(checkout, "setup", PYTHON=python)
    assert result.returncode == 0, result.stderr
    assert "installing" not in result.stdout
    found = subprocess.run(
        [str(checkout / ".venv/bin/python"), "-c", "import sys, torch; print(sys.prefix, torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [str(checkout / ".venv"), torch.__version__]


def test_a_library_that_damaged_files_crash_is_not_reused(checkout):
    site = checkout / "site"
    for version, name in (("0.2.1", "sentencepiece"), ("0.1", "tqdm")):
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").touch()
    python = fake_python(checkout, f'case "$*" in -) exit 0 ;; *) exec {sys.executable} "$@" ;; esac')
    result = run(checkout, "setup", PYTHON=python, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert "installing sentencepiece==" in result.stdout
    assert "tqdm" not in result.stdout
