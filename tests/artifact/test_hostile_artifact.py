"""Artifacts in a sound frame that are foreign, inconsistent or do not match their digest."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from forgery import CONFIG, TOKENIZER_DIGEST, Forgery, framed, header_and_body

from golfmodel.artifact.container import decode_artifact
from golfmodel.runtime.errors import ArtifactError


def edit_metadata(**changes: str) -> Callable[[Forgery], object]:
    return lambda forgery: forgery.metadata.update(changes)


def edit_schemes(**changes: str | None) -> Callable[[Forgery], object]:
    return lambda forgery: forgery.schemes(**{name.replace("__", "."): value for name, value in changes.items()})


def edit_tensor(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[Forgery], object]:
    return lambda forgery: forgery.tensors.update({name: [dtype, shape, data]})


def poke(name: str, offset: int, value: bytes) -> Callable[[Forgery], object]:
    def change(forgery: Forgery) -> None:
        dtype, shape, data = forgery.tensors[name]
        forgery.tensors[name] = [dtype, shape, data[:offset] + value + data[offset + len(value) :]]

    return change


GATE, QUERY = "input.smear.gate", "blocks.2.attention.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_metadata(format="other"), "format 'other'; expected 'golfmodel-artifact'"),
        (edit_metadata(format="x" * 10**5), "format 'xxxxxxxxxxxx...xxxxxxxxxxxxx'; expected"),
        (lambda forgery: forgery.metadata.pop("format"), "format None; expected"),
        (edit_metadata(version="2"), "format version '2'; this program reads '1'"),
        (lambda forgery: forgery.metadata.pop("schemes"), "metadata entries missing or unknown: 'schemes'"),
        (edit_metadata(note="hello"), "metadata entries missing or unknown: 'note'"),
        (edit_metadata(tokenizer="00"), "tokenizer digest '00'; expected 64 hexadecimal digits"),
        (edit_metadata(tokenizer=TOKENIZER_DIGEST + "\n"), "tokenizer digest"),
        (edit_metadata(config="[1]"), "the config is a JSON list; expected an object"),
        (edit_metadata(config="{"), "the config is not JSON"),
        (edit_metadata(config='{"a":' * 50_000), "the config is not JSON"),
        (edit_metadata(config='{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "the config is not JSON"),
        (edit_metadata(schemes="null"), "the schemes is a JSON NoneType"),
        (edit_schemes(input__smear__gate="int4"), "'input.smear.gate' has scheme 'int4'; expected one of int6, int8"),
        (edit_schemes(input__smear__gate="none"), "scheme 'none'; expected one of"),
        (edit_metadata(schemes='{"w": ["fp32"]}'), r"'w' has scheme \['fp32'\]"),
        (edit_metadata(schemes="{}"), "no tensors"),
        (edit_metadata(schemes=json.dumps({"\x1b": "fp32"})), r"'\\x1b': a name is at most"),
        (edit_metadata(schemes=json.dumps({"\ud800": "fp32"})), "a name is at most"),
        (edit_schemes(input__smear__gate=None), "tensors that no scheme covers: 'input.smear.gate'"),
        (edit_schemes(more="fp32"), "tensors missing: 'more'"),
        (edit_schemes(more="int6"), "tensors missing: 'more.codes', 'more.scale'"),
        (edit_schemes(input__smear__gate="int6"), "tensors missing: 'input.smear.gate.codes'"),
        (edit_schemes(input__smear__gate="fp16"), "'input.smear.gate' holds float32; fp16 needs float16"),
        (edit_schemes(input__token__weight="fp32"), "'input.token.weight' holds float16; fp32 needs float32"),
        (edit_schemes(**{f"{QUERY}.codes": "fp32"}), "two parameters share a tensor"),
        (edit_tensor("extra", "F32", [1], bytes(4)), "tensors that no scheme covers: 'extra'"),
        (lambda forgery: forgery.tensors.pop(GATE), "tensors missing: 'input.smear.gate'"),
        (edit_tensor(GATE, "F32", [0], b""), r"'input.smear.gate' is empty, shape \[0\]"),
        (edit_tensor(GATE, "I16", [6], bytes(12)), "'input.smear.gate' holds int16; fp32 needs float32"),
        (edit_tensor(f"{QUERY}.codes", "I8", [36], bytes(36)), r"codes of shape \[36\]; expected two dimensions"),
        (edit_tensor(f"{QUERY}.codes", "I8", [4, 9], bytes(36)), r"expected float16 of shape \[4\]"),
        (edit_tensor(f"{QUERY}.codes", "F16", [6, 6], bytes(72)), "holds float16; int6 needs int8"),
        (edit_tensor(f"{QUERY}.scale", "F16", [5], b"\0\x3c" * 5), r"scale of shape \[5\]; expected float16"),
        (edit_tensor(f"{QUERY}.scale", "F16", [6, 1], b"\0\x3c" * 6), r"scale of shape \[6, 1\]; expected"),
        (edit_tensor(f"{QUERY}.scale", "F32", [6], bytes(24)), r"a float32 scale of shape \[6\]; expected float16"),
        (poke(f"{QUERY}.codes", 3, b"\x20"), "to 32; int6 allows -31 to 31"),
        (poke(f"{QUERY}.codes", 3, b"\xe0"), "codes from -32 to"),
        (poke("input.bigram.table.codes", 0, b"\x80"), "codes from -128 to"),
        (poke(f"{QUERY}.scale", 2, b"\0\0"), "scale that is not finite and positive"),
        (poke(f"{QUERY}.scale", 2, b"\0\x80"), "scale that is not finite and positive"),
        (poke(f"{QUERY}.scale", 2, b"\0\xbc"), "scale that is not finite and positive"),
        (poke(f"{QUERY}.scale", 2, b"\0\x7c"), "scale that is not finite and positive"),
        (poke(f"{QUERY}.scale", 2, b"\0\x7e"), "scale that is not finite and positive"),
        (poke(GATE, 4, b"\0\0\xc0\x7f"), "'input.smear.gate' holds 1 values that are not finite"),
        (poke("input.token.weight", 2, b"\0\xfc"), "'input.token.weight' holds 1 values that are not finite"),
    ],
)
def test_a_signed_but_inconsistent_artifact_is_refused(
    change: Callable[[Forgery], object], message: str, forgery: Forgery
) -> None:
    change(forgery)
    with pytest.raises(ArtifactError, match=f"^model: .*{message}"):
        decode_artifact(forgery.sign().file(), "model")


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../b", "..", ".", "a\\b", "a\0b", "~", ""])
def test_no_name_in_an_artifact_is_a_path(name: str, forgery: Forgery) -> None:
    forgery.tensors[name] = forgery.tensors.pop(GATE)
    forgery.schemes(**{GATE: None, name: "fp32"})
    with pytest.raises(ArtifactError, match="a name is at most 200 letters, digits, dots and underscores"):
        decode_artifact(forgery.sign().file(), "model")


@pytest.mark.parametrize(
    "change",
    [
        edit_metadata(config=json.dumps(CONFIG | {"num_layers": 3})),
        edit_metadata(tokenizer="0" * 64),
        poke(GATE, 0, b"\1"),
        poke(f"{QUERY}.codes", 0, b"\1"),
        poke(f"{QUERY}.scale", 0, b"\1\x3c"),
        lambda forgery: forgery.tensors.update(
            {GATE: ["F32", [2, 3], forgery.tensors[GATE][2]]},
        ),
        lambda forgery: forgery.tensors.update(
            {
                "blocks.2.mlp.up.weight.codes": forgery.tensors["blocks.10.mlp.up.weight.codes"],
                "blocks.10.mlp.up.weight.codes": forgery.tensors["blocks.2.mlp.up.weight.codes"],
            }
        ),
        edit_metadata(digest="0" * 64),
        edit_metadata(digest=""),
    ],
    ids=["config", "tokenizer", "fp32", "codes", "scale", "shape", "swapped", "digest", "no digest"],
)
def test_what_the_digest_does_not_match_is_refused(change: Callable[[Forgery], object], forgery: Forgery) -> None:
    change(forgery)
    with pytest.raises(ArtifactError, match="model: the content does not match its SHA-256 digest"):
        decode_artifact(forgery.file(), "model")


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "not an artifact, or cut short"),
        (b"\0" * 7, "not an artifact, or cut short"),
        (b"\xff" * 64, "not an artifact, or cut short: a header of 18,446,744,073,709,551,615 bytes in 64"),
        ((57).to_bytes(8, "little") + b"{}" + b" " * 54, "a header of 57 bytes in 64"),
        ((2**20 + 1).to_bytes(8, "little") + b" " * (2**20 + 1), "a header of 1,048,577 bytes"),
        (header_and_body(b""), "safetensors header is not JSON"),
        (header_and_body(b"\xff\xfe{"), "safetensors header is not JSON"),
        (header_and_body(b"[" * 100_000), "safetensors header is not JSON"),
        (header_and_body(b"[]"), "safetensors header is a JSON list"),
        (header_and_body(b'{"w":' + b"9" * 10_000 + b"}"), "safetensors"),
        (header_and_body(b"{}"), "metadata is missing or not text"),
        (header_and_body(b'{"__metadata__": null}'), "metadata is missing or not text"),
        (header_and_body(b'{"__metadata__": {"format": 1}}'), "metadata is missing or not text"),
    ],
)
def test_a_foreign_blob_in_a_sound_frame_is_named(blob: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^model: .*{message}"):
        decode_artifact(framed(blob), "model")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**9]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "Q\n\x1b[2J" * 1000, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32"},
        None,
        7,
    ],
)
def test_a_false_tensor_entry_is_refused(entry: object, forgery: Forgery) -> None:
    forgery.header_extra["zzz\n\x1b"] = entry
    with pytest.raises(ArtifactError, match=r"^model: ") as caught:
        decode_artifact(forgery.sign().file(), "model")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
