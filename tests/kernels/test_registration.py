from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golfmodel.runtime.versions import PROJECT_ROOT

# Compiles an op with its backward; says whether PyTorch had both in its files. Nothing but the op: for that Inductor
# needs no C++ compiler.
COMPILE = """
import sys
import torch
from torch._dynamo.utils import counters
from kernels import smear_gate

x_BTD, gate_D = (torch.randn(shape, device=sys.argv[1], requires_grad=True) for shape in ((1, 4, 8), 8))
y_BTD = torch.compile(smear_gate, fullgraph=True)(x_BTD, gate_D)
torch.autograd.grad(y_BTD, (x_BTD, gate_D), torch.ones_like(y_BTD))
print("kept" if counters["aot_autograd"]["autograd_cache_hit"] else "compiled")
"""


def compiled_by(version: Path, device: torch.device, cache: Path) -> str:
    paths = [str(version), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(device)],
        cwd=version,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.usefixtures("triton_kernels")
def test_what_another_version_compiled_is_not_taken_from_the_files(device, tmp_path):
    """It calls ops as that version did, of which PyTorch knows nothing."""
    versions = [tmp_path / name for name in ("one", "two")]
    for version in versions:
        shutil.copytree(PROJECT_ROOT / "kernels", version / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with (versions[1] / "kernels" / "smear_gate.py").open("a") as file:
        file.write("# Another version.\n")
    one, two = versions
    found = [compiled_by(version, device, tmp_path / "cache") for version in (one, one, two)]
    assert found == ["compiled", "kept", "compiled"]
