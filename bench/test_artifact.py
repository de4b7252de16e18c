"""From a trained model to a file and back, in wall time: quantize, write (zstd at level 22), read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.ceilings import Ceilings
from bench.comparison import Row
from bench.timing import wall
from golfmodel.artifact.container import Artifact, read_artifact, write_artifact
from golfmodel.artifact.readback import pack_model, unpack_model
from golfmodel.config import resolve
from golfmodel.model.gpt import GPT

ON_GPU = torch.cuda.is_available()
PRESET = "seed" if ON_GPU else "demo"
ROUNDS = {"quantize": 30, "write": 2, "read": 20}


@pytest.fixture(scope="module")
def model(device: torch.device) -> GPT:
    """With normal weights everywhere: zeros, as some start, would compress too well."""
    torch.manual_seed(0)
    model = GPT(resolve(["--preset", PRESET], {})).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture(scope="module")
def artifact(model: GPT) -> Artifact:
    return pack_model(model, "0" * 64)


@pytest.fixture(scope="module")
def path(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an artifact that is written once: at level 22 that takes many seconds."""
    path = tmp_path_factory.mktemp("artifact") / "model.golf"
    write_artifact(path, artifact)
    return path


@pytest.mark.parametrize("part", ROUNDS)
def test_artifact(
    part: str,
    model: GPT,
    artifact: Artifact,
    path: Path,
    device: torch.device,
    ceilings: Ceilings,
    record: Callable[[Row], None],
) -> None:
    functions = {
        "quantize": lambda: pack_model(model, "0" * 64),
        "write": lambda: write_artifact(path, artifact),
        "read": lambda: unpack_model(read_artifact(path), device),
    }
    record(
        Row(
            suite="artifact",
            name="artifact",
            shape=f"{path.stat().st_size / 1e6:.1f} MB",
            dtype="int6",
            part=part,
            provider="auto",
            times=wall(functions[part], device=device, rounds=ROUNDS[part]),
            ceilings=ceilings,
        )
    )
