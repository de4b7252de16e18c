"""The artifact file: a zstd frame around a safetensors blob.

INT6 and INT8 parameters are two tensors, `<name>.codes` and `<name>.scale`; the others keep their name. The
safetensors metadata holds the format's name and version, the model's config and the schemes as JSON, the
tokenizer's digest, and a SHA-256 digest over all of it and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from golfmodel.artifact.frame import compress, content_limit, decompress
from golfmodel.artifact.stored import CODE_LIMIT, VALUE_DTYPE, StoredTensor
from golfmodel.model.parameters import Storage
from golfmodel.runtime.bounded import printable, read_bounded
from golfmodel.runtime.errors import ArtifactError
from golfmodel.runtime.files import write_bytes
from golfmodel.runtime.metadata import Format, checked_metadata, json_object

FORMAT = Format(
    what="an artifact",
    name="golfmodel-artifact",
    version="1",
    entries={"format", "version", "config", "schemes", "tokenizer", "digest"},
    max_header_bytes=2**20,
    error=ArtifactError,
)
MAX_FILE_BYTES = 64 * 2**20
_NAME_RULE = "at most 200 letters, digits, dots and underscores, the first a letter or digit"
_DTYPE_NAMES = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, eq=False)
class Artifact:
    """What the file holds.

    Attributes:
        config: plain JSON values; tuples come back as lists.
        tokenizer_digest: SHA-256 of the tokenizer file, 64 lower-case hexadecimal digits.
        tensors: every stored parameter by name.
    """

    config: dict[str, Any]
    tokenizer_digest: str
    tensors: dict[str, StoredTensor]


def write_artifact(path: str | Path, artifact: Artifact, *, show_progress: bool = False) -> int:
    """Writes `artifact` to `path` atomically and returns the file's size in bytes.

    Raises:
        ArtifactError: what `encode_artifact` raises.
        StorageError: the file cannot be written; an earlier file stays whole.
    """
    data = encode_artifact(artifact, show_progress=show_progress)
    write_bytes(path, data)
    return len(data)


def read_artifact(path: str | Path) -> Artifact:
    """The artifact in the file `path`, every rule of the format checked.

    Raises:
        ArtifactError: the file is missing, too large, damaged, foreign or inconsistent; says which.
    """
    return decode_artifact(read_bounded(path, MAX_FILE_BYTES, "an artifact", ArtifactError), str(path))


def encode_artifact(artifact: Artifact, *, show_progress: bool = False) -> bytes:
    """The file's bytes; equal artifacts give equal bytes, whatever the order of their dicts.

    Raises:
        ArtifactError: the artifact breaks a rule that a reader checks.
    """
    blob = _blob(artifact)
    data = compress(blob, show_progress=show_progress)
    if len(blob) > content_limit(len(data)):
        raise ArtifactError(
            f"{len(blob):,} bytes compress to {len(data):,}, of which a reader accepts {content_limit(len(data)):,}; "
            "the weights of a trained model are not that uniform"
        )
    if len(data) > MAX_FILE_BYTES:
        raise ArtifactError(f"the artifact takes {len(data):,} bytes; a reader accepts {MAX_FILE_BYTES:,}")
    return data


def decode_artifact(data: bytes, source: str) -> Artifact:
    """The artifact in `data`, every rule of the format checked; `source` names it in errors.

    Raises:
        ArtifactError: `data` is damaged, foreign or inconsistent.
    """
    blob = decompress(data, source)
    metadata = _checked_metadata(blob, source)
    try:
        flat = safetensors.torch.load(blob)
    except Exception as error:
        raise ArtifactError(f"{source}: damaged safetensors content: {printable(error)}") from error
    config = json_object(metadata["config"], "config", source, ArtifactError)
    tensors = _assembled(_checked_schemes(metadata["schemes"], source), flat, source)
    if metadata["digest"] != _content_digest(metadata, flat):
        raise ArtifactError(f"{source}: the content does not match its SHA-256 digest")
    return Artifact(config, metadata["tokenizer"], tensors)


def flat_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The file's tensors by their names there, in its order: the largest dtype first, then by name."""
    flat: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        if stored.scale_R is None:
            flat[name] = stored.values
        else:
            flat[f"{name}.codes"], flat[f"{name}.scale"] = stored.values, stored.scale_R
    return dict(sorted(flat.items(), key=lambda item: (-item[1].itemsize, item[0])))


def tensor_bytes(tensor: Tensor) -> bytes:
    """The tensor's elements in row-major order, little-endian."""
    return tensor.contiguous().numpy().tobytes()


