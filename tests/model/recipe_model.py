"""The model of RECIPE.md told a second time, in float64 and one row, head and document at a time.

Slow and plain on purpose. It shares with `golfmodel.model` only the names of the parameters.

T time, D model width, V vocabulary, h head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from golfmodel.config import Config

Weights = dict[str, Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """The model's parameters in float64, as leaves of their own."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 2.0**-23).sqrt()


def int32(value: int) -> int:
    """A whole number wrapped into 32 bits, two's complement."""
    return (value + 2**31) % 2**32 - 2**31


def bigram_bucket(token: int, previous: int | None, num_buckets: int) -> int:
    if previous is None:
        return num_buckets - 1
    return (int32(36313 * token) ^ int32(27191 * previous)) % (num_buckets - 1)


def rotate(x_Th: Tensor, base: float) -> Tensor:
    """Turns the pair (j, j + h/2), read as a complex number, backwards by position / base^(2j / h)."""
    length, head_dim = x_Th.shape
    if length > 1024:
        base = base * (length / 1024) ** (head_dim / (head_dim - 2))
    half = head_dim // 2
    frequency = torch.tensor([base ** (-2 * j / head_dim) for j in range(half)], dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(x_Th[:, :half], x_Th[:, half:]) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((turned.real, turned.imag), dim=1)


def attention(config: Config, W: Weights, prefix: str, x_TD: Tensor) -> Tensor:
    head_dim = config.model_dim // config.num_heads
    length = len(x_TD)
    future_TT = torch.ones(length, length).triu(1).bool()
    outputs = []
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        own = slice(head * head_dim, (head + 1) * head_dim)
        theirs = slice(shared * head_dim, (shared + 1) * head_dim)
        q_Th = rotate(rms_norm(x_TD @ W[f"{prefix}.query.weight"][own].T), config.rope_base)
        k_Th = rotate(rms_norm(x_TD @ W[f"{prefix}.key.weight"][theirs].T), config.rope_base)
        v_Th = x_TD @ W[f"{prefix}.value.weight"][theirs].T
        scores_TT = W[f"{prefix}.query_gain"][head] * q_Th @ k_Th.T / math.sqrt(head_dim)
        outputs.append(scores_TT.masked_fill(future_TT, -math.inf).softmax(dim=1) @ v_Th)
    return torch.cat(outputs, dim=1) @ W[f"{prefix}.output.weight"].T


def block(config: Config, W: Weights, prefix: str, x_TD: Tensor, x0_TD: Tensor) -> Tensor:
    x_TD = W[f"{prefix}.residual_mix"] * x_TD + W[f"{prefix}.input_mix"] * x0_TD
    x_TD = x_TD + W[f"{prefix}.attention_scale"] * attention(config, W, f"{prefix}.attention", rms_norm(x_TD))
    hidden = (rms_norm(x_TD) @ W[f"{prefix}.mlp.up.weight"].T).clamp(min=0) ** 2
    return x_TD + W[f"{prefix}.mlp_scale"] * (hidden @ W[f"{prefix}.mlp.down.weight"].T)


def input_stage(config: Config, W: Weights, tokens: list[int]) -> Tensor:
    rows = []
    for i, token in enumerate(tokens):
        row_D = W["input.token.weight"][token]
        if config.bigram_vocab_size:
            bucket = bigram_bucket(token, tokens[i - 1] if i else None, config.bigram_vocab_size)
            bigram = W["input.bigram.table"][bucket]
            if config.bigram_dim != config.model_dim:
                bigram = W["input.bigram.projection.weight"] @ bigram
            row_D = row_D + W["input.bigram.scale"] * bigram
        rows.append(rms_norm(row_D))
    g_D = 1 / (1 + (-W["input.smear.gate"]).exp())
    before = [torch.zeros_like(rows[0]), *rows[:-1]]
    return torch.stack([(1 - g_D) * row + g_D * last for row, last in zip(rows, before, strict=True)])


def document_hidden(config: Config, W: Weights, tokens: list[int]) -> Tensor:
    x_TD = x0_TD = input_stage(config, W, tokens)
    pushed: list[Tensor] = []
    first = config.num_layers // 2
    for layer in range(config.num_layers):
        if layer >= first and pushed:
            x_TD = x_TD + W[f"skips.weight_{layer - first}"] * pushed.pop()
        x_TD = block(config, W, f"blocks.{layer}", x_TD, x0_TD)
        if layer < first:
            pushed.append(x_TD)
    return rms_norm(x_TD)


def hidden(config: Config, W: Weights, tokens: list[int]) -> Tensor:
    """The final hidden states `[T, D]` of a row; with document boundaries, each document by itself."""
    if not config.document_boundaries:
        return document_hidden(config, W, tokens)
    starts = [i for i, token in enumerate(tokens) if i == 0 or token == config.bos_token_id]
    ends = [*starts[1:], len(tokens)]
    return torch.cat([document_hidden(config, W, tokens[a:b]) for a, b in zip(starts, ends, strict=True)])


def capped(config: Config, logits: Tensor) -> Tensor:
    return config.logit_softcap * torch.tanh(logits / config.logit_softcap)


def logits(config: Config, W: Weights, tokens: list[int]) -> Tensor:
    """`[T, V]`."""
    head = W["input.token.weight"] if config.tie_embeddings else W["head.weight"]
    return capped(config, hidden(config, W, tokens) @ head.T)


def cross_entropy(logits_TV: Tensor, targets: list[int]) -> Tensor:
    """Nats of each target `[T]`."""
    return torch.stack([row.logsumexp(dim=0) - row[target] for row, target in zip(logits_TV, targets, strict=True)])


def training_loss(config: Config, W: Weights, tokens_BT: list[list[int]], targets_BT: list[list[int]]) -> Tensor:
    """Mean over all targets, and the weighted mean over the multi-token heads of their means."""
    own, extra = [], [[] for _ in range(config.mtp_num_heads)]
    for tokens, targets in zip(tokens_BT, targets_BT, strict=True):
        own.append(cross_entropy(logits(config, W, tokens), targets))
        hidden_TD = hidden(config, W, tokens)
        text = [tokens[0], *targets]
        for k in range(config.mtp_num_heads):
            predicts = [(i, text[i + 2 + k]) for i in range(len(tokens)) if i + 2 + k < len(text)]
            positions, future = zip(*predicts, strict=True)
            logits_TV = capped(config, hidden_TD[list(positions)] @ W[f"future_heads.{k}.weight"].T)
            extra[k].append(cross_entropy(logits_TV, list(future)))
    loss = torch.cat(own).mean()
    if extra:
        loss = loss + config.mtp_loss_weight * torch.stack([torch.cat(losses).mean() for losses in extra]).mean()
    return loss
