"""A model through its artifact and back, and artifacts whose parts do not belong together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peak_memory import peak_growth

from golfmodel.artifact.container import Artifact, decode_artifact, encode_artifact
from golfmodel.artifact.quantize import dequantize_parameters, quantize_parameters
from golfmodel.artifact.readback import pack_model, unpack_model
from golfmodel.artifact.stored import StoredTensor
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import Storage, exported_parameters
from golfmodel.runtime.errors import ArtifactError

CPU = torch.device("cpu")
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def model(tiny_options_of, tmp_path_factory) -> GPT:
    options = tiny_options_of(tmp_path_factory.mktemp("readback"))
    torch.manual_seed(5)
    model = GPT(Config(**{**options, "mtp_num_heads": 1, "tie_embeddings": False}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture
def packed(model) -> Artifact:
    packed = pack_model(model, DIGEST)
    return dataclasses.replace(packed, tensors=dict(packed.tensors), config=dict(packed.config))


def test_the_model_read_back_is_the_one_the_file_holds(model, packed):
    tokens = torch.randint(2, 1024, (2, 64))
    read_back = unpack_model(decode_artifact(encode_artifact(packed), "test"), CPU)
    expected = GPT(model.config).eval()
    with torch.no_grad():
        for name, (parameter, _) in exported_parameters(expected).items():
            parameter.copy_(dequantize_parameters(packed.tensors)[name])
    assert torch.equal(read_back.logits(tokens), expected.logits(tokens))
    assert not torch.equal(read_back.logits(tokens), model.logits(tokens)), "it was quantized"
    assert not read_back.training
    assert not any(name.startswith("future_heads") for name in packed.tensors)


def test_reading_back_draws_nothing_at_random(packed):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    unpack_model(packed, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_a_missing_tensor_is_named(packed):
    del packed.tensors["blocks.1.mlp.up.weight"]
    with pytest.raises(ArtifactError, match=r"file: .*blocks\.1\.mlp\.up\.weight"):
        unpack_model(packed, CPU, "file")


def test_a_tensor_of_no_parameter_is_named(packed):
    packed.tensors["extra"] = StoredTensor(Storage.FP32, torch.ones(3))
    with pytest.raises(ArtifactError, match="extra"):
        unpack_model(packed, CPU)


def test_a_tensor_of_another_shape_is_named(packed):
    packed.tensors["input.smear.gate"] = StoredTensor(Storage.FP32, torch.ones(65))
    with pytest.raises(ArtifactError, match=r"input\.smear\.gate is fp32 of shape \(65,\).*fp32 of shape \(64,\)"):
        unpack_model(packed, CPU)


def test_a_tensor_stored_by_another_scheme_is_named(packed):
    packed.tensors["input.smear.gate"] = StoredTensor(Storage.FP16, torch.ones(64, dtype=torch.float16))
    with pytest.raises(ArtifactError, match=r"input\.smear\.gate is fp16.*asks for fp32"):
        unpack_model(packed, CPU)


@pytest.mark.parametrize(("option", "value"), [("num_layers", 3), ("num_layers", 0), ("model_dim", "64"), ("x", 1)])
def test_a_config_that_does_not_fit_is_an_artifact_error(packed, option, value):
    packed.config[option] = value
    with pytest.raises(ArtifactError):
        unpack_model(packed, CPU)


def test_a_config_of_a_giant_takes_no_memory_before_it_is_refused(packed):
    packed.config.update(num_layers=256, model_dim=16384, num_heads=32, num_kv_heads=32)
    with pytest.raises(ArtifactError, match=r"unmatched|shape"):
        unpack_model(packed, CPU)


def test_the_longest_rows_in_a_file_of_a_kilobyte_take_bounded_memory(tmp_path):
    """The rotary tables are as long as the config says, whatever the file holds: 2 x 128 MiB, filled from as much."""
    sizes = {"num_layers": 1, "model_dim": 512, "num_heads": 1, "num_kv_heads": 1, "mlp_mult": 0.25, "vocab_size": 4}
    rows = {"train_seq_len": 2**17, "train_batch_tokens": 2**17, "micro_batch_tokens": 2**17}
    config = Config(**sizes, **rows, bigram_vocab_size=0, compute_dtype="float32")
    with torch.device("meta"):
        parameters = exported_parameters(GPT(config))
    zeros = {name: (torch.zeros(tensor.shape), storage) for name, (tensor, storage) in parameters.items()}
    artifact = Artifact(config.artifact_fields(), DIGEST, quantize_parameters(zeros))
    data = encode_artifact(artifact)
    assert len(data) < 2000
    (tmp_path / "model.golf").write_bytes(data)
    growth, said = peak_growth(
        "import torch\n"
        "from golfmodel.artifact.container import read_artifact\n"
        "from golfmodel.artifact.readback import unpack_model",
        "unpack_model(read_artifact(sys.argv[1]), torch.device('cpu'))",
        tmp_path / "model.golf",
    )
    assert said == "no error"
    assert growth < 2**30
