"""The paid prefix: codecs both ways, the comparison with the text, and its command."""

from __future__ import annotations

import itertools
import lzma
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutants, refused_or_right
from peak_memory import peak_growth

from golfmodel.artifact.prefix import load_prefix, longest_prefix, main
from golfmodel.artifact.prefix_codec import CODECS, WRITING_CODECS, decode_prefix, encode_prefix
from golfmodel.data.shards import write_shard
from golfmodel.runtime.errors import ArtifactError

PROJECT_ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.random.default_rng(0).zipf(1.5, 3000).clip(max=1023).astype(np.uint16)


def raw(tokens: list[int] | np.ndarray) -> bytes:
    return b"".join(int(token).to_bytes(2, "little") for token in tokens)


def test_the_codecs_are_what_they_say() -> None:
    assert encode_prefix(TOKENS, "raw") == raw(TOKENS)
    assert encode_prefix(TOKENS) == encode_prefix(TOKENS, "lzma") == encode_prefix(TOKENS, "xz")
    assert encode_prefix(TOKENS, "lzma") == lzma.compress(raw(TOKENS), preset=6)
    assert zlib.decompress(encode_prefix(TOKENS, "zlib")) == raw(TOKENS)


@pytest.mark.parametrize("codec", WRITING_CODECS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">u2"])
def test_what_is_written_reads_back(codec: str, dtype: str) -> None:
    blob = encode_prefix(TOKENS.astype(dtype), codec)
    for reading in {codec, "auto"}:
        tokens = decode_prefix(blob, reading, len(TOKENS))
        assert tokens.dtype == np.uint16
        assert np.array_equal(tokens, TOKENS)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=30), st.sampled_from(WRITING_CODECS))
def test_any_tokens_survive_any_codec(tokens: list[int], codec: str) -> None:
    blob = encode_prefix(np.array(tokens), codec)
    assert decode_prefix(blob, codec, len(tokens)).tolist() == tokens


@pytest.mark.parametrize("codec", ["lzma", "xz", "auto"])
def test_both_lzma_containers_are_read(codec: str) -> None:
    for container in (lzma.FORMAT_XZ, lzma.FORMAT_ALONE):
        blob = lzma.compress(raw(TOKENS), format=container)
        assert np.array_equal(decode_prefix(blob, codec, len(TOKENS)), TOKENS)


@pytest.mark.parametrize("level", [1, 5, 6, 9])
def test_auto_knows_every_zlib_level(level: int) -> None:
    assert np.array_equal(decode_prefix(zlib.compress(raw(TOKENS), level), "auto", len(TOKENS)), TOKENS)


@pytest.mark.parametrize("first", [0x0178, 0x9C78, 0x005D])
def test_auto_takes_raw_tokens_that_look_like_a_stream_as_raw(first: int) -> None:
    tokens = [first, 0x0100, 7, 8, 9]
    assert decode_prefix(raw(tokens), "auto", 5).tolist() == tokens


def test_auto_does_not_take_a_damaged_xz_stream_as_raw() -> None:
    with pytest.raises(ArtifactError, match="cut short"):
        decode_prefix(encode_prefix(TOKENS)[:-4], "auto", len(TOKENS))


@pytest.mark.parametrize("codec", ["lzma", "zlib"])
def test_damage_is_named(codec: str) -> None:
    blob = encode_prefix(TOKENS, codec)
    with pytest.raises(ArtifactError, match=f"cut short: its {codec} stream"):
        decode_prefix(blob[:-1], codec, len(TOKENS))
    with pytest.raises(ArtifactError, match=f"2 bytes follow the prefix's {codec} stream"):
        decode_prefix(blob + b"xx", codec, len(TOKENS))
    for damaged in (blob[:50] + bytes([blob[50] ^ 255]) + blob[51:], b"garbage garbage"):
        with pytest.raises(ArtifactError, match=f"not a sound {codec} stream"):
            decode_prefix(damaged, codec, len(TOKENS))


