"""Muon: momentum orthogonalised by Newton-Schulz (Jordan et al. 2024)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from golfmodel.optim.sharding import Reducing, Shards
from golfmodel.runtime.distributed import Ranks
from kernels.addresses import Tensors, as_tensors
from kernels.muon_update import momentum_newton_schulz_, muon_update_


class GroupGradients(NamedTuple):
    """Those of a group's parameters that have a gradient, and the gradients."""

    parameters: Tensors
    gradients: Tensors


def gradients_of(group: dict[str, Any]) -> GroupGradients:
    """Of an optimizer's group."""
    parameters = group["params"]
    gradients = [parameter.grad for parameter in parameters]
    if any([gradient is None for gradient in gradients]):
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
    return GroupGradients(Tensors(parameters), Tensors(gradients))


def states_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """What the optimizer keeps for each, which may be nothing."""
    kept = optimizer.state
    # To look a parameter up takes the host longer than all else that is done with its state.
    if len(kept) == len(parameters) and all(map(operator.is_, kept, parameters)):
        return list(kept.values())
    return [kept[parameter] for parameter in parameters]


class GroupUpdates(NamedTuple):
    """What a step does to those of a group's parameters that have a gradient."""

    group: dict[str, Any]
    parameters: Sequence[Tensor]
    updates: Sequence[Tensor]