def _blob(artifact: Artifact) -> bytes:
    """The safetensors form, written here because the library orders metadata differently in each process."""
    _check(artifact)
    flat = flat_tensors(artifact.tensors)
    schemes = {name: tensor.storage.value for name, tensor in artifact.tensors.items()}
    metadata = {
        "format": FORMAT.name,
        "version": FORMAT.version,
        "config": _json_text(artifact.config),
        "schemes": json.dumps(schemes, sort_keys=True),
        "tokenizer": artifact.tokenizer_digest,
    }
    metadata["digest"] = _content_digest(metadata, flat)
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in flat.items():
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned to its dtype
    if len(text) > FORMAT.max_header_bytes:
        raise ArtifactError(
            f"the names, shapes and config take {len(text):,} bytes; a reader accepts {FORMAT.max_header_bytes:,}"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *map(tensor_bytes, flat.values())])


def _check(artifact: Artifact) -> None:
    if not artifact.tensors:
        raise ArtifactError("the artifact has no tensors")
    if not _is_digest(artifact.tokenizer_digest):
        raise ArtifactError(f"tokenizer digest {artifact.tokenizer_digest!r} is not 64 hexadecimal digits")
    taken: set[str] = set()
    for name, tensor in artifact.tensors.items():
        if not _is_name(name):
            raise ArtifactError(f"parameter {name!r}: a name is {_NAME_RULE}")
        if problem := tensor.problem():
            raise ArtifactError(f"parameter {name!r} {problem}")
        for tensor_name in _tensor_names(name, tensor.storage):
            if tensor_name in taken:
                raise ArtifactError(f"parameter {name!r} needs the tensor name {tensor_name!r}, which is taken")
            taken.add(tensor_name)


def _checked_metadata(blob: bytes, source: str) -> dict[str, str]:
    metadata = checked_metadata(blob, FORMAT, source)
    if not _is_digest(metadata["tokenizer"]):
        digest = reprlib.repr(metadata["tokenizer"])
        raise ArtifactError(f"{source}: tokenizer digest {digest}; expected 64 hexadecimal digits")
    return metadata


def _checked_schemes(text: str, source: str) -> dict[str, Storage]:
    allowed = {storage.value: storage for storage in VALUE_DTYPE}
    schemes = json_object(text, "schemes", source, ArtifactError)
    for name, value in schemes.items():
        if not _is_name(name):
            raise ArtifactError(f"{source}: parameter {reprlib.repr(name)}: a name is {_NAME_RULE}")
        if not isinstance(value, str) or value not in allowed:
            raise ArtifactError(
                f"{source}: parameter {name!r} has scheme {reprlib.repr(value)}; expected one of {', '.join(allowed)}"
            )
    if not schemes:
        raise ArtifactError(f"{source}: the artifact has no tensors")
    return {name: allowed[value] for name, value in schemes.items()}


def _assembled(schemes: dict[str, Storage], flat: dict[str, Tensor], source: str) -> dict[str, StoredTensor]:
    names = {name: _tensor_names(name, storage) for name, storage in schemes.items()}
    expected = [tensor_name for tensor_names in names.values() for tensor_name in tensor_names]
    if missing := set(expected) - flat.keys():
        raise ArtifactError(f"{source}: tensors missing: {_listed(missing)}")
    if extra := flat.keys() - set(expected):
        raise ArtifactError(f"{source}: tensors that no scheme covers: {_listed(extra)}")
    if len(expected) != len(flat):
        raise ArtifactError(f"{source}: two parameters share a tensor")
    tensors = {name: StoredTensor(schemes[name], *(flat[key] for key in keys)) for name, keys in names.items()}
    for name, tensor in tensors.items():
        if problem := tensor.problem():
            raise ArtifactError(f"{source}: parameter {name!r} {problem}")
    return tensors


def _tensor_names(name: str, storage: Storage) -> tuple[str, ...]:
    return (f"{name}.codes", f"{name}.scale") if storage in CODE_LIMIT else (name,)


def _content_digest(metadata: Mapping[str, str], flat: Mapping[str, Tensor]) -> str:
    """SHA-256 of a JSON text (the other metadata, dtypes and shapes), then of the tensors by name."""
    described = {
        "metadata": {key: value for key, value in metadata.items() if key != "digest"},
        "tensors": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in flat.items()},
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(flat):
        digest.update(tensor_bytes(flat[name]))
    return digest.hexdigest()


def _json_text(config: dict[str, Any]) -> str:
    try:
        return json.dumps(config, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the config is not plain JSON values: {error}") from error


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.]{0,199}", text) is not None


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _listed(names: set[str]) -> str:
    shown = ", ".join(reprlib.repr(name) for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
