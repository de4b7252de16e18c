"""A file of a hundred bytes makes no reader take more than a few megabytes, whatever it says of itself."""

from __future__ import annotations

import lzma
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from mutations import mutate
from peak_memory import peak_growth

from golfmodel.data.tokenizer import Tokenizer

SMALL_BYTES, LIMIT_BYTES = 100, 16 * 2**20
SIZES = [2**width - 1 for width in (20, 27, 31, 32, 62, 64)]

# Reads one file; the program runs it for every file of a directory.
READ = """
def read_all(directory):
    for path in Path(directory).iterdir():
        try:
            {read}
        except GolfError:
            pass
"""
PREFIX = "import numpy\nfrom golfmodel.artifact.prefix import load_prefix\ntargets = numpy.zeros(10**6, numpy.uint16)"
TOKENIZER = "from golfmodel.data.tokenizer import Tokenizer\ntext = 'the cat ' * 1000"


def rle_frame(declared: int, blocks: int) -> bytes:
    """A zstd frame of zeros, 128 KiB in every four bytes."""
    block = (1 << 1 | 2**17 << 3).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\xe4" + declared.to_bytes(8, "little") + block * blocks


def lzma_alone(dictionary: int) -> bytes:
    """A .lzma header that wants a dictionary of so many bytes for 2^40 bytes of content."""
    return b"\x5d" + struct.pack("<IQ", dictionary, 2**40) + bytes(80)


def manifest(count: int) -> bytes:
    return b'{"datasets":[{"name":"fineweb10B_sp1024","stats":{"files_train":3,"files_val":%d}}]}' % count


# Two pieces, <unk> and t, behind which a field says how long it is.
PIECES = b"\x0a\x09\x0a\x05<unk>\x18\x02\x0a\x03\x0a\x01t"
LENGTH = b"\xff\xff\xff\xff\x07"  # 2^31 - 1

CASES = {
    "artifact": (
        "from golfmodel.artifact.container import read_artifact",
        "read_artifact(path)",
        [rle_frame(size, blocks) for size in SIZES for blocks in (1, 20)],
    ),
    "prefix by lzma": (
        PREFIX,
        "load_prefix(path, 'lzma', targets)",
        [*(lzma_alone(2**width) for width in range(20, 32)), lzma.compress(bytes(2**18), preset=9)],
    ),
    "prefix by zlib": (PREFIX, "load_prefix(path, 'zlib', targets)", [zlib.compress(bytes(2**16), 9)]),
    "shard": (
        "from golfmodel.data.shards import open_shard",
        "open_shard(path)",
        [struct.pack("<IIQ", 20240520, 1, size) for size in SIZES],
    ),
    "tokenizer": (
        TOKENIZER,
        "tokenizer = Tokenizer(path); tokenizer.decode(tokenizer.encode(text))",
        [PIECES, *(PIECES + bytes([number << 3 | 2]) + LENGTH for number in (1, 2, 3, 4, 5))]
        + [PIECES + b"\x1a\x06\x12\x04" + struct.pack("<I", size % 2**32) for size in SIZES],
    ),
    "manifest": (
        "from golfmodel.data.download import download_fineweb",
        "download_fineweb(Path(directory, 'out'), train_shards=0, fetch=lambda *_: path)",
        [manifest(10**width) for width in range(4, 13)],
    ),
}


def test_the_tokenizer_of_two_pieces_is_one(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(PIECES)
    assert Tokenizer(tmp_path / "x.model").vocab_size == 2


@pytest.mark.parametrize("reader", CASES)
def test_a_hundred_bytes_take_a_few_megabytes(reader: str, tmp_path: Path) -> None:
    imports, read, greedy = CASES[reader]
    generator = np.random.default_rng(len(reader))
    damaged = [mutate(data, generator) for data in greedy for _ in range(30)]
    for number, data in enumerate(greedy + damaged):
        (tmp_path / f"{number}.bin").write_bytes(data[:SMALL_BYTES])
    growth, said = peak_growth(imports + READ.format(read=read), "read_all(sys.argv[1])", tmp_path)
    assert said == "no error"
    assert growth < LIMIT_BYTES
