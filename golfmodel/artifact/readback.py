"""A model to an artifact and back: what is scored is what the file holds."""

from __future__ import annotations

import torch

from golfmodel.artifact.container import Artifact
from golfmodel.artifact.quantize import dequantize_parameters, quantize_parameters
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import exported_parameters
from golfmodel.runtime.errors import ArtifactError, ConfigError


def pack_model(model: GPT, tokenizer_digest: str, *, show_progress: bool = False) -> Artifact:
    """The artifact of a model's exported parameters, each stored by its declared scheme."""
    stored = quantize_parameters(exported_parameters(model), show_progress=show_progress)
    return Artifact(model.config.artifact_fields(), tokenizer_digest, stored)


def unpack_model(artifact: Artifact, device: torch.device, source: str = "the artifact") -> GPT:
    """The model that an artifact holds, on `device`, ready to score.

    Raises:
        ArtifactError: its config is not valid, or its tensors are not those of the model the config describes.
    """
    try:
        config = Config.from_artifact_fields(artifact.config)
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error
    with torch.device("meta"):
        model = GPT(config)
    expected = exported_parameters(model)
    if artifact.tensors.keys() != expected.keys():
        odd = sorted(artifact.tensors.keys() ^ expected.keys())
        raise ArtifactError(f"{source}: its tensors are not those of its config; unmatched: {', '.join(odd[:5])}")
    for name, (tensor, storage) in expected.items():
        stored = artifact.tensors[name]
        if stored.shape != tuple(tensor.shape) or stored.storage is not storage:
            raise ArtifactError(
                f"{source}: {name} is {stored.storage.value} of shape {stored.shape}, its config asks for "
                f"{storage.value} of shape {tuple(tensor.shape)}"
            )
    # Memory is taken only now that the file has been seen to fill it, and never for initial weights.
    model.to_empty(device=device)
    model.rotary.fill_tables()
    weights = dequantize_parameters(artifact.tensors, device=device)
    for name, (parameter, _) in exported_parameters(model).items():
        parameter.copy_(weights[name])
    return model.eval()
