"""A model to an artifact and back: what is scored is what the file holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from golfmodel.artifact.container import Artifact
from golfmodel.artifact.quantize import dequantize_parameters, quantize_parameters
from golfmodel.config import Config
from golfmodel.evaluation.evaluator import Evaluator
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import exported_parameters
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class ArtifactScores:
    """Bits per byte of an artifact's model.

    Attributes:
        int6: windows side by side.
        sliding: the sliding window; None with `EVAL_STRIDE` 0.
        with_prefix: the sliding window with covered targets at 0 bits; None without a paid prefix.
    """

    int6: float
    sliding: float | None
    with_prefix: float | None


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
        expected = {name: tensor for name, (tensor, _) in exported_parameters(GPT(config)).items()}
    if artifact.tensors.keys() != expected.keys():
        odd = sorted(artifact.tensors.keys() ^ expected.keys())
        raise ArtifactError(f"{source}: its tensors are not those of its config; unmatched: {', '.join(odd[:5])}")
    for name, tensor in expected.items():
        if artifact.tensors[name].shape != tuple(tensor.shape):
            raise ArtifactError(
                f"{source}: {name} has shape {artifact.tensors[name].shape}, its config asks for {tuple(tensor.shape)}"
            )
    model = GPT(config)
    weights = dequantize_parameters(artifact.tensors, device=device)
    with torch.no_grad():
        for name, (parameter, _) in exported_parameters(model).items():
            parameter.copy_(weights[name])
    return model.to(device).eval()


def score_model(model: GPT, evaluator: Evaluator, compile_choice: str, prefix_targets: int = 0) -> ArtifactScores:
    """Scores a model that `unpack_model` gave, both ways."""
    device = next(model.parameters()).device
    token_losses = compiled(model.token_losses, compile_choice, device)
    int6 = evaluator.side_by_side(token_losses, "scoring the artifact")
    sliding = evaluator.sliding(token_losses, prefix_targets=prefix_targets)
    return ArtifactScores(
        int6=int6.bits_per_byte,
        sliding=None if sliding is None else sliding.bits_per_byte,
        with_prefix=sliding.bits_per_byte_with_prefix if sliding is not None and prefix_targets else None,
    )
