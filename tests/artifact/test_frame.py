"""The zstd frame: cut, foreign, oversized and explosive files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import zstandard
from forgery import framed
from peak_memory import peak_growth

from golfmodel.artifact.container import decode_artifact
from golfmodel.runtime.errors import ArtifactError


def test_a_cut_file_says_so(data: bytes) -> None:
    for length in (20, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtifactError, match="model: cut short"):
            decode_artifact(data[:length], "model")


@pytest.mark.parametrize("extra", [b"\0", b"\x28\xb5\x2f\xfd", b"x" * 5000])
def test_bytes_after_the_frame_are_an_error(data: bytes, extra: bytes) -> None:
    with pytest.raises(ArtifactError, match=f"model: {len(extra):,} bytes follow the zstd frame"):
        decode_artifact(data + extra, "model")
    with pytest.raises(ArtifactError, match="bytes follow"):
        decode_artifact(data + data, "model")


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x28\xb5\x2f", "starts with 28b52f"),
        (b"PK\x03\x04" + bytes(100), "starts with 504b0304, not a zstd frame"),
        (b"\x50\x2a\x4d\x18" + bytes(100), "starts with 502a4d18"),  # a zstd skippable frame
        (b"\x28\xb5\x2f\xfd", "damaged zstd frame header"),
        (b"\x28\xb5\x2f\xfd\xa4\x00", "damaged zstd frame header"),
    ],
)
def test_foreign_files_are_named(foreign: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"model: .*{message}"):
        decode_artifact(foreign, "model")


def test_a_frame_must_declare_its_size_and_have_a_checksum(data: bytes) -> None:
    blob = zstandard.ZstdDecompressor().decompress(data)
    without_size = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(blob)
    with pytest.raises(ArtifactError, match="does not declare its content's size"):
        decode_artifact(without_size, "model")
    without_checksum = zstandard.ZstdCompressor(write_checksum=False).compress(blob)
    with pytest.raises(ArtifactError, match="has no checksum"):
        decode_artifact(without_checksum, "model")


def test_a_wrong_checksum_is_found(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"damaged zstd frame.*checksum"):
        decode_artifact(data[:-1] + bytes([data[-1] ^ 1]), "model")


def rle_frame(declared: int, blocks: int, *, window_log: int | None = None) -> bytes:
    """A frame of `blocks` times 128 KiB of zeros, four bytes each, that declares `declared` bytes."""
    single_segment = window_log is None
    descriptor = 0b11_0_0_0_1_00 | single_segment << 5
    frame = b"\x28\xb5\x2f\xfd" + bytes([descriptor])
    if window_log is not None:
        frame += bytes([(window_log - 10) << 3])
    frame += declared.to_bytes(8, "little")
    for index in range(blocks):
        last = index == blocks - 1
        frame += (last | 1 << 1 | 2**17 << 3).to_bytes(3, "little") + b"\0"
    return frame + bytes(4)


def test_an_oversized_declared_size_or_window_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"declares 134,217,729 bytes .* limit of either is 134,217,728"):
        decode_artifact(rle_frame(2**27 + 1, 1), "model")
    with pytest.raises(ArtifactError, match="declares 4,611,686,018,427,387,904 bytes"):
        decode_artifact(rle_frame(2**62, 1), "model")
    with pytest.raises(ArtifactError, match="declares 1,099,511,627,776 bytes of content and a window of 131,072"):
        decode_artifact(rle_frame(2**40, 1, window_log=17), "model")
    with pytest.raises(ArtifactError, match="a window of 1,073,741,824"):
        decode_artifact(rle_frame(2**17, 1, window_log=30), "model")


NOISE = random.Random(0).randbytes(2**19)


@pytest.mark.parametrize(
    ("bomb", "limit_mib", "message"),
    [
        (rle_frame(2**27, 1), 1, "more than a file of 21 bytes may hold: 1,053,952"),
        (rle_frame(2**20, 8), 8, "damaged zstd frame"),
        (rle_frame(2**62, 200), 8, "declares 4,611,686,018,427,387,904 bytes"),
        (rle_frame(1000, 8000), 80, "damaged zstd frame"),
        (rle_frame(2**20, 8000, window_log=17), 80, "holds more than the 1,048,576 bytes it declares"),
        (framed(bytes(2**27)), 1, "declares 134,217,728 bytes of content, more than a file of 4,"),
        (framed(NOISE + bytes(2**27 - len(NOISE))), 450, "not an artifact, or cut short"),
    ],
    ids=[
        *("declares 128 MiB", "declares 1 MiB", "declares 4 EiB", "declares 1 kB, holds 1 GB"),
        *("declares 1 MiB, holds 1 GB", "zeros", "all that a file may hold"),
    ],
)
def test_a_bomb_takes_bounded_memory(bomb: bytes, limit_mib: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(bomb)
    growth, said = peak_growth(
        "from golfmodel.artifact.container import read_artifact", "read_artifact(sys.argv[1])", path
    )
    assert message in said
    assert growth < limit_mib * 2**20