@pytest.mark.parametrize("codec", WRITING_CODECS)
def test_lengths_are_checked(codec: str) -> None:
    def blob(content: bytes) -> bytes:
        return {
            "raw": lambda: content,
            "zlib": lambda: zlib.compress(content),
            "lzma": lambda: lzma.compress(content),
            "xz": lambda: lzma.compress(content),
        }[codec]()

    with pytest.raises(ArtifactError, match="the prefix is empty"):
        decode_prefix(b"", codec, 10)
    if codec != "raw":
        with pytest.raises(ArtifactError, match="holds no tokens"):
            decode_prefix(blob(b""), codec, 10)
    with pytest.raises(ArtifactError, match="holds 7 bytes; tokens of two bytes make an even number"):
        decode_prefix(blob(b"1234567"), codec, 10)
    assert decode_prefix(blob(raw(range(10))), codec, 10).tolist() == list(range(10))
    with pytest.raises(ArtifactError, match="holds more than the text's 9 targets"):
        decode_prefix(blob(raw(range(10))), codec, 9)
    with pytest.raises(ArtifactError, match="holds more than the text's 9 targets"):
        decode_prefix(blob(raw(range(9)) + b"x"), codec, 9)


@pytest.mark.parametrize("codec", ["lzma", "zlib", "alone with a 4 GiB dictionary"])
def test_a_bomb_takes_bounded_memory(codec: str, tmp_path: Path) -> None:
    content = bytes(2**28)
    if codec == "lzma":
        blob = lzma.compress(content, preset=0)
    elif codec == "zlib":
        blob = zlib.compress(content, 9)
    else:
        blob = b"\x5d\xff\xff\xff\xff" + bytes(100)
        codec = "lzma"
    (tmp_path / "bomb").write_bytes(blob)
    growth, said = peak_growth(
        "from golfmodel.artifact.prefix_codec import decode_prefix",
        "decode_prefix(Path(sys.argv[1]).read_bytes(), sys.argv[2], 1000)",
        tmp_path / "bomb",
        codec,
    )
    assert "more than the text's 1,000 targets" in said or "Memory usage limit" in said
    assert growth < 16 * 2**20


def test_no_bytes_crash_a_codec_or_cover_other_tokens_than_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    blobs = [encode_prefix(TOKENS[:200], codec) for codec in ("lzma", "zlib", "raw")]
    blobs.append(lzma.compress(raw(TOKENS[:200]), format=lzma.FORMAT_ALONE))
    accepted = 0
    for codec, blob in zip(itertools.cycle(CODECS), mutants("prefix", *blobs), strict=False):
        path.write_bytes(blob)
        accepted += refused_or_right(
            lambda: load_prefix(path, codec, TOKENS),  # noqa: B023
            lambda tokens: len(tokens) > 0 and np.array_equal(tokens, TOKENS[: len(tokens)]),
            ArtifactError,
            str(path),
        )
    assert accepted > 10


