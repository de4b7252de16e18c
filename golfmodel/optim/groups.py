"""Which optimizer trains which parameter, by the groups that the model declares."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from golfmodel.config import Config
from golfmodel.model.parameters import Group, parameter_specs
from golfmodel.optim.muon import Muon


class Optimizers:
    """Muon for the matrices and AdamW for the rest, moved together.

    Each parameter group keeps its full learning rate in `group["base_lr"]`; `set_schedule` scales all of them.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        specs = parameter_specs(model)
        by_group: dict[Group, list[nn.Parameter]] = {group: [] for group in Group}
        for name, parameter in model.named_parameters():
            by_group[specs[name].group].append(parameter)
        self.parameters = list(model.parameters())
        self.grad_clip_norm = config.grad_clip_norm
        self.muon = Muon(
            by_group[Group.MATRIX],
            lr=config.matrix_lr,
            weight_decay=config.muon_wd,
            momentum=config.muon_momentum,
            ns_steps=config.muon_backend_steps,
        )
        embedding_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
        adam_groups = [
            {"params": by_group[Group.EMBEDDING], "lr": embedding_lr, "weight_decay": config.adam_wd},
            {"params": by_group[Group.SCALAR], "lr": config.scalar_lr, "weight_decay": config.adam_wd},
            {"params": by_group[Group.HEAD], "lr": config.head_lr, "weight_decay": 0.0},
        ]
        self.adam = AdamW(
            [group for group in adam_groups if group["params"]],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self.all: list[Optimizer] = [self.muon, self.adam]
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict]:
        """Every parameter group of every optimizer."""
        return [group for optimizer in self.all for group in optimizer.param_groups]

    def set_schedule(self, *, lr_scale: float, momentum: float) -> None:
        """Sets every group's learning rate to `lr_scale` times its full one, and Muon's momentum."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum

    def step(self) -> None:
        """Clips the global gradient norm, updates every parameter, and frees the gradients."""
        if self.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip_norm, foreach=True)
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """Forgets all state, as if no step had been taken."""
        for optimizer in self.all:
            optimizer.state.clear()
