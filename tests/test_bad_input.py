"""What a user gets for a bad option or a bad file: one line, exit status 2, before anything is made."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch.distributed as dist

import train
from golfmodel.artifact.prefix_codec import encode_prefix
from golfmodel.data.shards import find_shards, open_shard, write_shard


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    """Bad input is found before ranks meet."""

    def refuse(*_args, **_options):
        raise AssertionError("a process group was made")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


@pytest.fixture
def corpus(tiny_corpus, tmp_path):
    """A copy of the tiny corpus that a test may damage."""
    return shutil.copytree(tiny_corpus, tmp_path / "corpus")


@pytest.fixture
def complaint(tiny_options, capsys):
    """Runs the front door with some options changed, which must fail, and returns what it says."""

    def run(**changes: object) -> str:
        options = {**tiny_options, **changes}
        status = train.main([f"--{name.replace('_', '-')}={value}" for name, value in options.items()])
        printed = capsys.readouterr()
        assert status == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert "Traceback" not in printed.err
        return printed.err

    return run


def test_missing_data_says_how_to_get_some(complaint, tmp_path):
    said = complaint(data_path=tmp_path / "nowhere")
    assert "nowhere" in said
    assert "golfmodel.data download" in said
    assert "golfmodel.data demo" in said


def test_empty_data_directory(complaint, tmp_path):
    (tmp_path / "empty").mkdir()
    said = complaint(data_path=tmp_path / "empty")
    assert "empty" in said
    assert "golfmodel.data download" in said


@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_shard(complaint, corpus, split):
    shard = find_shards(corpus, split)[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in complaint(data_path=corpus)


@pytest.mark.parametrize(("place", "what"), [(0, "magic"), (4, "version")])
def test_wrong_header(complaint, corpus, place, what):
    shard = find_shards(corpus, "val")[0]
    data = bytearray(shard.read_bytes())
    data[place] ^= 0xFF
    shard.write_bytes(data)
    said = complaint(data_path=corpus)
    assert shard.name in said
    assert what in said


def test_token_ids_outside_the_vocabulary(complaint, corpus):
    tokens = np.array(open_shard(find_shards(corpus, "val")[0]))
    tokens[17] = 1024
    write_shard(find_shards(corpus, "val")[0], tokens)
    said = complaint(data_path=corpus)
    assert "1024" in said
    assert "17" in said


def test_a_tokenizer_of_another_size(complaint):
    said = complaint(vocab_size=2048)
    assert "1024" in said
    assert "2048" in said


def test_no_tokenizer(complaint, tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    assert "x.model" in complaint(tokenizer_path=tmp_path / "x.model")


def test_validation_text_shorter_than_a_window(complaint):
    said = complaint(eval_seq_len=4096)
    assert "3000" in said
    assert "4096" in said


def test_a_batch_that_the_ranks_do_not_divide(complaint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = complaint()
    assert "3 ranks" in said
    assert "1, 2, 4, 8" in said


def test_a_prefix_of_another_text(complaint, tiny_corpus, tmp_path):
    tokens = np.array(open_shard(find_shards(tiny_corpus, "val")[0]))[1:200]
    tokens[42] ^= 1
    (tmp_path / "prefix.xz").write_bytes(encode_prefix(tokens, "lzma"))
    assert "42" in complaint(paid_prefix_file=tmp_path / "prefix.xz")


def test_an_unwritable_run_directory(complaint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "RUNS_DIR" in complaint(runs_dir=tmp_path / "file")


def test_a_run_that_exists(complaint, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "log.jsonl").write_text("{}\n")
    assert "RUN_ID" in complaint()


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("num_layers", "0", "at least 1"),
        ("num_layers", "eight", "a whole number"),
        ("beta1", "nan", "finite"),
        ("tie_embeddings", "maybe", "0 or 1"),
        ("data_order", "sorted", "shuffled, in_order"),
    ],
)
def test_impossible_values(complaint, option, value, valid):
    said = complaint(**{option: value})
    assert option.upper() in said
    assert value in said
    assert valid in said


def test_a_prefix_without_a_sliding_window(complaint, tmp_path):
    assert "EVAL_STRIDE" in complaint(paid_prefix_file=tmp_path / "prefix.xz", eval_stride=0)


def test_a_world_without_torchrun(complaint, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR")
    assert "MASTER_ADDR is not set: start with torchrun" in complaint()


@pytest.mark.parametrize(("choice", "valid"), [("fast", "auto, reference, triton"), ("triton", "needs a GPU")])
def test_kernels_that_cannot_be(complaint, monkeypatch, choice, valid):
    monkeypatch.setenv("GOLF_KERNELS", choice)
    said = complaint()
    assert "GOLF_KERNELS" in said
    assert valid in said


def test_unknown_flags(complaint):
    assert "--num-layers" in complaint(num_layer=3)
