"""A small artifact with every scheme in it, its bytes, and a copy of its inside that a test may change."""

from __future__ import annotations

import pytest
from forgery import CONFIG, TOKENIZER_DIGEST, Forgery, small_parameters

from golfmodel.artifact.container import Artifact, decode_artifact, encode_artifact
from golfmodel.artifact.quantize import quantize_parameters


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    return Artifact(CONFIG, TOKENIZER_DIGEST, quantize_parameters(small_parameters()))


@pytest.fixture(scope="session")
def data(artifact: Artifact) -> bytes:
    return encode_artifact(artifact)


@pytest.fixture
def forgery(data: bytes) -> Forgery:
    """A faithful copy that a test may change; it decodes as it is."""
    copy = Forgery.of(data)
    decode_artifact(copy.sign().file(), "copy")
    return copy
