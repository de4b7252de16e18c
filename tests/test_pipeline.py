from __future__ import annotations

import ast
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from golfmodel import pipeline
from golfmodel.artifact.prefix_codec import encode_prefix
from golfmodel.artifact.submission import PROJECT_ROOT, scoring_files
from golfmodel.config import Config
from golfmodel.data.shards import find_shards, open_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.model.gpt import GPT
from golfmodel.runtime.errors import StorageError, TrainingError
from golfmodel.runtime.runlog import read_events

PROMISED = {
    "val_bpb",
    "val_bpb_training",
    "val_bpb_averaged",
    "val_bpb_int6",
    "val_bpb_with_prefix",
    "artifact_bytes",
    "code_bytes",
    "prefix_bytes",
    "total_bytes",
    "limit_bytes",
    "eligible",
    "not_eligible_because",
    "train_seconds",
    "steps",
    "tokens_per_second",
    "parameters",
    "world_size",
}


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def directory_of(config: Config):
    return Path(config.runs_dir) / config.run_id


def flags(options: dict[str, object]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def finished(tiny_options_of, tmp_path_factory):
    """One finished run: its config and its summary."""
    config = Config(**tiny_options_of(tmp_path_factory.mktemp("finished")))
    return config, pipeline.run(config, {})


def test_everything_promised_is_in_the_run_directory(finished):
    config, summary = finished
    directory = directory_of(config)
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert summary.keys() >= PROMISED
    assert summary["versions"].keys() >= {"torch", "triton", "cuda", "gpu", "commit"}
    assert summary["versions"]["torch"] == torch.__version__
    assert json.loads((directory / "config.json").read_text()) == config.to_dict()
    kinds = [event["event"] for event in read_events(directory / "log.jsonl")]
    assert kinds.count("train") == 8
    assert kinds.count("validation") == 2
    assert kinds[0] == "start"
    assert kinds[-1] == "scored"
    assert not list(directory.glob(".*")), "no temporary file is left"
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_what_their_names_say(finished):
    _, summary = finished
    assert summary["steps"] == 8
    for name in ("val_bpb", "val_bpb_training", "val_bpb_averaged", "val_bpb_int6"):
        assert 0.5 < summary[name] < 8, name
    assert summary["averaged_copies"] == 2
    assert summary["val_bpb_averaged"] != summary["val_bpb_training"]
    assert summary["val_bpb_int6"] == pytest.approx(summary["val_bpb_averaged"], abs=0.02)
    assert summary["val_bpb_int6"] != summary["val_bpb_averaged"]
    assert summary["val_bpb_with_prefix"] is None
    assert summary["eligible"] is True
    assert summary["not_eligible_because"] == []


def test_bytes_are_the_sizes_of_the_files(finished):
    config, summary = finished
    artifact = (directory_of(config) / pipeline.ARTIFACT_NAME).stat().st_size
    code = sum(path.stat().st_size for path in scoring_files())
    assert summary["artifact_bytes"] == artifact
    assert summary["code_bytes"] == code
    assert summary["total_bytes"] == artifact + code
    assert sum(summary["artifact_bytes_by_part"].values()) == artifact


def test_bytes_scored_are_those_of_the_decoded_text(finished):
    config, summary = finished
    tokenizer = Tokenizer(config.tokenizer_path)
    tokens = open_shard(find_shards(config.data_path, "val")[0])
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    documents = np.split(tokens, starts[1:])
    assert starts[0] == 0
    decoded = sum(len(tokenizer.decode(document[1:].tolist()).encode()) for document in documents)
    assert summary["validation_bytes"] == decoded
    assert summary["validation_targets"] == len(tokens) - 1


def test_a_fresh_process_scores_the_artifact_alike(finished):
    config, summary = finished
    result = run_module(
        "-m",
        "golfmodel.evaluation",
        str(directory_of(config) / pipeline.ARTIFACT_NAME),
        f"--data-path={config.data_path}",
        f"--tokenizer-path={config.tokenizer_path}",
        "--device=cpu",
    )
    assert result.returncode == 0, result.stderr
    again = json.loads(result.stdout)
    for name in ("val_bpb", "val_bpb_int6", "val_bpb_with_prefix", "validation_targets", "validation_bytes"):
        assert again[name] == summary[name], name


def test_a_scoring_run_loads_the_files_that_are_counted_and_no_other(finished):
    config, _ = finished
    program = (
        "import runpy, sys, pathlib\n"
        "try:\n    runpy.run_module('golfmodel.evaluation', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"root = pathlib.Path({str(PROJECT_ROOT)!r})\n"
        "files = [getattr(m, '__file__', None) for m in list(sys.modules.values())]\n"
        "inside = {pathlib.Path(f) for f in files if f and pathlib.Path(f).is_absolute()}\n"
        "print('LOADED', sorted(str(f) for f in inside if root in f.parents and '.venv' not in f.parts))\n"
    )
    result = run_module(
        "-c",
        program,
        str(directory_of(config) / pipeline.ARTIFACT_NAME),
        f"--data-path={config.data_path}",
        f"--tokenizer-path={config.tokenizer_path}",
        "--device=cpu",
        "--eval-stride=0",
    )
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split("LOADED ")[1]
    counted = {str(path) for path in scoring_files()}
    front = str(PROJECT_ROOT / "golfmodel" / "evaluation" / "__main__.py")  # runpy runs it under another name
    assert {*ast.literal_eval(loaded), front} == counted
    assert any(path.endswith("gpt.py") for path in counted)
    assert not any("trainer" in path for path in counted)


def test_two_ranks_train_and_score_as_one_does(tiny_options, tmp_path):
    options = {**tiny_options, "data_order": "shuffled", "document_boundaries": True, "mtp_num_heads": 1}
    one = pipeline.run(Config(**{**options, "run_id": "one"}), {})
    result = run_module(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
        *flags({**options, "run_id": "two", "document_boundaries": 1}),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    directory = Path(tiny_options["runs_dir"])
    two = json.loads((directory / "two" / "summary.json").read_text())
    assert two["world_size"] == 2
    losses = [
        [event["train_loss"] for event in read_events(directory / name / "log.jsonl", "train")]
        for name in ("one", "two")
    ]
    assert len(losses[1]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name in ("val_bpb_training", "val_bpb_averaged", "val_bpb_int6", "val_bpb"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert two["validation_targets"] == one["validation_targets"]


def test_a_paid_prefix_is_reported_apart_and_makes_the_run_not_eligible(finished, tmp_path):
    config, plain = finished
    tokens = np.asarray(open_shard(find_shards(config.data_path, "val")[0]))
    blob = encode_prefix(tokens[1:1501], "lzma")
    (tmp_path / "prefix.xz").write_bytes(blob)
    config = dataclasses.replace(
        config, paid_prefix_file=str(tmp_path / "prefix.xz"), runs_dir=str(tmp_path / "runs"), val_loss_every=0
    )
    summary = pipeline.run(config, {})
    assert summary["val_bpb"] == plain["val_bpb"], "val_bpb knows nothing of the prefix"
    assert summary["val_bpb_with_prefix"] == pytest.approx(plain["val_bpb"] / 2, rel=0.1)
    assert summary["prefix_bytes"] == len(blob)
    assert summary["total_bytes"] == summary["artifact_bytes"] + summary["code_bytes"] + len(blob)
    assert summary["eligible"] is False
    assert "prefix" in " ".join(summary["not_eligible_because"])


def test_every_option_of_the_recipe_goes_through_the_pipeline(tiny_options):
    options = {
        **tiny_options,
        "tie_embeddings": False,
        "qat_enabled": True,
        "mtp_num_heads": 2,
        "document_boundaries": True,
        "bigram_dim": tiny_options["model_dim"],
        "num_layers": 3,
        "embed_storage": "int8",
        "data_order": "in_order",
        "compute_dtype": "bfloat16",
        "eval_stride": 0,
        "swa_enabled": False,
        "iterations": 4,
    }
    summary = pipeline.run(Config(**options), {})
    assert summary["val_bpb"] is None, "no sliding window, no val_bpb"
    assert summary["not_eligible_because"] == ["its val_bpb was not measured (EVAL_STRIDE is 0)"]
    assert math.isfinite(summary["val_bpb_int6"])
    assert summary["val_bpb_averaged"] == summary["val_bpb_training"]


def test_a_full_disk_leaves_the_earlier_artifact_whole(tiny_config, monkeypatch):
    directory = directory_of(tiny_config)
    real = os.fsync

    def full(handle: int) -> None:
        if ".model.golf." in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    directory.mkdir(parents=True)
    (directory / pipeline.ARTIFACT_NAME).write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"model\.golf.*No space left"):
        pipeline.run(tiny_config, {})
    assert (directory / pipeline.ARTIFACT_NAME).read_bytes() == b"earlier"
    assert not (directory / "summary.json").exists()
    assert not [path for path in directory.iterdir() if path.name.endswith(".tmp")]
    assert list(read_events(directory / "log.jsonl", "trained")), "the log is kept"


def test_a_nan_stops_the_run_and_keeps_its_log(tiny_config, monkeypatch):
    forward = GPT.forward
    calls = 0

    def poisoned(self, tokens_BT, targets_BT):
        nonlocal calls
        calls += 1
        loss = forward(self, tokens_BT, targets_BT)
        return loss * float("nan") if calls == 4 else loss  # the first is the warm-up's

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(TrainingError, match="since step 3"):
        pipeline.run(tiny_config, {})
    events = [event["event"] for event in read_events(directory_of(tiny_config) / "log.jsonl")]
    assert events == ["start", "train", "train", "not_finite"]