@pytest.mark.parametrize(
    ("tokens", "codec", "message"),
    [
        ([], "lzma", "at least one token"),
        ([1, 65536], "raw", "from 1 to 65536"),
        ([-1, 5], "raw", "from -1 to 5"),
        ([1], "auto", "'auto' cannot write; use one of lzma, xz, zlib, raw"),
        ([1], "gzip", "'gzip' cannot write"),
    ],
)
def test_what_cannot_be_written(tokens: list[int], codec: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        encode_prefix(np.array(tokens, dtype=np.int64), codec)


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ArtifactError, match="'gzip' is unknown; use one of lzma, xz, zlib, raw, auto"):
        decode_prefix(b"xx", "gzip", 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
@pytest.mark.parametrize("count", [1, 1234, 3000])
def test_a_matching_prefix_loads(dtype: type, count: int, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    path.write_bytes(encode_prefix(TOKENS[:count]))
    assert np.array_equal(load_prefix(path, "lzma", TOKENS.astype(dtype)), TOKENS[:count])


def test_a_prefix_that_differs_names_the_place_and_both_tokens(tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    changed = TOKENS[:2000].copy()
    changed[1500], changed[1999] = 1023 - changed[1500], 1023 - changed[1999]
    path.write_bytes(encode_prefix(changed))
    message = (
        rf"prefix: does not match the validation text: target 1,500 is token {TOKENS[1500]}, "
        rf"the prefix says {changed[1500]} \(2 of 2,000 differ\)"
    )
    with pytest.raises(ArtifactError, match=message):
        load_prefix(path, "lzma", TOKENS)


def test_tokens_shifted_by_one_do_not_match(tmp_path: Path) -> None:
    """The tokens themselves, rather than the targets, begin one place too early."""
    tokens = np.arange(100, dtype=np.uint16)
    path = tmp_path / "prefix"
    path.write_bytes(encode_prefix(tokens[:50]))
    with pytest.raises(ArtifactError, match="target 0 is token 1, the prefix says 0"):
        load_prefix(path, "lzma", tokens[1:])


def test_a_longer_prefix_than_the_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    path.write_bytes(encode_prefix(TOKENS))
    with pytest.raises(ArtifactError, match=r"prefix: the prefix holds more than the text's 2,999 targets"):
        load_prefix(path, "lzma", TOKENS[:-1])
    path.write_bytes(bytes(200_000))
    with pytest.raises(ArtifactError, match="200,000 bytes; a prefix of this text has at most"):
        load_prefix(path, "raw", TOKENS)


def test_a_missing_prefix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read a prefix of this text: No such file"):
        load_prefix(tmp_path / "none", "lzma", TOKENS)


@pytest.mark.parametrize("codec", WRITING_CODECS)
@pytest.mark.parametrize("budget", [100, 777, 2000])
def test_the_longest_prefix_within_a_budget(codec: str, budget: int) -> None:
    count, blob = longest_prefix(TOKENS, codec, budget)
    assert blob == encode_prefix(TOKENS[:count], codec)
    assert len(blob) <= budget < len(encode_prefix(TOKENS[: count + 1], codec))


def test_a_budget_beyond_the_text_takes_all_of_it_and_a_tiny_one_is_an_error() -> None:
    for length in (1, 2, 3, 100, 127, 128):
        assert longest_prefix(TOKENS[:length], "raw", 10**6) == (length, raw(TOKENS[:length]))
    assert longest_prefix(TOKENS, "raw", 2)[0] == longest_prefix(TOKENS, "raw", 3)[0] == 1
    with pytest.raises(ArtifactError, match="1 bytes do not hold even one token of a raw prefix"):
        longest_prefix(TOKENS, "raw", 1)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two validation shards that make one text of 3,000 tokens, 2,999 targets."""
    directory = tmp_path / "shards"
    directory.mkdir()
    write_shard(directory / "demo_val_000000.bin", TOKENS[:1000])
    write_shard(directory / "demo_val_000001.bin", TOKENS[1000:])
    return directory


def test_the_command_writes_the_first_targets(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "prefix.xz"
    arguments = ["build", "--val-dir", str(shards), "--output", str(output)]
    assert main([*arguments, "--num-tokens", "1500"]) == 0
    assert output.read_bytes() == lzma.compress(raw(TOKENS[1:1501]), preset=6)
    printed = capsys.readouterr().out
    assert f"1,500 tokens, 50.02% of 2,999 targets, {output.stat().st_size:,} bytes" in printed
    assert "research only" in printed
    assert "not eligible" in printed
    assert np.array_equal(load_prefix(output, "auto", TOKENS[1:]), TOKENS[1:1501])

    assert main([*arguments, "--budget-bytes", "500", "--codec", "raw"]) == 0
    assert output.read_bytes() == raw(TOKENS[1:251])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens is 0; the text in .* has 1 to 2,999"),
        (["--num-tokens", "3000"], "--num-tokens is 3000"),
        (["--budget-bytes", "10"], "10 bytes do not hold even one token"),
    ],
)
def test_the_command_reports_impossible_lengths(
    arguments: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "prefix.xz"
    assert main(["build", "--val-dir", str(shards), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not output.exists()


def test_the_command_reports_missing_shards_and_unwritable_output(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--val-dir", str(tmp_path / "no"), "--output", "x", "--num-tokens", "1"]) == 2
    assert "does not exist" in capsys.readouterr().err
    blocked = shards / "demo_val_000000.bin" / "prefix"
    assert main(["build", "--val-dir", str(shards), "--output", str(blocked), "--num-tokens", "1"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_command_has_help_and_wants_exactly_one_length() -> None:
    command = [sys.executable, "-m", "golfmodel.artifact.prefix", "build"]
    shown = subprocess.run([*command, "--help"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--val-dir", "--num-tokens", "--budget-bytes", "--output", "--codec", "research only"):
        assert option in shown
    with pytest.raises(SystemExit):
        main(["build", "--val-dir", "x", "--output", "y"])
    with pytest.raises(SystemExit):
        main(["build", "--val-dir", "x", "--output", "y", "--num-tokens", "1", "--budget-bytes", "1"])
