from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from golfmodel import sample
from golfmodel.artifact.container import write_artifact
from golfmodel.artifact.readback import pack_model
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.runtime.errors import ArtifactError
from golfmodel.runtime.versions import PROJECT_ROOT


@pytest.fixture(scope="module")
def model(tiny_options_of, tmp_path_factory):
    torch.manual_seed(0)
    return GPT(Config(**tiny_options_of(tmp_path_factory.mktemp("sample")))).eval()


@pytest.fixture(scope="module")
def artifact(model, demo_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.golf"
    write_artifact(path, pack_model(model, demo_tokenizer.digest))
    return path


def draw(model, prompt, **options):
    return list(sample.sample_tokens(model, prompt, count=20, generator=torch.Generator().manual_seed(1), **options))


def test_the_likeliest_token_each_time_at_temperature_zero(model):
    tokens = [1, 50, 60]
    for token in draw(model, tokens, temperature=0):
        assert token == int(model.logits(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 23


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_weights_that_make_no_numbers_are_an_error(model, temperature):
    """As fp32 parameters of an artifact may be: each is finite."""
    overflowing = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in overflowing.parameters():
            parameter.fill_(3e38)
    with pytest.raises(ArtifactError, match="logits are not finite"):
        draw(overflowing, [1, 50], temperature=temperature)


def test_draws_follow_the_seed_and_top_k(model):
    assert draw(model, [1], temperature=1.0) == draw(model, [1], temperature=1.0)
    assert draw(model, [1], temperature=1.0) != draw(model, [1], temperature=0)
    assert draw(model, [1], temperature=1.0, top_k=1) == draw(model, [1], temperature=0)


def test_draws_have_the_models_distribution(model):
    generator = torch.Generator().manual_seed(2)
    probabilities_V = torch.softmax(model.logits(torch.tensor([[1, 7]]))[0, -1].detach() / 0.5, dim=-1)
    likeliest = int(probabilities_V.argmax())
    draws = 400
    hits = sum(
        next(sample.sample_tokens(model, [1, 7], count=1, temperature=0.5, generator=generator)) == likeliest
        for _ in range(draws)
    )
    expected = float(probabilities_V[likeliest])
    assert abs(hits / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5 + 1 / draws


def test_the_text_may_outgrow_the_window(model):
    prompt = list(range(2, 80))
    assert len(prompt) > model.config.train_seq_len
    assert len(draw(model, prompt)) == 20


def test_stops_before_a_new_document(model, monkeypatch):
    logits = torch.zeros(1, 1, 1024)
    logits[..., model.config.bos_token_id] = 100.0
    monkeypatch.setattr(model, "logits", lambda _: logits)
    assert draw(model, [1, 2]) == []


def test_a_character_of_several_byte_pieces_comes_whole(demo_tokenizer):
    text = "x = 'é猫😀'\n"
    prompt = [demo_tokenizer.bos_id, *demo_tokenizer.encode("# ")]
    pieces = list(sample.stream_text(demo_tokenizer, prompt, iter(demo_tokenizer.encode(text))))
    assert "".join(pieces).strip() == text.strip()
    assert not any(sample.UNFINISHED in piece for piece in pieces)
    assert len(pieces) > 3


def test_the_command_streams_the_same_text_for_the_same_seed(artifact, demo_tokenizer):
    command = [
        *(sys.executable, "-m", "golfmodel.sample", str(artifact), "--tokenizer-path", str(demo_tokenizer.path)),
        *("--prompt", "def f", "--tokens", "12", "--device", "cpu"),
    ]
    texts = [subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, check=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"def f")
    assert len(texts[0]) > 10


def test_another_tokenizer_is_refused(artifact, demo_tokenizer, tmp_path, capsys):
    other = tmp_path / "other.model"
    other.write_bytes(demo_tokenizer.path.read_bytes() + b"\x18\x01")
    assert sample.main([str(artifact), "--tokenizer-path", str(other), "--device", "cpu"]) == 2
    assert "other.model" in capsys.readouterr().err


def test_bad_options_are_named(artifact, capsys):
    assert sample.main([str(artifact), "--tokens", "-1"]) == 2
    assert "--tokens is -1" in capsys.readouterr().err
