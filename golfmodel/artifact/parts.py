"""What each part of the model takes of the artifact."""

from __future__ import annotations

from collections.abc import Mapping

from golfmodel.artifact.container import Artifact, flat_tensors, tensor_bytes
from golfmodel.artifact.frame import compress
from golfmodel.artifact.stored import StoredTensor
from golfmodel.runtime.progress import Progress

OTHER = "other"
_PART_OF_MODULE = {
    "token": "token embedding",
    "bigram": "bigram",
    "attention": "attention",
    "mlp": "mlp",
    "head": "head",
}


def part_of(name: str) -> str:
    """The part that the parameter `name` belongs to, by the first module in its path that names one."""
    return next((_PART_OF_MODULE[module] for module in name.split(".") if module in _PART_OF_MODULE), OTHER)


def split_by_part(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of every part that has any, parts in the order data flows through the model."""
    parts: dict[str, dict[str, StoredTensor]] = {part: {} for part in [*_PART_OF_MODULE.values(), OTHER]}
    for name, tensor in tensors.items():
        parts[part_of(name)][name] = tensor
    return {part: held for part, held in parts.items() if held}


def bytes_by_part(artifact: Artifact, total_bytes: int | None = None, *, show_progress: bool = False) -> dict[str, int]:
    """An estimate of each part's compressed bytes: its tensors alone through the artifact's compression.

    Parts share one frame in the file, so the estimates do not add up to its size, and leave out its header. With
    `total_bytes` (the file's size) they are scaled so that they do: for a picture whose pieces make the whole.
    """
    parts, estimates = split_by_part(artifact.tensors), {}
    with Progress("weighing", len(parts), unit="part", enabled=show_progress) as progress:
        for part, held in parts.items():
            estimates[part] = len(compress(b"".join(map(tensor_bytes, flat_tensors(held).values()))))
            progress.update()
    return estimates if total_bytes is None else _scaled(estimates, total_bytes)


def _scaled(estimates: dict[str, int], total: int) -> dict[str, int]:
    """Whole numbers in the proportions of `estimates` that add up to `total`."""
    scaled, done, seen = {}, 0, 0
    for part, estimate in estimates.items():
        seen += estimate
        scaled[part] = seen * total // sum(estimates.values()) - done
        done += scaled[part]
    return scaled