@functools.lru_cache(maxsize=64)
def _scales(shapes: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    return tuple([max(1.0, rows / columns) ** 0.5 for rows, columns in shapes])


class Muon(Optimizer):
    """For matrices `[rows, columns]`; every matrix of a group goes through one `newton_schulz` call.

        buf = momentum * buf + g
        u   = newton_schulz(g + momentum * buf)      (g + momentum * buf becomes buf without `nesterov`)
        w   = (1 - lr * weight_decay) * w - lr * sqrt(max(1, rows / columns)) * u

    Groups, closures and schedulers are as in `torch.optim.Muon`, which scales its update differently and has other
    names for some options. A step never waits for the device.

    Over several ranks each matrix has an owner, which alone averages its gradient, keeps its momentum and computes its
    update; updates travel in bfloat16, in which they come out of `newton_schulz`. `step`, `state_dict`, `reducing` and
    `start_reducing` are then for all ranks together, and a gradient that is None on one rank has to be None on all. A
    state dict is always whole: it loads into any number of ranks.

    Args:
        params: 2-D parameters, or groups of them; the same on every rank.
        lr: learning rate; a number, or a tensor `[]`, which a captured graph reads anew at each replay.
        weight_decay: decoupled.
        momentum: of the running gradient, in [0, 1); a number or a tensor, as `lr`.
        nesterov: whether the update looks one step ahead.
        ns_steps: Newton-Schulz iterations.
        ranks: who shares the work; None for this process alone.

    Raises:
        ValueError: a parameter is not 2-D, or a number is out of its range.
    """

    # here too, for copies, which take only what every optimizer has; a copy works for its process alone
    _ranks: Ranks | None = None
    _shards: Shards | None = None
    _reducing: Reducing | None = None
    _present: set[int] | None = None  # parameters with a gradient, where the ranks have averaged them

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float | Tensor = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        *,
        ranks: Ranks | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        self._ranks = ranks if ranks is not None and ranks.world_size > 1 else None
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
        if self._ranks is not None:
            settled = () if self._shards is None else self._shards.owner
            self._shards = Shards(self._parameters(), self._ranks, settled)
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """For the last backward before a step: gradients begin to be averaged over the ranks while it goes on.

        Parts of them are sent as soon as a part is complete, the last parameters' first.
        """
        if self._shards is None:
            yield
            return
        reducing = self._reducing = Reducing(self._parameters(), self._shards)
        try:
            yield
        except BaseException:
            reducing.has_failed = True
            if not reducing.has_begun:
                self._reducing = None
            raise
        finally:
            reducing.is_open = False

    def abandon(self) -> None:
        """Forgets what was averaged for a step that failed on its way."""
        self._present = self._reducing = None

    def _has_gradient(self, parameter: Tensor) -> None:
        if self._reducing is not None:
            self._reducing.has_gradient(parameter)

    @torch.no_grad()
    def start_reducing(self) -> Callable[[], None]:
        """Starts to average the gradients over the ranks, as far as `reducing` has not; what it returns waits for them.

        This rank's own are then the means; other ranks' matrices have None. `step` does this where it has not been
        done.
        """
        if self._shards is None:
            return lambda: None
        parameters = self._parameters()
        reducing = self._reducing or Reducing(parameters, self._shards)
        self._reducing = None
        reducing.send_rest()
        self._present = set(reducing.sent)

        def finish() -> None:
            for index, mean in reducing.means().items():
                parameters[index].grad = mean.to(parameters[index].dtype)

        return finish

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.start_step()()
        return loss

    @torch.no_grad()
    def start_step(
        self, clip: Tensor | None = None, gradients: Sequence[GroupGradients] | None = None
    ) -> Callable[[], None]:
        """This rank's part of a step; what it returns waits for the other ranks' and changes the weights.

        That is for callers under `torch.no_grad`, as `step` is.

        Args:
            clip: what gradients are multiplied by, `[]` on their device; None for 1.
            gradients: `gradients_of` each group, if the caller knows it.
        """
        if self._shards is not None and self._present is None:
            self.start_reducing()()
        present, self._present = self._present, None
        if gradients is None:
            gradients = list(map(gradients_of, self.param_groups))
        by_group = [
            GroupUpdates(group, own.parameters, self._updates(group, own, clip))
            for group, own in zip(self.param_groups, gradients, strict=True)
        ]
        return (lambda: self._apply(by_group)) if self._shards is None else self._start_gathering(by_group, present)

    def _start_gathering(self, own: Sequence[GroupUpdates], present: Container[int]) -> Callable[[], None]:
        """Starts to give every rank this rank's updates; what it returns waits for everybody's, and takes the step."""
        parameters = self._parameters()
        index_of = {parameter: index for index, parameter in enumerate(parameters)}
        updates = {
            index_of[parameter]: update
            for _, its_parameters, its_updates in own
            for parameter, update in zip(its_parameters, its_updates, strict=True)
        }
        wide = self._shards.dtype == torch.float64
        gathered = self._shards.start_gathering(updates, torch.float64 if wide else torch.bfloat16)

        def finish() -> None:
            everything, by_group = gathered(), []
            for group in self.param_groups:
                parameters = [parameter for parameter in group["params"] if index_of[parameter] in present]
                its_updates = [everything[index_of[parameter]] for parameter in parameters]
                by_group.append(GroupUpdates(group, parameters, its_updates))
            self._apply(by_group)

        return finish

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's; over several ranks, on every rank, with the momentum of all of them."""
        state = super().state_dict()
        if self._shards is not None:
            parameters = self._parameters()
            own = {
                index: self.state[parameters[index]]["momentum_buffer"]
                for index in self._shards.own
                if parameters[index] in self.state
            }
            known = self._shards.known(own)
            gathered = self._shards.start_gathering(own, self._shards.dtype)()
            state["state"] = {
                index: {"momentum_buffer": gathered[index].to(parameters[index].dtype, copy=True)} for index in known
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a whole state; each rank keeps that of its own matrices."""
        super().load_state_dict(state_dict)
        own = set(self.own_parameters())
        for parameter in [parameter for parameter in self.state if parameter not in own]:
            del self.state[parameter]

    def own_parameters(self) -> list[Tensor]:
        """Those whose momentum this rank keeps: all of them, for one process alone."""
        parameters = self._parameters()
        return parameters if self._shards is None else [parameters[index] for index in self._shards.own]

    def _updates(self, group: dict[str, Any], own: GroupGradients, clip: Tensor | None) -> Sequence[Tensor]:
        """Moves the momentum of these parameters, and orthogonalises."""
        parameters, gradients = own
        states = states_of(self, parameters)
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [state["momentum_buffer"] for state in states]
        options = {name: group[name] for name in ("momentum", "nesterov")}
        return momentum_newton_schulz_(buffers, gradients, **options, clip=clip, steps=group["ns_steps"])

    def _apply(self, by_group: Iterable[GroupUpdates]) -> None:
        """Decays the weights and takes the step."""
        for group, parameters, updates in by_group:
            scales = _scales(as_tensors(updates).shapes)
            muon_update_(parameters, updates, scales, lr=group["lr"], weight_decay=group["weight_decay"])
