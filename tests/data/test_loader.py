"""The loader: which tokens each rank gets, exactly, and that its position survives anything."""

import errno
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from golfmodel.data.loader import PREFETCH_MICRO_BATCHES, Loader, make_loader
from golfmodel.data.shards import find_shards, open_shard, write_shard
from golfmodel.data.streams import InOrderStream, ShuffledWindows
from golfmodel.runtime.errors import ConfigError, DataError

ORDERS = ["in_order", "shuffled"]
SEED = 5
_RECORDINGS: list[list[str]] = []  # an audit hook cannot be taken away again, so it records only while asked to


def _record_open(event: str, arguments: tuple) -> None:
    if event == "open":
        for recording in _RECORDINGS:
            recording.append(str(arguments[0]))


sys.addaudithook(_record_open)


def loader_for(directory: Path, order: str, **options) -> Loader:
    settings = {"seq_len": 4, "micro_batch_tokens": 8, "rank": 0, "world_size": 1, "seed": SEED, "vocab_size": 65536}
    settings.update(options)
    settings.setdefault("batch_tokens", settings["world_size"] * settings["micro_batch_tokens"])
    return make_loader(directory=directory, order=order, device="cpu", **settings)


def take(loader: Loader, count: int) -> list[tuple[list, list]]:
    return [(inputs.tolist(), targets.tolist()) for inputs, targets in itertools.islice(loader, count)]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path this process opens during the test, by whatever means."""
    _RECORDINGS.append([])
    yield _RECORDINGS[-1]
    _RECORDINGS.pop()


@pytest.fixture(autouse=True)
def no_thread_left_by_a_closed_loader():
    before = set(prefetch_threads())
    yield
    assert set(prefetch_threads()) <= before


class SeedStream:
    """The seed's token stream and its distributed loader, re-told: a cursor over files, every rank's span taken."""

    def __init__(self, files: list[np.ndarray], rank: int, world_size: int) -> None:
        self.files, self.rank, self.world_size = files, rank, world_size
        self.file = self.position = 0

    def take(self, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            left = len(self.files[self.file]) - self.position
            if left == 0:
                self.file, self.position = (self.file + 1) % len(self.files), 0
                continue
            parts.append(self.files[self.file][self.position : self.position + min(count, left)])
            self.position += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def next_batch(self, tokens: int, seq_len: int) -> tuple[list, list]:
        span = tokens + 1
        own = self.take(span * self.world_size)[self.rank * span :][:span]
        return own[:-1].reshape(-1, seq_len).tolist(), own[1:].reshape(-1, seq_len).tolist()


@pytest.mark.parametrize("lengths", [(100,), (13, 29, 7), (9,), (3, 1, 0, 5), (64, 2)])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_in_order_reads_exactly_as_the_seed(shards_of, lengths, rank, world_size):
    directory = shards_of(*lengths)
    seed = SeedStream([open_shard(path) for path in find_shards(directory, "train")], rank, world_size)
    with loader_for(directory, "in_order", rank=rank, world_size=world_size) as loader:
        assert take(loader, 40) == [seed.next_batch(8, 4) for _ in range(40)]


def test_in_order_by_hand(shards_of):
    directory = shards_of(10, 11)
    with loader_for(directory, "in_order", seq_len=2, micro_batch_tokens=4, rank=1, world_size=2) as loader:
        assert take(loader, 3) == [
            ([[5, 6], [7, 8]], [[6, 7], [8, 9]]),
            ([[15, 16], [17, 18]], [[16, 17], [18, 19]]),
            ([[4, 5], [6, 7]], [[5, 6], [7, 8]]),
        ]


def expected_windows(lengths: tuple[int, ...], seq_len: int, epoch: int) -> list[list[int]]:
    """The rows of an epoch as the definition says: each shard's windows, permuted by [seed, epoch]."""
    windows, first = [], 0
    for length in lengths:
        for start in range(first, first + length - seq_len, seq_len):
            windows.append(list(range(start, start + seq_len + 1)))
        first += length
    order = np.random.default_rng([SEED, epoch]).permutation(len(windows))
    return [windows[i] for i in order]


