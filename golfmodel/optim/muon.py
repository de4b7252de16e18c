"""Muon: momentum orthogonalised by Newton-Schulz (Jordan et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernels import newton_schulz


class Muon(Optimizer):
    """For matrices `[rows, columns]`; every matrix of a group goes through one `newton_schulz` call.

        buf = momentum * buf + g
        u   = newton_schulz(g + momentum * buf)      (g + momentum * buf becomes buf without `nesterov`)
        w   = (1 - lr * weight_decay) * w - lr * sqrt(max(1, rows / columns)) * u

    The interface is `torch.optim.Muon`'s; that one scales its update differently.

    Args:
        params: 2-D parameters, or groups of them.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: of the running gradient, in [0, 1).
        nesterov: whether the update looks one step ahead.
        ns_steps: Newton-Schulz iterations.

    Raises:
        ValueError: a parameter is not 2-D, or a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of 2-D parameters, its own options beside the defaults; checks both."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lr, weight_decay, momentum, ns_steps = (group[n] for n in ("lr", "weight_decay", "momentum", "ns_steps"))
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or ns_steps < 1:
            raise ValueError(
                f"lr {lr} and weight_decay {weight_decay} must be at least 0, momentum {momentum} in [0, 1), "
                f"ns_steps {ns_steps} at least 1"
            )
        for parameter in group["params"]:
            if parameter.ndim != 2:
                raise ValueError(f"a Muon parameter has shape {tuple(parameter.shape)}: must be 2-D")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        ahead = torch._foreach_add(gradients, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        updates = newton_schulz(ahead, steps=group["ns_steps"])
        scales = [-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5 for p in parameters]
        updates = torch._foreach_mul([u.to(p.dtype) for u, p in zip(updates, parameters, strict=True)], scales)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates)
