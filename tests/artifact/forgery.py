"""The small model whose artifact the tests use, and the means to take an artifact apart and forge others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import torch
import zstandard

from golfmodel.artifact.container import Artifact
from golfmodel.model.parameters import Storage

TOKENIZER_DIGEST = hashlib.sha256(b"tokenizer").hexdigest()
CONFIG = {"num_layers": 2, "tie_embeddings": True, "rope_base": 10000.0, "embed_storage": "fp16"}
ITEM_BYTES = {"I8": 1, "F16": 2, "F32": 4}


@dataclass
class Forgery:
    """The inside of an artifact file as plain data, to be changed and sealed again by an independent writer.

    `tensors` maps a tensor's name to [safetensors dtype, shape, bytes].
    """

    metadata: dict[str, str]
    tensors: dict[str, list]
    header_extra: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> Forgery:
        blob = zstandard.ZstdDecompressor().decompress(data)
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
        metadata = header.pop("__metadata__")
        body = blob[8 + size :]
        return cls(
            metadata,
            {
                name: [entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]]
                for name, entry in header.items()
            },
        )

    def schemes(self, **changes: str | None) -> None:
        """Changes the schemes of parameters; None removes one."""
        schemes = json.loads(self.metadata["schemes"]) | changes
        self.metadata["schemes"] = json.dumps({name: value for name, value in schemes.items() if value is not None})

    def sign(self) -> Forgery:
        """Puts the right digest in, as the format defines it."""
        names = {"I8": "torch.int8", "F16": "torch.float16", "F32": "torch.float32", "I16": "torch.int16"}
        described = {
            "metadata": {key: value for key, value in self.metadata.items() if key != "digest"},
            "tensors": {name: [names[dtype], shape] for name, (dtype, shape, _) in self.tensors.items()},
        }
        content = json.dumps(described, sort_keys=True).encode()
        content += b"".join(self.tensors[name][2] for name in sorted(self.tensors))
        self.metadata["digest"] = hashlib.sha256(content).hexdigest()
        return self

    def blob(self) -> bytes:
        header = {"__metadata__": self.metadata, **self.header_extra}
        start = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
            start += len(data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + b"".join(entry[2] for entry in self.tensors.values())

    def file(self) -> bytes:
        return framed(self.blob())


def framed(blob: bytes, level: int = 1) -> bytes:
    """A sound frame around any content."""
    return zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True).compress(blob)


def same_artifact(a: Artifact, b: Artifact) -> bool:
    """Whether two artifacts hold the same, bit for bit."""

    def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()

    return (
        a.config == b.config
        and a.tokenizer_digest == b.tokenizer_digest
        and a.tensors.keys() == b.tensors.keys()
        and all(
            a.tensors[name].storage is b.tensors[name].storage
            and same(a.tensors[name].values, b.tensors[name].values)
            and same(a.tensors[name].scale_R, b.tensors[name].scale_R)
            for name in a.tensors
        )
    )


def small_parameters() -> dict[str, tuple[torch.Tensor, Storage]]:
    """Names as the model has them, two blocks, a few hundred values, every scheme."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    parameters: dict[str, tuple[torch.Tensor, Storage]] = {
        "input.token.weight": (normal(16, 6).bfloat16(), Storage.FP16),
        "input.bigram.table": (normal(5, 4).bfloat16(), Storage.INT8),
        "input.bigram.scale": (torch.tensor(0.05), Storage.FP32),
        "input.smear.gate": (normal(6), Storage.FP32),
    }
    for block in (2, 10):
        parameters[f"blocks.{block}.attention.query.weight"] = (normal(6, 6), Storage.INT6)
        parameters[f"blocks.{block}.mlp.up.weight"] = (normal(18, 6), Storage.INT6)
        parameters[f"blocks.{block}.attention_scale"] = (normal(6), Storage.FP32)
    return parameters


def header_and_body(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body
