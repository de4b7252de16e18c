"""Which optimizer trains which parameter, by the groups that the model declares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from golfmodel.config import Config
from golfmodel.model.parameters import Group, parameter_specs
from golfmodel.optim.muon import Muon
from golfmodel.runtime.distributed import Ranks
from kernels.clipping import clip_factors, square_sums


class Optimizers:
    """Muon for the matrices and AdamW for the rest, moved together.

    Over several ranks the gradients are averaged here: the matrices' to their owners, the others' to everyone.

    Each parameter group keeps its full learning rate in `group["base_lr"]`; `set_schedule` scales all of them.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks | None = None) -> None:
        specs = parameter_specs(model)
        by_group: dict[Group, list[nn.Parameter]] = {group: [] for group in Group}
        for name, parameter in model.named_parameters():
            by_group[specs[name].group].append(parameter)
        self._ranks = ranks if ranks is not None and ranks.world_size > 1 else None
        self._matrices = by_group[Group.MATRIX]
        self._others = [p for group, several in by_group.items() if group is not Group.MATRIX for p in several]
        self.grad_clip_norm = config.grad_clip_norm
        self.muon = Muon(
            by_group[Group.MATRIX],
            lr=config.matrix_lr,
            weight_decay=config.muon_wd,
            momentum=config.muon_momentum,
            ns_steps=config.muon_backend_steps,
            ranks=ranks,
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
        """Averages gradients over the ranks, clips their global norm, updates every parameter, frees the gradients."""
        if self._ranks is not None:
            finish_reducing = self.muon.start_reducing()
            self._ranks.average_gradients(self._others)
            finish_reducing()
        clip = self._clip() if self.grad_clip_norm > 0 else None
        finish_step = self.muon.start_step(None if clip is None else clip[0])
        # AdamW divides gradients by this, where it reads them anyway.
        self.adam.grad_scale = None if clip is None else clip[1]
        self.adam.step()
        finish_step()
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> Tensor | None:
        """What gradients are to be multiplied by so that their global norm is within bounds, and its inverse: `[2]`."""
        here, everywhere = (
            [parameter.grad for parameter in several if parameter.grad is not None]
            for several in (self._matrices, self._others)
        )
        ranks = self._ranks
        if ranks is None:
            gradients = [*here, *everywhere]
            return clip_factors(square_sums(gradients), self.grad_clip_norm) if gradients else None
        zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
        sums = [square_sums(each).sum() if each else zero for each in (here, everywhere)]
        return clip_factors(torch.stack((ranks.reduce_sum(sums[0]), sums[1])), self.grad_clip_norm)

    def reset(self) -> None:
        """Forgets all state, as if no step had been taken."""
        for optimizer in self.all:
            optimizer.state.clear()
