"""The first losses of a small model, as they were: no change of the mathematics goes unnoticed.

After a change that is meant, `python -m tests.test_golden_losses` writes the new ones; the commit says why they moved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from golfmodel.config import Config
from golfmodel.data.loader import make_loader
from golfmodel.data.shards import open_shard, write_shard
from golfmodel.model.gpt import GPT
from golfmodel.optim.groups import Optimizers

GOLDEN = Path(__file__).parent / "golden"
SHARD = GOLDEN / "golden_train_000000.bin"
LOSSES = GOLDEN / "losses.json"
STEPS, TOKENS = 50, 32_256  # with its header, a shard of 64 KiB
CONFIG = Config(
    num_layers=3,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=256,
    bigram_vocab_size=128,
    bigram_dim=16,
    train_seq_len=64,
    eval_seq_len=64,
    eval_stride=16,
    train_batch_tokens=512,
    micro_batch_tokens=512,
    compute_dtype="float32",
    device="cpu",
    matrix_lr=0.01,
    scalar_lr=0.01,
    tied_embed_lr=0.015,
    muon_wd=0.04,
    adam_wd=0.04,
    grad_clip_norm=0.3,
    document_boundaries=True,
    mtp_num_heads=1,
)
# With its weights rounded to int6 training magnifies any rounding: in six steps from 1e-7 to 1e-4.
ROUNDED = dataclasses.replace(CONFIG, qat_enabled=True)
ROUNDED_STEPS = 3


def tokens() -> np.ndarray:
    """Documents of some 100 tokens; six in ten tokens follow from the two before them, the others by Zipf's law."""
    generator = np.random.Generator(np.random.PCG64(0))
    follows = generator.integers(2, 256, size=256)
    weights = 1 / np.arange(2, 256)
    weights /= weights.sum()
    drawn = np.empty(TOKENS, dtype=np.uint16)
    before, last = 1, 1
    for index in range(TOKENS):
        kind = generator.random()
        if index == 0 or kind < 0.01:
            token = 1
        elif kind < 0.6:
            token = int(follows[(3 * before + 7 * last) % 256])
        else:
            token = int(2 + generator.choice(254, p=weights))
        drawn[index] = token
        before, last = last, token
    return drawn


def train(config: Config, steps: int) -> list[float]:
    """Losses of the first steps, from weights with no zeros to hide behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = GPT(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        optimizers = Optimizers(model, config)
        loader = make_loader(
            directory=GOLDEN,
            order="in_order",
            seq_len=config.train_seq_len,
            batch_tokens=config.train_batch_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            rank=0,
            world_size=1,
            seed=0,
            vocab_size=config.vocab_size,
            device=torch.device("cpu"),
        )
        losses = []
        for step in range(steps):
            inputs_BT, targets_BT = next(loader)
            loss = model(inputs_BT, targets_BT)
            loss.backward()
            optimizers.set_schedule(lr_scale=1 - 0.5 * step / STEPS, momentum=0.85 + 0.1 * step / STEPS)
            optimizers.step()
            losses.append(loss.item())
        loader.close()
        return losses
    finally:
        torch.set_num_threads(threads)


def test_the_shard_is_the_one_that_is_generated():
    assert SHARD.stat().st_size == 2**16
    assert np.array_equal(open_shard(SHARD), tokens())


def golden() -> dict[str, list[float]]:
    return {"losses": train(CONFIG, STEPS), "losses_of_rounded_weights": train(ROUNDED, ROUNDED_STEPS)}


def test_losses_are_as_they_were():
    # A gradient off by 1e-7 moves them by 1.3e-5 of their size; weight decay at three quarters, or a rate of 1.01
    # times as much, by 1.2e-4 and more.
    wanted = json.loads(LOSSES.read_text())
    for name, losses in golden().items():
        assert losses == pytest.approx(wanted[name], rel=1e-4), name


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    write_shard(SHARD, tokens())
    LOSSES.write_text(json.dumps(golden(), indent=0) + "\n")
