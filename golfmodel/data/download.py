"""FineWeb with the challenge's 1024-piece tokenizer, from its public hub."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import reprlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golfmodel.data.shards import check_token_ids, open_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.bounded import read_bounded
from golfmodel.runtime.errors import ConfigError, DataError, StorageError
from golfmodel.runtime.progress import Progress

REPOSITORY = "willdepueoai/parameter-golf"
DATASET = "fineweb10B_sp1024"
TOKENIZER = "fineweb_1024_bpe.model"
VOCAB_SIZE = 1024
DEFAULT_TRAIN_SHARDS = 80
DEFAULT_DIRECTORY = Path("data")

_REMOTE_ROOT = "datasets"  # the folder of the repository that is laid out as the local directory is
_MANIFEST = "manifest.json"
_STAGING = ".download"
_MAX_MANIFEST_BYTES = 2**20
_MAX_SHARDS = 10_000  # of 200 MB each, 2 TB
_STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})

# Takes a path in the repository, a local directory and whether to ignore what is there; returns the local file, which
# lies under the directory by its path in the repository.
Fetch = Callable[[str, Path, bool], Path]


def download_fineweb(
    directory: str | Path = DEFAULT_DIRECTORY,
    *,
    train_shards: int = DEFAULT_TRAIN_SHARDS,
    repository: str = REPOSITORY,
    fetch: Fetch | None = None,
) -> None:
    """Brings the tokenizer, all validation shards and the first `train_shards` training shards into `directory`.

    Files land in `datasets/fineweb10B_sp1024/` and `tokenizers/` under it. What is there and valid is kept, what is
    there but damaged is named and fetched again, and every file is checked before it takes its place.

    Args:
        fetch: how to get one file; None for the hub.

    Raises:
        ConfigError: `train_shards` is negative or more than there are.
        DataError: the hub cannot be reached or lacks a file, or a file arrives damaged; says how to go on.
        StorageError: the directory cannot be written.
    """
    if train_shards < 0:
        raise ConfigError(f"--train-shards is {train_shards}; it must be >= 0")
    directory = Path(directory)
    staging = directory / _STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error.strerror or error}") from error
    hub = _Hub(fetch or hub_fetcher(repository), repository, directory)
    available_train, available_val = _shard_counts(hub.fetch(f"{_REMOTE_ROOT}/{_MANIFEST}"))
    if train_shards > available_train:
        raise ConfigError(
            f"--train-shards is {train_shards}, but {DATASET} in {repository} has {available_train} training shards"
        )
    paths = [f"tokenizers/{TOKENIZER}"]
    for split, count in (("val", available_val), ("train", train_shards)):
        paths += [f"datasets/{DATASET}/fineweb_{split}_{number:06d}.bin" for number in range(count)]
    with Progress("download", len(paths), unit="file") as progress:
        for path in paths:
            problem = hub.bring(path)
            if problem is not None:
                progress.write(f"fetched again: {problem}")
            progress.update()
    shutil.rmtree(staging, ignore_errors=True)


def hub_fetcher(repository: str) -> Fetch:
    """Fetches from the public hub, going on with files that were partly fetched.

    Raises:
        DataError: `huggingface_hub` is not installed.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DataError(
            "downloading needs the package huggingface_hub, which is not installed; install the `data` extra: "
            "`pip install '.[data]'` in the project's directory"
        ) from error
    hub.utils.disable_progress_bars()  # ours counts files; the hub's would tear it

    def fetch(path: str, directory: Path, again: bool) -> Path:
        fetched = hub.hf_hub_download(repository, path, repo_type="dataset", local_dir=directory, force_download=again)
        return Path(fetched)

    return fetch


def check_file(path: Path) -> None:
    """Checks a tokenizer or shard of the data set.

    Raises:
        DataError: it is missing, damaged, or does not have the vocabulary of 1024.
    """
    if path.suffix == ".model":
        Tokenizer(path, VOCAB_SIZE)
    else:
        check_token_ids(open_shard(path), VOCAB_SIZE, f"shard {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m golfmodel.data download`."""
    parser.add_argument(
        "--train-shards",
        type=int,
        default=DEFAULT_TRAIN_SHARDS,
        metavar="N",
        help="training shards to fetch, of 100 million tokens (200 MB) each (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help="directory to put datasets/ and tokenizers/ in (default: %(default)s)",
    )
    parser.add_argument(
        "--repo", default=REPOSITORY, metavar="OWNER/NAME", help="data set on the hub (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Downloads and says where everything is."""
    download_fineweb(arguments.out, train_shards=arguments.train_shards, repository=arguments.repo)
    print(f"shards in {arguments.out / 'datasets' / DATASET}, tokenizer {arguments.out / 'tokenizers' / TOKENIZER}")
    return 0


class _Hub:
    """Fetches files of one repository into a staging directory, checks them, and moves them into place."""

    def __init__(self, fetch: Fetch, repository: str, directory: Path) -> None:
        self._fetch, self._repository, self._directory = fetch, repository, directory

    def fetch(self, path: str, *, again: bool = False) -> Path:
        """The file at `path` of the repository, in the staging directory."""
        try:
            return self._fetch(path, self._directory / _STAGING, again)
        except Exception as error:  # what the client raises for a failed connection differs between its versions
            if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
                raise StorageError(f"cannot write {self._directory}: {error.strerror}") from error
            reason = next(iter(str(error).splitlines()), "") or "no reason given"
            raise DataError(
                f"cannot fetch {path} of {self._repository} ({type(error).__name__}: {reason}). Run the command again "
                "when there is a connection: it goes on where it stopped. Or copy the files from a machine that has "
                f"them: shards to {self._directory / 'datasets' / DATASET}, the tokenizer to "
                f"{self._directory / 'tokenizers' / TOKENIZER}. Or use the small corpus that needs no network: "
                "`python -m golfmodel.data demo`"
            ) from error

    def bring(self, path: str) -> str | None:
        """Puts a valid file at `path` of the directory; returns what was wrong with the one there, if one was."""
        place = self._directory / path
        problem: str | None = None
        if place.exists():
            try:
                check_file(place)
                return None
            except DataError as error:
                problem = str(error)
        remote = f"{_REMOTE_ROOT}/{path}"
        staged = self.fetch(remote)
        try:
            check_file(staged)
        except DataError:
            staged = self.fetch(remote, again=True)
            try:
                check_file(staged)
            except DataError as error:
                raise DataError(f"{remote} of {self._repository} arrived damaged twice: {error}") from error
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(place)
        except OSError as error:
            raise StorageError(f"cannot write {place}: {error.strerror or error}") from error
        return problem


def _shard_counts(manifest_path: Path) -> tuple[int, int]:
    """How many training and validation shards a manifest lists for the data set."""
    content = read_bounded(manifest_path, _MAX_MANIFEST_BYTES, "a manifest", DataError)
    try:
        manifest: Any = json.loads(content)
        stats = next(entry["stats"] for entry in manifest["datasets"] if entry["name"] == DATASET)
        counts = stats["files_train"], stats["files_val"]
    except StopIteration:
        raise DataError(f"the manifest {manifest_path} lists no data set named {DATASET}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"the manifest {manifest_path} cannot be read: {type(error).__name__}: {error}") from error
    for count in counts:
        if type(count) is not int or not 0 <= count <= _MAX_SHARDS:
            raise DataError(
                f"the manifest {manifest_path} lists {reprlib.repr(count)} files of {DATASET}; "
                f"it may be 0 to {_MAX_SHARDS}"
            )
    return counts
