"""What every room's tests share: device and kernels, the demo corpus, a corpus of seconds, a run of seconds on it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from golfmodel.config import Config
from golfmodel.data.demo import DEMO_TOKENIZER, build_demo_corpus
from golfmodel.data.shards import find_shards, open_shard, write_shard
from golfmodel.data.tokenizer import Tokenizer

if not torch.cuda.is_available():
    # Triton decides at its import whether kernels are compiled or interpreted. Here they are made to be interpreted;
    # the variable goes again, so that only tests that ask for it run them and all others run as users do.
    assert "triton" not in sys.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "kernels")]):
            importlib.import_module(f"kernels.{module.name}")
        importlib.import_module("interpreting").speed_up()

# A check that decides whether a change lands draws the same examples each time; elsewhere every run draws new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what needs a GPU where there is none, so that it counts as not run and never as passed."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op runs its Triton kernel: on a GPU compiled, on a CPU interpreted."""
    monkeypatch.setenv("GOLF_KERNELS", "triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo corpus, built once a session."""
    directory = tmp_path_factory.mktemp("demo")
    build_demo_corpus(directory, show_progress=False)
    return directory


@pytest.fixture(scope="session")
def demo_tokenizer(demo_corpus: Path) -> Tokenizer:
    return Tokenizer(demo_corpus / DEMO_TOKENIZER, 1024)


@pytest.fixture(scope="session")
def tiny_corpus(demo_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards of 30,000 tokens and a validation shard of 3,001, cut from the demo corpus."""
    directory = tmp_path_factory.mktemp("tiny")
    for number, shard in enumerate(find_shards(demo_corpus, "train")[:2]):
        write_shard(directory / f"tiny_train_{number:06d}.bin", open_shard(shard)[:30_000])
    write_shard(directory / "tiny_val_000000.bin", open_shard(find_shards(demo_corpus, "val")[0])[:3_001])
    return directory


@pytest.fixture(scope="session")
def tiny_options_of(tiny_corpus: Path, demo_corpus: Path) -> Callable[[Path], dict[str, object]]:
    """For a directory, the options of a run in it of a second or two: 8 steps, 2 blocks, float32, by step count."""
    options: dict[str, object] = {
        "num_layers": 2,
        "model_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "bigram_vocab_size": 128,
        "bigram_dim": 16,
        "compute_dtype": "float32",
        "data_path": str(tiny_corpus),
        "tokenizer_path": str(demo_corpus / DEMO_TOKENIZER),
        "train_seq_len": 64,
        "train_batch_tokens": 512,
        "micro_batch_tokens": 512,
        "eval_seq_len": 64,
        "eval_stride": 16,
        "val_batch_size": 4096,
        "val_loss_every": 4,
        "train_log_every": 1,
        "iterations": 8,
        "max_wallclock_seconds": 0.0,
        "warmdown_iters": 6,
        "warmup_steps": 1,
        "swa_every": 1,
        "muon_momentum_warmup_steps": 4,
        "run_id": "tiny",
        "device": "cpu",
    }
    return lambda directory: {**options, "runs_dir": str(directory / "runs")}


@pytest.fixture
def tiny_options(tiny_options_of: Callable[[Path], dict[str, object]], tmp_path: Path) -> dict[str, object]:
    return tiny_options_of(tmp_path)


@pytest.fixture
def tiny_config(tiny_options: dict[str, object]) -> Config:
    return Config(**tiny_options)
