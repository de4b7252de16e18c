"""`python -m golfmodel.artifact` and what it is made of."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from forgery import CONFIG, TOKENIZER_DIGEST, small_parameters

from golfmodel.artifact.__main__ import describe, main, render
from golfmodel.artifact.container import Artifact, write_artifact
from golfmodel.artifact.parts import bytes_by_part, part_of
from golfmodel.artifact.stored import StoredTensor
from golfmodel.model.parameters import Storage

PROJECT_ROOT = Path(__file__).resolve().parents[2]
RAW_BYTES_PER_VALUE = {Storage.INT6: 1, Storage.INT8: 1, Storage.FP16: 2, Storage.FP32: 4}


def expected_raw_bytes(name: str) -> int:
    weight, storage = small_parameters()[name]
    scales = 2 * weight.shape[0] if storage in (Storage.INT6, Storage.INT8) else 0
    return math.prod(weight.shape) * RAW_BYTES_PER_VALUE[storage] + scales


@pytest.fixture
def path(artifact: Artifact, tmp_path: Path) -> Path:
    write_artifact(tmp_path / "model.golf", artifact)
    return tmp_path / "model.golf"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("input.token.weight", "token embedding"),
        ("input.bigram.table", "bigram"),
        ("input.bigram.projection.weight", "bigram"),
        ("input.smear.gate", "other"),
        ("blocks.0.attention.query.weight", "attention"),
        ("blocks.11.attention.query_gain", "attention"),
        ("blocks.0.attention_scale", "other"),
        ("blocks.0.mlp.down.weight", "mlp"),
        ("blocks.0.mlp_scale", "other"),
        ("skips.weight_0", "other"),
        ("head.weight", "head"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_part_of_zeros_alone_has_its_bytes(artifact: Artifact) -> None:
    """A table that training never touched, in an artifact that as a whole is not that uniform."""
    zeros = StoredTensor(Storage.FP32, torch.zeros(2**20))
    assert bytes_by_part(replace(artifact, tensors={**artifact.tensors, "head.weight": zeros}))["head"] < 1000


def test_the_json_adds_up(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    parameters = small_parameters()
    assert shown["file_bytes"] == path.stat().st_size
    assert shown["limit_bytes"] == 16_000_000
    assert shown["config"] == CONFIG
    assert shown["tokenizer_digest"] == TOKENIZER_DIGEST
    tensors = {tensor["name"]: tensor for tensor in shown["tensors"]}
    assert tensors.keys() == parameters.keys()
    for name, (weight, storage) in parameters.items():
        assert tensors[name]["scheme"] == storage.value
        assert tensors[name]["shape"] == list(weight.shape)
        assert tensors[name]["raw_bytes"] == expected_raw_bytes(name)
    total = sum(map(expected_raw_bytes, parameters))
    values = sum(weight.numel() for weight, _ in parameters.values())
    assert (shown["count"], shown["values"], shown["raw_bytes"]) == (len(parameters), values, total)
    for grouping, key in (("schemes", "scheme"), ("parts", "part")):
        assert set(shown[grouping]) == {tensor[key] for tensor in shown["tensors"]}
        for group, totals in shown[grouping].items():
            members = [tensor for tensor in shown["tensors"] if tensor[key] == group]
            assert totals["count"] == len(members)
            assert totals["raw_bytes"] == sum(member["raw_bytes"] for member in members)
            assert totals["values"] == sum(math.prod(member["shape"]) for member in members)


def test_the_table_shows_everything(path: Path, artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^blocks\.2\.mlp\.up\.weight +int6 +18 x 6 +144 +\d+\.\d%$", text, re.MULTILINE)
    assert re.search(r"^input\.bigram\.scale +fp32 +scalar +4 ", text, re.MULTILINE)
    assert re.search(r"^int8 +1 +20 +30 ", text, re.MULTILINE)
    estimate = bytes_by_part(artifact)["mlp"]
    assert re.search(rf"^mlp +2 +216 +288 +\d+\.\d% +{estimate}$", text, re.MULTILINE)
    assert "compressed (estimate)" in text
    assert '"num_layers": 2' in text
    assert TOKENIZER_DIGEST in text
    assert f"{path.stat().st_size:,} bytes as written" in text
    assert "16,000,000" in text
    assert f"({16_000_000 - path.stat().st_size:,} left for code)" in text
    assert text.index("blocks.2.") < text.index("blocks.10.")


def test_a_file_over_the_limit_says_by_how_much(artifact: Artifact) -> None:
    assert "(over by 1)" in render(describe(artifact, 16_000_001))


def test_estimates_are_each_part_alone(artifact: Artifact) -> None:
    mlp = [artifact.tensors[f"blocks.{block}.mlp.up.weight"] for block in (10, 2)]
    content = b"".join(tensor.scale_R.numpy().tobytes() for tensor in mlp)
    content += b"".join(tensor.values.numpy().tobytes() for tensor in mlp)
    expected = len(zstandard.ZstdCompressor(level=22, write_checksum=True).compress(content))
    estimates = bytes_by_part(artifact)
    assert estimates["mlp"] == expected
    assert list(estimates) == ["token embedding", "bigram", "attention", "mlp", "other"]


@pytest.mark.parametrize("total", [0, 1, 7, 1348, 12_345_678])
def test_scaled_estimates_make_the_whole(total: int, artifact: Artifact) -> None:
    estimates, scaled = bytes_by_part(artifact), bytes_by_part(artifact, total)
    assert scaled.keys() == estimates.keys()
    assert sum(scaled.values()) == total
    for part, estimate in estimates.items():
        assert abs(scaled[part] - estimate * total / sum(estimates.values())) <= 1


def test_a_damaged_file_is_one_line_and_status_2(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(path.read_bytes()[:-10])
    assert main([str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {path}: cut short")
    assert output.err.count("\n") == 1


def test_names_and_configs_of_any_artifact_are_shown(artifact: Artifact) -> None:
    odd = replace(
        artifact,
        config={"\x1b[31m": ["\x07", None]},
        tensors={f"a.{'9' * 190}.b": StoredTensor(Storage.FP32, torch.ones(2))},
    )
    text = render(describe(odd, 100))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_help() -> None:
    command = [sys.executable, "-m", "golfmodel.artifact", "--help"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert "--json" in done.stdout
    assert done.stderr == ""
