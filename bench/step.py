"""One training step of a config on this machine: forward, backward, clip, optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.timing import Prepared
from bench.tokens import token_batch
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.optim.groups import Optimizers
from golfmodel.runtime.compiling import compiled
from golfmodel.training.step import UNRECORDED_STEPS, Step

# Of optimizers alone: the first makes their state, the second finds it made, the third finds it as the one before.
STEPS_UNTIL_RECORDED = 3


@contextmanager
def kernels_chosen(choice: str) -> Iterator[None]:
    """`GOLF_KERNELS` set to `choice`."""
    before = os.environ.get("GOLF_KERNELS")
    os.environ["GOLF_KERNELS"] = choice
    try:
        yield
    finally:
        del os.environ["GOLF_KERNELS"]
        if before is not None:
            os.environ["GOLF_KERNELS"] = before


class TrainingStep:
    """A trainer's step of one micro-batch, on tokens of its own.

    Args:
        config: whose model and optimizers; its micro-batch on one rank.
        device: where.
        kernels: what `GOLF_KERNELS` is while it is compiled and run.
        records: as of `golfmodel.training.step.Step`, and of its optimizers.
    """

    def __init__(self, config: Config, device: torch.device, *, kernels: str = "auto", records: bool = True) -> None:
        self.config, self.device, self._kernels = config, device, kernels
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(device)
        self.optimizers = Optimizers(self.model, config, records=records)
        with kernels_chosen(kernels):
            gains = self.model.gains_from_compiling
        self._loss = compiled(self.model, config.compile, device, gains=gains)
        self._step = Step(self._loss, self.optimizers, 1, device, records=records)
        self.rows = config.rows_per_micro_batch(1)
        tokens = [
            token_batch(self.rows, config.train_seq_len + 1, config.vocab_size, device, seed=seed) for seed in (0, 1)
        ]
        self.batches = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.rows * self.config.train_seq_len

    @property
    def flops(self) -> float:
        """Of the matrix products and of causal attention, forward and backward, each in full; nothing recomputed.

        Per token 6 for each weight that multiplies activations, and 7 T D per block for attention: 2 T D (half of
        4 T D, as a query sees half the keys), and 2.5 times that backward.
        """
        config = self.config
        blocks = sum(weight.numel() for weight in self.model.blocks.parameters() if weight.dim() == 2)
        heads = (1 + config.mtp_num_heads) * config.vocab_size * config.model_dim
        attention = 7.0 * config.num_layers * config.train_seq_len * config.model_dim
        return self.tokens * (6.0 * (blocks + heads) + attention)

    @property
    def state_bytes(self) -> int:
        """Of weights and optimizer state, which lie there between steps."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for optimizer in self.optimizers.all:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def __call__(self, index: int) -> Tensor:
        """Takes a step on batch `index`; returns the loss, which stands until the next step."""
        with kernels_chosen(self._kernels):
            return self._step([self.batches[index % len(self.batches)]])

    def settle(self) -> int:
        """Takes the steps after which every one is as the last; returns the bytes that they needed at most."""
        there = self.state_bytes
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            there -= torch.cuda.memory_allocated(self.device)
        for index in range(UNRECORDED_STEPS + 1):
            self(index)
        return there + torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def forward_and_backward(self, index: int) -> None:
        """On batch `index`; leaves no gradients."""
        inputs_BT, targets_BT = self.batches[index % len(self.batches)]
        with kernels_chosen(self._kernels):
            self._loss(inputs_BT, targets_BT).backward()
        self.model.zero_grad(set_to_none=True)

    def optimizers_alone(self, *, records: bool) -> Prepared:
        """A step of optimizers of their own, as a function, on the gradients of one step, again and again.

        Args:
            records: whether it is, on a GPU, a replay of what they have recorded; else launched kernel by kernel.
        """
        optimizers = Optimizers(self.model, self.config, records=records)
        self.model.zero_grad(set_to_none=True)
        with kernels_chosen(self._kernels):
            self._loss(*self.batches[0]).backward()
        parameters = list(self.model.parameters())  # to walk the modules each time takes the host 350 us
        gradients = [parameter.grad for parameter in parameters]
        self.model.zero_grad(set_to_none=True)

        def give_gradients() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

        def take_step(_: int) -> None:
            with kernels_chosen(self._kernels):
                optimizers.step()

        step = Prepared(give_gradients, take_step)
        for number in range(STEPS_UNTIL_RECORDED if records else 0):
            step(number)
        return step
