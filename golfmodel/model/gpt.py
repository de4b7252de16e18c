"""The whole model: input stage, blocks with U-Net skips, head, losses.

B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.model.attention import Rotary, document_mask
from golfmodel.model.block import Block, BlockWeights
from golfmodel.model.embedding import InputStage
from golfmodel.model.layers import Matrix, Source, cast_matrices, declare_channels, rms_norm
from golfmodel.model.parameters import Group, Storage, backward_parts, parameter_specs
from kernels import dispatch, linear_cross_entropy


class UNetSkips(nn.Module):
    """A weight per channel for each skip from the first half of the blocks to the second; 1 at the start."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.count = config.num_layers // 2
        for index in range(self.count):
            declare_channels(self, f"weight_{index}", config.model_dim, 1.0)

    def scale(self, index: int) -> Tensor:
        """`[D]`, of skip `index`."""
        return getattr(self, f"weight_{index}")


class GPT(nn.Module):
    """A language model over `VOCAB_SIZE` pieces; RECIPE's names are the options of `Config`.

    Weights start from PyTorch's global generator: call `torch.manual_seed` first. Calling the model gives the
    training loss; `token_losses` and `logits` are for evaluation.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.compute_dtype)
        self.input = InputStage(config, dtype)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.skips = UNetSkips(config)
        self.rotary = Rotary(config, dtype)
        self.head: Matrix | None = None
        if not config.tie_embeddings:
            self.head = Matrix(config.model_dim, config.vocab_size, storage=Storage.INT8, group=Group.HEAD, gain=0.0)
        self.future_heads = nn.ModuleList(
            Matrix(config.model_dim, config.vocab_size, storage=Storage.NONE, gain=0.0)
            for _ in range(config.mtp_num_heads)
        )
        self._parts = self._parts_of_blocks()

    @property
    def gains_from_compiling(self) -> bool:
        """Whether `torch.compile` has much to win on a GPU: without the kernels, or for attention within documents."""
        return dispatch.chosen() == "reference" or self.config.document_boundaries

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The training loss, in training and evaluation mode alike: mean cross-entropy in nats, plus the weighted
        mean over multi-token heads.

        Head k >= 0 predicts token i + 2 + k from position i, which is `targets[i + 1 + k]`.
        """
        x_BTD, cap = self.hidden(tokens_BT), self.config.logit_softcap
        loss = linear_cross_entropy(x_BTD, self._head(), targets_BT, soft_cap=cap)
        if len(self.future_heads):
            extra = x_BTD.new_zeros((), dtype=torch.float32)
            heads = cast_matrices([Source((head,)) for head in self.future_heads], x_BTD.dtype)
            for k, head_VD in enumerate(heads):
                earlier_BTD, later_BT = x_BTD[:, : -(k + 1)], targets_BT[:, k + 1 :]
                extra = extra + linear_cross_entropy(earlier_BTD, head_VD, later_BT, soft_cap=cap)
            loss = loss + self.config.mtp_loss_weight / len(self.future_heads) * extra
        return loss

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of each target in nats, float32 `[B, T]`."""
        x_BTD, cap = self.hidden(tokens_BT), self.config.logit_softcap
        return linear_cross_entropy(x_BTD, self._head(), targets_BT, soft_cap=cap, reduction="none")

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Soft-capped logits in float32 `[B, T, V]`."""
        x_BTD, cap = self.hidden(tokens_BT), self.config.logit_softcap
        return cap * torch.tanh(F.linear(x_BTD, self._head()).float() / cap)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The last block's output after the final RMS norm `[B, T, D]`, in the compute dtype."""
        document_start_BT, mask = None, None
        if self.config.document_boundaries:
            document_start_BT = tokens_BT == self.config.bos_token_id
            mask = document_mask(document_start_BT)
        x0_BTD = self.input(tokens_BT, document_start_BT)
        rotary = self.rotary(tokens_BT.size(1))
        x_BTD = x0_BTD
        weights: list[BlockWeights] = []
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index == len(weights):
                weights += self._weights_from(index)
            skip = ()
            if index >= self.skips.count and outputs:
                skip = outputs.pop(), self.skips.scale(index - self.skips.count)
            x_BTD, given_BTD, x0_BTD = block(x_BTD, x0_BTD, weights[index], rotary, mask, *skip)
            if 0 < index < self.skips.count:  # the output before: the block adds up the gradients of both its uses
                outputs[-1] = given_BTD
            if index < self.skips.count:
                outputs.append(x_BTD)
        return rms_norm(x_BTD)

    def _weights_from(self, first: int) -> list[BlockWeights]:
        """The weights of block `first` and of those after it in the same part of backward, in one cast.

        It is made when block `first` comes up, so backward is done with it before it goes on to the blocks before.
        """
        blocks = [block for block, part in zip(self.blocks, self._parts, strict=True) if part == self._parts[first]]
        sources = [source for block in blocks for source in block.sources()]
        weights = iter(cast_matrices(sources, self.input.token.weight.dtype))
        return [BlockWeights(*islice(weights, len(BlockWeights._fields))) for _ in blocks]

    def _parts_of_blocks(self) -> list[int]:
        """Each block's part of backward: that of its matrices, or where they are in two, the one that is sent first."""
        specs = parameter_specs(self)
        matrices = [(name, p) for name, p in self.named_parameters() if specs[name].group is Group.MATRIX]
        parts = backward_parts([parameter.numel() for _, parameter in matrices])
        return [
            min(part for (name, _), part in zip(matrices, parts, strict=True) if name.startswith(f"blocks.{index}."))
            for index in range(len(self.blocks))
        ]

    def _head(self) -> Tensor:
        """The weight `[V, D]` of the logits; tied, the token table itself."""
        table_VD = self.input.token.weight
        return table_VD if self.head is None else cast_matrices([Source((self.head,))], table_VD.dtype)[0]
