"""The download against a hub that is a directory: what is fetched, checked, kept, and said when it fails."""

import errno
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from mutations import mutants

from golfmodel.data.__main__ import main
from golfmodel.data.demo import DEMO_TOKENIZER
from golfmodel.data.download import download_fineweb, hub_fetcher
from golfmodel.data.shards import open_shard, write_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.errors import ConfigError, DataError, StorageError

MANIFEST = "datasets/manifest.json"
MODEL = "datasets/tokenizers/fineweb_1024_bpe.model"
LOCAL_MODEL = "tokenizers/fineweb_1024_bpe.model"


def manifest_of(files: object) -> str:
    return json.dumps({"datasets": [{"name": "fineweb10B_sp1024", "stats": {"files_train": 3, "files_val": files}}]})


def shard(split: str, number: int) -> str:
    return f"datasets/fineweb10B_sp1024/fineweb_{split}_{number:06d}.bin"


class FakeHub:
    """Files by their path in the repository; `broken` are cut short the given number of times."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.again: list[str] = []
        self.broken: dict[str, int] = {}

    def __call__(self, path: str, directory: Path, again: bool) -> Path:
        self.fetched.append(path)
        if again:
            self.again.append(path)
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        content = (self.root / path).read_bytes()
        if self.broken.get(path, 0) > 0:
            self.broken[path] -= 1
            content = content[:-2]
        target.write_bytes(content)
        return target


@pytest.fixture
def hub(tmp_path, demo_corpus) -> FakeHub:
    """Three training shards, one validation shard, and a tokenizer of 1024 pieces."""
    root = tmp_path / "hub"
    stats = {"files_train": 3, "files_val": 1}
    manifest = {
        "datasets": [
            {"name": "other", "tokenizer_name": "x", "stats": {"files_train": 99, "files_val": 9}},
            {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024", "stats": stats},
        ]
    }
    (root / "datasets/tokenizers").mkdir(parents=True)
    (root / MANIFEST).write_text(json.dumps(manifest))
    shutil.copy(demo_corpus / DEMO_TOKENIZER, root / MODEL)
    rng = np.random.default_rng(0)
    for split, number in (("val", 0), ("train", 0), ("train", 1), ("train", 2)):
        write_shard(root / "datasets" / shard(split, number), rng.integers(0, 1024, 50))
    return FakeHub(root)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "data"


def files_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_everything_lands_where_the_defaults_look(hub, out):
    download_fineweb(out, train_shards=2, fetch=hub)
    assert files_in(out) == [shard("train", 0), shard("train", 1), shard("val", 0), LOCAL_MODEL]
    for name in files_in(out):
        assert (out / name).read_bytes() == (hub.root / "datasets" / name).read_bytes()
    assert not (out / ".download").exists()


def test_a_second_run_fetches_only_what_is_missing(hub, out, capsys):
    download_fineweb(out, train_shards=1, fetch=hub)
    hub.fetched.clear()
    download_fineweb(out, train_shards=3, fetch=hub)
    assert hub.fetched == [MANIFEST, "datasets/" + shard("train", 1), "datasets/" + shard("train", 2)]
    assert "fetched again" not in capsys.readouterr().out
    hub.fetched.clear()
    download_fineweb(out, train_shards=0, fetch=hub)
    assert hub.fetched == [MANIFEST]


@pytest.mark.parametrize("name", [shard("train", 1), shard("val", 0), LOCAL_MODEL])
def test_a_damaged_file_is_named_and_fetched_again(hub, out, capsys, name):
    download_fineweb(out, train_shards=3, fetch=hub)
    good = (out / name).read_bytes()
    (out / name).write_bytes(good[:-2])
    hub.fetched.clear()
    download_fineweb(out, train_shards=3, fetch=hub)
    assert hub.fetched == [MANIFEST, f"datasets/{name}"]
    assert (out / name).read_bytes() == good
    line = capsys.readouterr().out
    assert "fetched again: " in line
    assert name in line


def test_a_file_that_arrives_damaged_is_tried_once_more(hub, out):
    name = "datasets/" + shard("train", 0)
    hub.broken[name] = 1
    download_fineweb(out, train_shards=1, fetch=hub)
    assert hub.again == [name]
    assert len(open_shard(out / shard("train", 0))) == 50


def test_a_file_that_arrives_damaged_twice_takes_no_place(hub, out):
    name = "datasets/" + shard("train", 1)
    hub.broken[name] = 2
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin of .* arrived damaged twice: .* is truncated"):
        download_fineweb(out, train_shards=2, fetch=hub)
    assert (out / shard("train", 0)).exists()
    assert not (out / shard("train", 1)).exists()


def test_ids_outside_the_vocabulary_are_refused(hub, out):
    write_shard(hub.root / "datasets" / shard("val", 0), np.array([1, 1024]))
    with pytest.raises(DataError, match=r"fineweb_val_000000\.bin has token id 1024 at position 1"):
        download_fineweb(out, train_shards=0, fetch=hub)


def test_more_shards_than_there_are(hub, out):
    with pytest.raises(ConfigError, match=r"--train-shards is 4, but fineweb10B_sp1024 in .* has 3 training shards"):
        download_fineweb(out, train_shards=4, fetch=hub)
    with pytest.raises(ConfigError, match="--train-shards is -1; it must be >= 0"):
        download_fineweb(out, train_shards=-1, fetch=hub)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "cannot be read: JSONDecodeError"),
        ("[]", "cannot be read: TypeError"),
        ('{"datasets": []}', "lists no data set named fineweb10B_sp1024"),
        ('{"datasets": [{"name": "fineweb10B_sp1024"}]}', "cannot be read: KeyError: 'stats'"),
        ("[" * 100_000, "cannot be read: RecursionError"),
        (" " * (2**20 + 1), "a manifest has at most 1,048,576"),
        (manifest_of(10**12), "lists 1000000000000 files of fineweb10B_sp1024; it may be 0 to 10000"),
        (manifest_of(-1), "lists -1 files"),
        (manifest_of(float("inf")), "lists inf files"),
        (manifest_of(float("nan")), "lists nan files"),
        (manifest_of(True), "lists True files"),
        (manifest_of("x" * 10**5), r"lists 'x+\.\.\.x+' files"),
    ],
)
def test_a_manifest_that_cannot_be_used(hub, out, manifest, message):
    (hub.root / MANIFEST).write_text(manifest)
    with pytest.raises(DataError, match=message):
        download_fineweb(out, fetch=hub)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_closed_disk_is_no_matter_of_the_network(out, number):
    def fetch(path: str, directory: Path, again: bool) -> Path:
        raise OSError(number, "no more")

    with pytest.raises(StorageError, match=r"cannot write .*data: no more"):
        download_fineweb(out, fetch=fetch)


def test_a_directory_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        download_fineweb(tmp_path / "file", fetch=hub)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizers").touch()
    with pytest.raises(StorageError, match="cannot write"):
        download_fineweb(tmp_path / "data", train_shards=1, fetch=hub)


def test_the_command_asks_the_hub_for_the_right_files(hub, out, monkeypatch, capsys):
    calls = []

    def hf_hub_download(repo_id, filename, *, repo_type, local_dir, force_download):
        calls.append((repo_id, filename, repo_type, force_download))
        return str(hub(filename, Path(local_dir), force_download))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert main(["download", "--train-shards", "1", "--out", str(out), "--repo", "me/mine"]) == 0
    assert calls == [
        ("me/mine", path, "dataset", False)
        for path in (MANIFEST, MODEL, "datasets/" + shard("val", 0), "datasets/" + shard("train", 0))
    ]
    assert Tokenizer(out / LOCAL_MODEL).vocab_size == 1024
    assert str(out / "datasets" / "fineweb10B_sp1024") in capsys.readouterr().out


def test_offline_the_command_says_what_to_do(out, monkeypatch, capsys):
    def hf_hub_download(*_args, **_options):
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert main(["download", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for part in (
        "cannot fetch datasets/manifest.json of willdepueoai/parameter-golf (ConnectionError: no route)",
        str(out / "datasets" / "fineweb10B_sp1024"),
        str(out / LOCAL_MODEL),
        "python -m golfmodel.data demo",
    ):
        assert part in error


def test_an_interrupted_run_goes_on_where_it_stopped(hub, out):
    class Cut(FakeHub):
        def __call__(self, path: str, directory: Path, again: bool) -> Path:
            if path.endswith("train_000001.bin"):
                raise ConnectionError
            return super().__call__(path, directory, again)

    with pytest.raises(DataError, match=r"ConnectionError: no reason given\)\. Run the command again"):
        download_fineweb(out, train_shards=3, fetch=Cut(hub.root))
    download_fineweb(out, train_shards=3, fetch=hub)
    assert hub.fetched == [MANIFEST, "datasets/" + shard("train", 1), "datasets/" + shard("train", 2)]


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"huggingface_hub, which is not installed; .*pip install '\.\[data\]'"):
        hub_fetcher("x/y")


def test_no_mutation_of_the_manifest_asks_for_other_files(hub, out):
    """Names in it become no paths: what is asked for is the manifest, and the tokenizer once that one is read."""
    manifest = (hub.root / MANIFEST).read_bytes()
    accepted = 0
    for mutant in mutants("download manifest", manifest, manifest.replace(b"sp_bpe_1024", b"../../../escaped")):
        asked = []

        def fetch(path: str, directory: Path, again: bool) -> Path:
            asked.append(path)  # noqa: B023
            if path != MANIFEST:
                raise ConnectionError
            place = directory / "manifest.json"
            place.write_bytes(mutant)  # noqa: B023
            return place

        with pytest.raises(DataError) as caught:
            download_fineweb(out, train_shards=0, fetch=fetch)
        assert "\n" not in str(caught.value)
        assert asked in ([MANIFEST], [MANIFEST, MODEL])
        accepted += len(asked) - 1
    assert accepted > 10
    assert files_in(out) == [".download/manifest.json"]
