"""No bytes, however they came about, crash the reader or give another model."""

from __future__ import annotations

import json

import numpy as np
import zstandard
from forgery import Forgery, framed, header_and_body, same_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import draws, mutants, mutate, refused_or_right

from golfmodel.artifact.container import Artifact, decode_artifact, encode_artifact
from golfmodel.runtime.errors import ArtifactError


def decodes_rightly(data: bytes, original: Artifact) -> bool:
    """Whether `data` is an artifact; it must then be the original one. Anything but an ArtifactError is a failure."""
    return refused_or_right(
        lambda: decode_artifact(data, "fuzzed"),
        lambda decoded: same_artifact(decoded, original),
        ArtifactError,
        "fuzzed: ",
    )


def test_every_flipped_bit_of_the_file_is_found_or_harmless(data: bytes, artifact: Artifact) -> None:
    harmless = 0
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            harmless += decodes_rightly(bytes(flipped), artifact)
    # zstd ignores a few bits: one in the frame header, and those that pad an entropy table to whole bytes.
    assert harmless < len(data) * 8 / 200


def test_every_cut_is_found(data: bytes, artifact: Artifact) -> None:
    for length in range(len(data)):
        assert not decodes_rightly(data[:length], artifact), f"cut to {length}"


def test_a_flipped_bit_under_a_sound_frame_is_found_or_harmless(data: bytes, artifact: Artifact) -> None:
    blob = zstandard.ZstdDecompressor().decompress(data)
    header_end = 8 + int.from_bytes(blob[:8], "little")
    generator = np.random.default_rng(0)
    for position in range(len(blob)):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << int(generator.integers(8))
        accepted = decodes_rightly(framed(bytes(flipped)), artifact)
        # Only the blanks that pad the header, between 8 and header_end, can turn into other blanks.
        assert not accepted or 8 <= position < header_end, f"byte {position} of the blob"


def test_no_mutation_of_the_file_crashes_hangs_or_gives_another_model(data: bytes, artifact: Artifact) -> None:
    for mutant in mutants("artifact file", data):
        decodes_rightly(mutant, artifact)


def test_no_mutation_under_a_sound_frame_crashes_or_gives_another_model(data: bytes, artifact: Artifact) -> None:
    for mutant in mutants("artifact blob", zstandard.ZstdDecompressor().decompress(data)):
        decodes_rightly(framed(mutant), artifact)


def keeps_every_rule(decoded: Artifact) -> bool:
    encode_artifact(decoded)
    return all(tensor.problem() is None for tensor in decoded.tensors.values())


def test_no_signed_mutation_of_the_header_crashes(forgery: Forgery) -> None:
    """With the right digest a changed artifact may be accepted; it must then keep every rule."""
    metadata, tensors = dict(forgery.metadata), dict(forgery.tensors)
    accepted = 0
    for generator in draws("artifact header"):
        forgery.metadata, forgery.tensors = dict(metadata), dict(tensors)
        names = list(tensors)
        name, other = (names[int(index)] for index in generator.integers(len(names), size=2))
        dtype, shape, content = tensors[name]
        match generator.integers(6):
            case 0:
                forgery.metadata["schemes"] = mutate(metadata["schemes"].encode(), generator).decode("latin-1")
            case 1:
                forgery.metadata["config"] = mutate(metadata["config"].encode(), generator).decode("latin-1")
            case 2:
                forgery.tensors[name] = tensors[other]
            case 3:
                forgery.tensors[other + ".codes"] = forgery.tensors.pop(name)
            case 4:
                forgery.tensors[name] = [dtype, [*shape[::-1], 1][: int(generator.integers(1, 4))], content]
            case _:
                forgery.tensors[name] = [dtype, shape, generator.bytes(len(content))]
        accepted += refused_or_right(
            lambda: decode_artifact(forgery.sign().file(), "fuzzed"), keeps_every_rule, ArtifactError, "fuzzed: "
        )
    assert accepted > 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["file", "frame", "blob", "header"]))
def test_arbitrary_bytes_are_an_error(content: bytes, place: str) -> None:
    data = {
        "file": content,
        "frame": b"\x28\xb5\x2f\xfd" + content,
        "blob": framed(content),
        "header": framed(header_and_body(b'{"__metadata__": {"format": "golfmodel-artifact"},' + content)),
    }[place]
    assert not refused_or_right(lambda: decode_artifact(data, "fuzzed"), bool, ArtifactError, "fuzzed: ")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON_VALUES, place=st.sampled_from(["metadata", "config", "schemes", "tensor", "dtype", "shape"]))
def test_arbitrary_json_in_any_place_is_an_error_or_a_config(value: object, place: str, data: bytes) -> None:
    forgery = Forgery.of(data)
    if place in ("config", "schemes"):
        forgery.metadata[place] = json.dumps(value)
    elif place == "metadata":
        forgery.header_extra["__metadata__"] = value
    else:
        entry: dict[str, object] = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
        forgery.header_extra["extra"] = value if place == "tensor" else entry | {place: value}
    refused_or_right(
        lambda: decode_artifact(forgery.sign().file(), "fuzzed"),
        lambda decoded: place == "config" and isinstance(decoded.config, dict),
        ArtifactError,
        "fuzzed: ",
    )