@pytest.mark.parametrize("lengths", [(41,), (40, 42, 3), (4, 5, 9, 0, 33), (17, 18, 19, 20, 21)])
def test_shuffled_takes_every_window_once_an_epoch_in_the_seeded_order(shards_of, lengths):
    directory = shards_of(*lengths)
    epochs = [expected_windows(lengths, 4, epoch) for epoch in range(4)]
    assert len(epochs[0]) == sum(max(0, (length - 1) // 4) for length in lengths)
    assert epochs[0] != epochs[1]
    expected = list(itertools.chain.from_iterable(epochs))
    with loader_for(directory, "shuffled", micro_batch_tokens=12) as loader:
        batches = take(loader, len(expected) // 3)
    rows = [[*inputs, targets[-1]] for batch in batches for inputs, targets in zip(*batch, strict=True)]
    assert rows == expected[: len(rows)]
    assert all(inputs[1:] == targets[:-1] for batch in batches for inputs, targets in zip(*batch, strict=True))


def test_an_epoch_covers_every_target_but_the_tail(shards_of):
    directory = shards_of(41, 43)
    with loader_for(directory, "shuffled") as loader:
        targets = sorted(token for _, rows in take(loader, 10) for row in rows for token in row)
    assert targets == [*range(1, 41), *range(42, 82)]


@pytest.mark.parametrize(("world_size", "micro_batch_tokens"), [(1, 8), (2, 8), (2, 4), (4, 4), (1, 16)])
def test_shuffled_gives_the_same_stream_for_any_number_of_ranks(shards_of, world_size, micro_batch_tokens):
    directory = shards_of(50, 31)
    loaders = [
        loader_for(
            directory,
            "shuffled",
            rank=rank,
            world_size=world_size,
            micro_batch_tokens=micro_batch_tokens,
            batch_tokens=16,
        )
        for rank in range(world_size)
    ]
    assert {loader.micro_batches_per_step for loader in loaders} == {16 // (world_size * micro_batch_tokens)}
    rows = []
    for _step in range(12):
        for _micro_batch in range(loaders[0].micro_batches_per_step):
            for loader in loaders:
                inputs, _ = next(loader)
                rows += [row[0] for row in inputs.tolist()]
    for loader in loaders:
        loader.close()
    epochs = (expected_windows((50, 31), 4, epoch) for epoch in range(3))
    assert rows == [row[0] for row in itertools.chain.from_iterable(epochs)][:48]


def test_seeds_give_different_orders(shards_of):
    directory = shards_of(400)
    with loader_for(directory, "shuffled") as first, loader_for(directory, "shuffled", seed=6) as second:
        assert take(first, 5) != take(second, 5)


def test_batches_are_int64_rows_on_the_device(shards_of):
    with loader_for(shards_of(100), "shuffled", micro_batch_tokens=12) as loader:
        for tensor in next(loader):
            assert (tensor.shape, tensor.dtype, tensor.device.type) == ((3, 4), torch.int64, "cpu")
            assert tensor.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_batches_on_a_gpu_equal_those_on_a_cpu(shards_of, order):
    options = {"batch_tokens": 8, "micro_batch_tokens": 8, "seq_len": 4, "rank": 0, "world_size": 1, "seed": SEED}
    directory = shards_of(100, 33)
    with make_loader(directory=directory, order=order, vocab_size=65536, device="cuda", **options) as loader:
        on_gpu = list(itertools.islice(loader, 40))
    assert all(tensor.device.type == "cuda" for batch in on_gpu for tensor in batch)
    with loader_for(directory, order) as loader:
        assert [(inputs.tolist(), targets.tolist()) for inputs, targets in on_gpu] == take(loader, 40)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("taken", [0, 1, 7, 12, 25])
def test_position_is_restored_exactly(shards_of, order, taken):
    """In the middle of an epoch, at and across its end; into the same loader and, through JSON, into a new one."""
    directory = shards_of(60, 39)
    with loader_for(directory, order) as loader:
        take(loader, taken)
        state = json.loads(json.dumps(loader.state_dict()))
        following = take(loader, 30)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert take(loader, 30) == following
    with loader_for(directory, order) as fresh:
        take(fresh, 3)
        fresh.load_state_dict(state)
        assert take(fresh, 30) == following


@pytest.mark.parametrize("order", ORDERS)
def test_position_is_of_what_was_taken_not_of_what_was_read_ahead(shards_of, order):
    directory = shards_of(500)
    with loader_for(directory, order) as loader:
        start = loader.state_dict()
        assert start["position"] == 0
        first = take(loader, 1)
        after_one = loader.state_dict()["position"]
        deadline = time.monotonic() + 5
        while loader._reader._queue.qsize() < PREFETCH_MICRO_BATCHES and time.monotonic() < deadline:
            time.sleep(0.001)
        assert loader._reader._queue.qsize() == PREFETCH_MICRO_BATCHES
        assert loader.state_dict()["position"] == after_one == {"in_order": 9, "shuffled": 2}[order]
        loader.load_state_dict(start)
        assert take(loader, 1) == first


def test_a_position_goes_over_to_another_number_of_ranks(shards_of):
    directory = shards_of(300)
    with loader_for(directory, "shuffled", world_size=1, micro_batch_tokens=16) as single:
        take(single, 3)
        state = single.state_dict()
        rows = [inputs for batch in take(single, 2) for inputs in batch[0]]
    halves = []
    for rank in range(2):
        with loader_for(directory, "shuffled", rank=rank, world_size=2, micro_batch_tokens=8) as half:
            half.load_state_dict(state)
            halves.append(take(half, 2))
    assert rows == [row for step in range(2) for half in halves for row in half[step][0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "in_order"}, "its order is 'in_order', this run's is 'shuffled'"),
        ({"seed": 6}, "its seed is 6, this run's is 5"),
        ({"seq_len": 8}, "its seq_len is 8, this run's is 4"),
        ({"shards": ["count_train_000000.bin:40"]}, "it has 1 shards, this run has 2"),
        (
            {"shards": ["count_train_000000.bin:40", "count_train_000001.bin:41"]},
            "number 1 of its shards is 'count_train_000001.bin:41', this run's is 'count_train_000001.bin:50'",
        ),
        ({"shards": None}, "its shards is None"),
        ({"position": -1}, "position is -1; it must be an integer from 0 to"),
        ({"position": 2**61}, "it must be an integer from 0 to"),
        ({"position": 2.0}, "position is 2.0"),
        ({"position": True}, "position is True"),
        ({"position": None}, "position is None"),
    ],
)
def test_a_foreign_position_is_refused_and_changes_nothing(shards_of, change, message):
    with loader_for(shards_of(40, 50), "shuffled") as loader:
        take(loader, 2)
        state = loader.state_dict()
        with pytest.raises(DataError, match=message):
            loader.load_state_dict({**state, **change})
        assert loader.state_dict() == state


def test_in_order_does_not_depend_on_the_seed(shards_of):
    directory = shards_of(100)
    with loader_for(directory, "in_order", seed=1) as one, loader_for(directory, "in_order", seed=2) as other:
        take(one, 2)
        other.load_state_dict(one.state_dict())
        assert take(other, 2) == take(one, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_a_bad_token_id_surfaces_with_its_shard_and_place(tmp_path, order):
    write_shard(tmp_path / "a_train_000000.bin", np.arange(41))
    bad = np.arange(41)
    bad[30] = 1024
    write_shard(tmp_path / "a_train_000001.bin", bad)
    with loader_for(tmp_path, order, vocab_size=1024) as loader:
        start = loader.state_dict()
        message = r"a_train_000001\.bin has token id 1024 at position 30; a vocabulary of 1024"
        good = 0
        with pytest.raises(DataError, match=message):
            for _ in itertools.islice(loader, 100):
                good += 1
        assert 0 < good < 20
        position = loader.state_dict()["position"]
        with pytest.raises(DataError, match=message):
            next(loader)
        assert loader.state_dict()["position"] == position
        loader.load_state_dict(start)
        assert len(take(loader, good)) == good


class FailingStream:
    """Two batches, then an error of any kind; counts its reads."""

    advance = 1

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.reads = error, 0

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        if self.error is not None and position == 2:
            raise self.error
        return np.full((1, 2), position, dtype=np.uint16), np.full((1, 2), position + 1, dtype=np.uint16)

    def identity(self) -> dict:
        return {}


@pytest.mark.parametrize("error", [RuntimeError("gone"), MemoryError(), KeyError("x")])
def test_any_error_of_the_thread_surfaces_as_itself(error):
    with Loader(FailingStream(error), "cpu") as loader:
        assert take(loader, 2) == [([[0, 0]], [[1, 1]]), ([[1, 1]], [[2, 2]])]
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                next(loader)
            assert caught.value is error


def test_a_disk_that_fails_is_an_error_of_the_data():
    with Loader(FailingStream(OSError(errno.EIO, "Input/output error")), "cpu") as loader:
        take(loader, 2)
        with pytest.raises(DataError, match="cannot read the training shards: Input/output error"):
            next(loader)


def test_reading_ahead_is_bounded():
    stream = FailingStream(None)
    with Loader(stream, "cpu", prefetch=3) as loader:
        take(loader, 2)
        time.sleep(0.05)
        assert stream.reads <= 2 + 3 + 1


def test_close_stops_the_thread(shards_of):
    loader = loader_for(shards_of(100), "in_order")
    before = len(prefetch_threads())
    take(loader, 2)
    assert len(prefetch_threads()) == before + 1
    state = loader.state_dict()
    loader.close()
    loader.close()
    assert len(prefetch_threads()) == before
    assert loader.state_dict() == state
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


@pytest.mark.parametrize("order", ORDERS)
def test_no_validation_shard_is_opened(shards_of, opened, order):
    shards_of(60, split="val")
    directory = shards_of(60, 60)
    opened.clear()
    with loader_for(directory, order) as loader:
        take(loader, 40)
        loader.load_state_dict(loader.state_dict())
        take(loader, 10)
    assert any("_train_" in path for path in opened)
    assert not any("_val_" in path for path in opened)


@pytest.mark.parametrize("stream", [InOrderStream, ShuffledWindows])
def test_a_stream_refuses_validation_text_unopened(shards_of, opened, stream):
    directory = shards_of(60, split="val", name="my_train_and")
    options = {"seq_len": 4, "micro_batch_tokens": 8, "rank": 0, "world_size": 1, "vocab_size": 65536}
    if stream is ShuffledWindows:
        options["seed"] = 0
    opened.clear()
    with pytest.raises(DataError, match="is named as validation text"):
        stream([directory / "my_train_and_val_000000.bin"], **options)
    with pytest.raises(DataError, match="is named as validation text"):
        loader_for(directory, "in_order")  # its name matches both splits
    with pytest.raises(DataError, match="the list of shards is empty"):
        stream([], **options)
    assert not any(path.endswith(".bin") for path in opened)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 24, "world_size": 2}, "TRAIN_BATCH_TOKENS is 24; with 2 ranks of 8 .* a multiple of 16"),
        ({"micro_batch_tokens": 10}, "MICRO_BATCH_TOKENS is 10; it must be a multiple of TRAIN_SEQ_LEN 4"),
        ({"seq_len": 0}, "TRAIN_SEQ_LEN is 0; it must be >= 1"),
        ({"micro_batch_tokens": -8, "batch_tokens": 8}, "MICRO_BATCH_TOKENS is -8"),
        ({"batch_tokens": 0}, "TRAIN_BATCH_TOKENS is 0"),
        ({"world_size": 0, "batch_tokens": 8}, "WORLD_SIZE is 0"),
        ({"rank": 2, "world_size": 2}, "RANK is 2; with WORLD_SIZE 2 it may be 0 to 1"),
        ({"seed": -1}, "SEED is -1; it must be >= 0"),
    ],
)
def test_sizes_that_do_not_fit(shards_of, options, message):
    with pytest.raises(ConfigError, match=message):
        loader_for(shards_of(100), "shuffled", **options)


def test_an_unknown_order(shards_of):
    with pytest.raises(ConfigError, match="'random'; it may be 'in_order' or 'shuffled'"):
        loader_for(shards_of(100), "random")


def test_too_little_text(shards_of):
    directory = shards_of(4, 4)
    with pytest.raises(DataError, match=r"hold 8 tokens; one micro-batch reads 9 \(MICRO_BATCH_TOKENS \+ 1\)"):
        loader_for(directory, "in_order")
    with pytest.raises(DataError, match=r"window of 4 targets \(TRAIN_SEQ_LEN\); it takes 5 tokens in one shard"):
        loader_for(directory, "shuffled")
    with pytest.raises(DataError, match="does not exist"):
        loader_for(directory / "gone", "shuffled")


@pytest.mark.parametrize("order", ORDERS)
def test_a_truncated_shard_stops_before_the_first_batch(shards_of, order):
    directory = shards_of(60, 60)
    path = directory / "count_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"count_train_000001\.bin is truncated"):
        loader_for(directory, order)
