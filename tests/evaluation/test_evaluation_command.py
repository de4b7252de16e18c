"""What the scoring command refuses, in one line each; what it scores is tested with the whole pipeline."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from golfmodel.artifact.container import write_artifact
from golfmodel.artifact.readback import pack_model
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.runtime.errors import GolfError

command = importlib.import_module("golfmodel.evaluation.__main__")


@pytest.fixture(scope="module")
def arguments(tiny_options_of, tiny_corpus, demo_tokenizer, tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("command")
    torch.manual_seed(0)
    write_artifact(
        directory / "model.golf", pack_model(GPT(Config(**tiny_options_of(directory))), demo_tokenizer.digest)
    )
    paths = [f"--data-path={tiny_corpus}", f"--tokenizer-path={demo_tokenizer.path}"]
    return [str(directory / "model.golf"), *paths, "--device=cpu"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("--eval-stride=65", "--eval-stride is 65: must be between 0 and EVAL_SEQ_LEN 64"),
        ("--eval-stride=-1", "--eval-stride is -1"),
        ("--val-batch-size=0", "--val-batch-size is 0: must be at least 1"),
        ("--data-path=nowhere", "nowhere"),
        ("--paid-prefix-file=nowhere.xz", "nowhere.xz"),
    ],
)
def test_refusals(arguments, capsys, extra, said):
    assert command.main([*arguments, extra]) == 2
    assert said in capsys.readouterr().err


def test_another_tokenizer_is_refused(arguments, demo_tokenizer, tmp_path, capsys):
    other = tmp_path / "other.model"
    other.write_bytes(demo_tokenizer.path.read_bytes() + b"\x18\x01")
    assert command.main([*arguments, f"--tokenizer-path={other}"]) == 2
    assert "other.model" in capsys.readouterr().err


def test_a_file_that_is_no_artifact_is_refused(arguments, demo_tokenizer, capsys):
    assert command.main([str(demo_tokenizer.path), *arguments[1:]]) == 2
    assert "demo_1024_bpe.model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "extra", "used"),
    [(4096, [], 4096), (2**40, [], 524_288), (2**40, ["--val-batch-size=600000"], 600_000)],
)
def test_an_artifact_cannot_ask_for_any_batch(
    arguments, tiny_config, demo_tokenizer, tmp_path, monkeypatch, stored, extra, used
):
    config = dataclasses.replace(tiny_config, val_batch_size=stored)
    write_artifact(tmp_path / "model.golf", pack_model(GPT(config), demo_tokenizer.digest))
    seen = []

    class Stop(GolfError):
        pass

    def evaluator(*_, batch_tokens: int, **__):
        seen.append(batch_tokens)
        raise Stop

    monkeypatch.setattr(command, "Evaluator", evaluator)
    assert command.main([str(tmp_path / "model.golf"), *arguments[1:], *extra]) == 2
    assert seen == [used]
