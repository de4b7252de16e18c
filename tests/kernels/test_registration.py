from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from golfmodel.runtime.versions import PROJECT_ROOT

# Compiles an op with its backward; says whether PyTorch had both in its files.
COMPILE = """
import torch
from torch._dynamo.utils import counters
from kernels import smear_gate

x_BTD, gate_D = (torch.randn(shape, requires_grad=True) for shape in ((1, 4, 8), 8))
torch.compile(smear_gate, fullgraph=True)(x_BTD, gate_D).sum().backward()
print("kept" if counters["aot_autograd"]["autograd_cache_hit"] else "compiled")
"""


def compiled_by(version: Path, cache: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=version,
        env={
            **os.environ,
            "PYTHONPATH": str(version),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_INTERPRET": "1",
            "GOLF_KERNELS": "triton",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_what_another_version_compiled_is_not_taken_from_the_files(tmp_path):
    """It calls ops as that version did, of which PyTorch knows nothing."""
    versions = [tmp_path / name for name in ("one", "two")]
    for version in versions:
        shutil.copytree(PROJECT_ROOT / "kernels", version / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with (versions[1] / "kernels" / "smear_gate.py").open("a") as file:
        file.write("# Another version.\n")
    one, two = versions
    assert [compiled_by(version, tmp_path / "cache") for version in (one, one, two)] == ["compiled", "kept", "compiled"]
