"""Sliding-window scoring, in wall time: every target once, at stride 64, as a run's last score takes it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from bench.ceilings import Ceilings
from bench.comparison import Row
from bench.timing import wall
from bench.tokens import token_batch
from golfmodel.config import resolve
from golfmodel.evaluation.evaluator import Evaluator
from golfmodel.model.gpt import GPT
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.distributed import process_group

ON_GPU = torch.cuda.is_available()
PRESET, TARGETS = ("seed", 2**18) if ON_GPU else ("demo", 2**12)


def test_scoring(device: torch.device, ceilings: Ceilings, record: Callable[[Row], None]) -> None:
    config = resolve(["--preset", PRESET], {})
    torch.manual_seed(0)
    model = GPT(config).to(device).eval()
    torch.compiler.reset()
    token_losses = compiled(model.token_losses, config.compile, device, gains=model.gains_from_compiling)
    tokens = token_batch(1, TARGETS + 1, config.vocab_size, torch.device("cpu"))[0].numpy().astype(np.uint16)
    text = SimpleNamespace(tokens=tokens, target_bytes=np.ones(TARGETS, dtype=np.int64))
    with process_group(device.type, {}) as ranks:
        evaluator = Evaluator(
            text,
            ranks,
            length=config.eval_seq_len,
            stride=config.eval_stride,
            batch_tokens=config.val_batch_size,
        )
        times = wall(lambda: evaluator.sliding(token_losses), device=device, rounds=3)
    record(
        Row(
            suite="scoring",
            name="sliding window",
            shape=f"{TARGETS} targets, stride {config.eval_stride} of {config.eval_seq_len}",
            dtype=config.compute_dtype,
            part="scoring",
            provider="auto",
            times=times,
            ceilings=ceilings,
            tokens=TARGETS,
        )
    )
