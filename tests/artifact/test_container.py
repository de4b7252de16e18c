"""The artifact file: round trips, the same bytes each time, atomic writing, and what is never written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from forgery import CONFIG, TOKENIZER_DIGEST, Forgery, framed, same_artifact, small_parameters
from safetensors.torch import load as load_safetensors

from golfmodel.artifact import container, frame
from golfmodel.artifact.container import Artifact, encode_artifact, read_artifact, write_artifact
from golfmodel.artifact.quantize import quantize_parameters
from golfmodel.artifact.stored import StoredTensor
from golfmodel.model.parameters import Storage
from golfmodel.runtime.errors import ArtifactError, StorageError

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def test_a_written_artifact_reads_back_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.golf"
    size = write_artifact(path, artifact)
    assert size == path.stat().st_size
    assert same_artifact(read_artifact(path), artifact)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.golf"]


def test_other_programs_can_read_it(artifact: Artifact, data: bytes) -> None:
    parameters = zstandard.get_frame_parameters(data)
    assert parameters.has_checksum
    blob = zstandard.ZstdDecompressor().decompress(data)
    assert parameters.content_size == len(blob)
    assert int.from_bytes(blob[:8], "little") % 8 == 0, "the tensors are not aligned"
    tensors = load_safetensors(blob)
    assert torch.equal(tensors["blocks.2.mlp.up.weight.codes"], artifact.tensors["blocks.2.mlp.up.weight"].values)
    assert torch.equal(tensors["input.bigram.table.scale"], artifact.tensors["input.bigram.table"].scale_R)
    assert tensors["input.token.weight"].dtype == torch.float16
    assert tensors["input.bigram.scale"].shape == ()
    metadata = Forgery.of(data).metadata
    assert (metadata["format"], metadata["version"]) == ("golfmodel-artifact", "1")
    assert json.loads(metadata["config"]) == CONFIG
    assert json.loads(metadata["schemes"])["blocks.10.attention.query.weight"] == "int6"
    assert metadata["tokenizer"] == TOKENIZER_DIGEST


def test_the_digest_is_its_definition(data: bytes) -> None:
    copy = Forgery.of(data)
    digest = copy.metadata["digest"]
    copy.sign()
    assert copy.metadata["digest"] == digest


def test_the_frame_is_level_22() -> None:
    sparse = (torch.rand(100, 1000, generator=torch.Generator().manual_seed(0)) < 0.05).float()
    stored = quantize_parameters({"w": (sparse, Storage.INT6)})
    data = encode_artifact(Artifact(CONFIG, TOKENIZER_DIGEST, stored))
    blob = zstandard.ZstdDecompressor().decompress(data)
    assert data == framed(blob, level=22)
    # Levels 20 to 22 differ only on content of many megabytes.
    assert data != framed(blob, level=19)
    assert frame.LEVEL == 22


def test_equal_artifacts_give_equal_bytes(artifact: Artifact, data: bytes) -> None:
    backwards = Artifact(
        dict(reversed(artifact.config.items())),
        artifact.tokenizer_digest,
        dict(reversed(artifact.tensors.items())),
    )
    assert encode_artifact(backwards) == data
    strided = {
        name: replace(stored, values=stored.values.t().contiguous().t()) if stored.values.dim() == 2 else stored
        for name, stored in artifact.tensors.items()
    }
    assert encode_artifact(replace(artifact, tensors=strided)) == data
    assert encode_artifact(replace(artifact, config=CONFIG | {"num_layers": 3})) != data


def test_another_process_writes_the_same_bytes(data: bytes) -> None:
    program = (
        "import hashlib, forgery as c\n"
        "from golfmodel.artifact.container import Artifact, encode_artifact\n"
        "from golfmodel.artifact.quantize import quantize_parameters\n"
        "artifact = Artifact(c.CONFIG, c.TOKENIZER_DIGEST, quantize_parameters(c.small_parameters()))\n"
        "print(hashlib.sha256(encode_artifact(artifact)).hexdigest())"
    )
    paths = os.pathsep.join([str(PROJECT_ROOT), str(Path(__file__).parent)])
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_compression_shows_progress(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    encode_artifact(artifact)
    assert capsys.readouterr().err == ""
    encode_artifact(artifact, show_progress=True)
    assert "compressing" in capsys.readouterr().err


def test_content_longer_than_one_step_survives(tmp_path: Path) -> None:
    weight = torch.randn(900, 1024, generator=torch.Generator().manual_seed(0))
    large = Artifact(CONFIG, TOKENIZER_DIGEST, quantize_parameters({"w": (weight, Storage.INT6)}))
    write_artifact(tmp_path / "large", large)
    assert same_artifact(read_artifact(tmp_path / "large"), large)


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_full_disk_leaves_the_previous_file_whole(
    failing: str, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.golf"
    write_artifact(path, artifact)
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def raise_full(*_: object) -> None:
        raise full

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", raise_full)
    else:
        real_fdopen = os.fdopen

        def fdopen_on_full_disk(handle: int, *arguments: object) -> object:
            with Path("/dev/full").open("wb") as full_disk:
                os.dup2(full_disk.fileno(), handle)
            return real_fdopen(handle, *arguments)

        monkeypatch.setattr(os, "fdopen", fdopen_on_full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        write_artifact(path, replace(artifact, config={"other": 1}))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.golf"]


def test_a_directory_in_the_way_is_a_storage_error(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_artifact(tmp_path / "file" / "model.golf", artifact)


def stored(values: torch.Tensor, storage: Storage = Storage.FP32, scale: torch.Tensor | None = None) -> StoredTensor:
    return StoredTensor(storage, values, scale)


def codes(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int8)


ONE = torch.ones(1, dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no tensors"),
        ({"w": stored(torch.ones(2).half())}, "'w' holds float16; fp32 needs float32"),
        ({"w": stored(torch.ones(2), Storage.NONE)}, "'w' has scheme 'none', which is never stored"),
        ({"w": stored(torch.ones(0))}, r"'w' is empty, shape \[0\]"),
        ({"w": stored(torch.ones(2), scale=ONE)}, "'w' has a scale, which fp32 does not use"),
        ({"w": stored(torch.tensor([1.0, float("nan")]))}, "'w' holds 1 values that are not finite"),
        ({"w": stored(codes(1)[0], Storage.INT6, ONE)}, r"'w' has codes of shape \[1\]; expected two dimensions"),
        ({"w": stored(codes(1), Storage.INT6)}, "'w' has no scale, which int6 needs"),
        ({"w": stored(codes(1), Storage.INT6, ONE.float())}, r"'w' has a float32 scale of shape \[1\]; expected"),
        (
            {"w": stored(codes(1), Storage.INT8, ONE.repeat(2))},
            r"shape \[2\]; expected float16 of shape \[1\]",
        ),
        ({"w": stored(codes(1), Storage.INT8, ONE * 0)}, "'w' has a scale that is not finite and positive"),
        ({"w": stored(codes(1), Storage.INT8, ONE * float("inf"))}, "scale that is not finite and positive"),
        ({"w": stored(codes(3, -32), Storage.INT6, ONE)}, "codes from -32 to 3; int6 allows -31 to 31"),
        ({"w": stored(codes(3, 32), Storage.INT6, ONE)}, "codes from 3 to 32; int6 allows -31 to 31"),
        ({"w": stored(codes(-128, 3), Storage.INT8, ONE)}, "codes from -128 to 3; int8 allows -127 to 127"),
        ({"w": stored(codes(1), Storage.INT6, ONE), "w.codes": stored(torch.ones(1))}, "'w.codes', which is taken"),
        ({"__metadata__": stored(torch.ones(1))}, "'__metadata__': a name is at most 200 letters"),
        ({"": stored(torch.ones(1))}, "'': a name is at most"),
        ({"w\x1b[31m": stored(torch.ones(1))}, "a name is at most"),
        ({"w" * 201: stored(torch.ones(1))}, "a name is at most"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(tensors: dict[str, StoredTensor], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        encode_artifact(Artifact(CONFIG, TOKENIZER_DIGEST, tensors))


@pytest.mark.parametrize("config", [{"x": float("nan")}, {"x": {1, 2}}, {1: 2, "x": 3}, {"x": Path()}])
def test_a_config_must_be_plain_json(config: dict, artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="config is not plain JSON"):
        encode_artifact(replace(artifact, config=config))


def test_a_tokenizer_digest_must_be_one(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="'abc' is not 64 hexadecimal digits"):
        encode_artifact(replace(artifact, tokenizer_digest="abc"))


def test_a_header_too_long_to_read_is_not_written(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="a reader accepts 1,048,576"):
        encode_artifact(replace(artifact, config={"x": "y" * 2**20}))


def test_a_file_too_large_to_read_is_not_written(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(frame, "MAX_CONTENT_BYTES", 1000)
        with pytest.raises(ArtifactError, match="bytes to compress, above the limit of 1,000"):
            encode_artifact(artifact)
    with monkeypatch.context() as patch:
        patch.setattr(frame, "SMALL_CONTENT_BYTES", 10)
        patch.setattr(frame, "MAX_RATIO", 1)
        with pytest.raises(ArtifactError, match=r"bytes compress to .*, of which a reader accepts .* not that uniform"):
            encode_artifact(artifact)
    monkeypatch.setattr(container, "MAX_FILE_BYTES", 100)
    with pytest.raises(ArtifactError, match="a reader accepts 100"):
        encode_artifact(artifact)


def test_what_is_no_readable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing\.golf: cannot read an artifact: No such file"):
        read_artifact(tmp_path / "missing.golf")
    with pytest.raises(ArtifactError, match="not a file; expected an artifact"):
        read_artifact(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe: not a file"):
        read_artifact(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a file"):
        read_artifact("/dev/zero")
    with pytest.raises(ArtifactError, match="cannot read an artifact"):
        read_artifact(tmp_path / ("x" * 5000))
    with pytest.raises(ArtifactError, match="cannot read an artifact"):
        read_artifact("nul\0byte")


def test_an_oversized_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(container.MAX_FILE_BYTES + 1)
    with pytest.raises(ArtifactError, match=r"67,108,865 bytes; an artifact has at most 67,108,864"):
        read_artifact(path)


def test_small_parameters_cover_every_scheme() -> None:
    stored_schemes = {storage for _, storage in small_parameters().values()}
    assert stored_schemes == set(Storage) - {Storage.NONE}
