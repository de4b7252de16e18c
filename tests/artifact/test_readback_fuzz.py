"""No artifact that is sound in itself gives a model other than the one it describes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from forgery import Forgery
from mutations import draws, refused_or_right

from golfmodel.artifact.container import Artifact, decode_artifact, encode_artifact
from golfmodel.artifact.quantize import dequantize_parameters
from golfmodel.artifact.readback import pack_model, unpack_model
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import exported_parameters
from golfmodel.runtime.errors import ArtifactError

CPU = torch.device("cpu")
VALUES = (0, 1, 2, 3, 4, 8, 16, 32, 64, 256, 1024, 16384, 65536, 2**31, 2**63, -1, 0.5, 1.0, 2.0, 1e300, -0.0)
VALUES += (True, False, None, "", "fp16", "int8", "float32", "bfloat16", float("nan"), float("inf"), [], {})


@pytest.fixture(scope="module")
def original() -> bytes:
    """A whole model of 2 blocks and a few hundred weights."""
    sizes = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 32}
    config = Config(**sizes, bigram_vocab_size=8, bigram_dim=4, train_seq_len=64, eval_seq_len=64, eval_stride=16)
    torch.manual_seed(3)
    return encode_artifact(pack_model(GPT(config), "0" * 64))


def test_no_change_of_config_or_tensors_gives_another_model_than_described(original: bytes) -> None:
    accepted = 0
    for generator in draws("artifact model"):
        forgery = Forgery.of(original)
        for _ in range(generator.integers(1, 3)):
            change(forgery, generator)
        forged = decode_artifact(forgery.sign().file(), "fuzzed")
        accepted += refused_or_right(
            lambda: unpack_model(forged, CPU, "fuzzed"),  # noqa: B023
            lambda model: is_described_by(model, forged),  # noqa: B023
            ArtifactError,
            "fuzzed: ",
        )
    assert accepted > 50


def change(forgery: Forgery, generator: np.random.Generator) -> None:
    """Gives an option another value, or a parameter's shape, values or place to another."""
    config, names = json.loads(forgery.metadata["config"]), sorted(forgery.tensors)
    name = names[int(generator.integers(len(names)))]
    dtype, shape, content = forgery.tensors[name]
    match generator.integers(6):
        case 0 if len(shape) == 1 and dtype == "F32":
            forgery.tensors[name] = [dtype, [1, *shape], content]
        case 1:
            alike = [other for other in names if forgery.tensors[other][:2] == [dtype, shape]]
            other = alike[int(generator.integers(len(alike)))]
            forgery.tensors[name], forgery.tensors[other] = forgery.tensors[other], forgery.tensors[name]
        case _:
            option = sorted(config)[int(generator.integers(len(config)))]
            config[option] = VALUES[int(generator.integers(len(VALUES)))]
            forgery.metadata["config"] = json.dumps(config)


def is_described_by(model: GPT, artifact: Artifact) -> bool:
    weights = dequantize_parameters(artifact.tensors)
    return (
        model.config.artifact_fields() == artifact.config
        and exported_parameters(model).keys() == weights.keys()
        and all(torch.equal(tensor.float(), weights[name]) for name, (tensor, _) in exported_parameters(model).items())
    )
