"""Which optimizer trains which parameter, by the groups that the model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from golfmodel.config import Config
from golfmodel.model.parameters import Group, parameter_specs
from golfmodel.optim.muon import GroupGradients, Muon, gradients_of, states_of
from golfmodel.runtime.cuda_graphs import GraphedCall, GraphKey
from golfmodel.runtime.distributed import Ranks
from kernels import dispatch
from kernels.addresses import is_capturing
from kernels.clipping import clip_factors, square_sums

# What each optimizer keeps for a parameter.
_MUON_ENTRIES = ("momentum_buffer",)
_ADAM_ENTRIES = ("step", "exp_avg", "exp_avg_sq")


class Optimizers:
    """Muon for the matrices and AdamW for the rest, moved together.

    Over several ranks the gradients are averaged here: the matrices' to their owners, the others' to everyone.

    Learning rates and Muon's momentum are tensors on the model's device, which `set_schedule` writes to. They, the
    weights and all state stay where they are in memory once there has been a step, so that a CUDA graph of a step
    goes on being one.

    For one process alone, a step on the current GPU records itself as a CUDA graph where it finds weights, options and
    gradients as the step before found them, and no other state loaded. From then on the host starts that graph alone,
    until one of them is exchanged or moved; if that happens again and again, steps are launched as ever. What a step
    needs of memory is the graph's. Some things go unnoticed: what stays in its place with another shape or dtype, the
    global switches of PyTorch, and a single tensor of the state that is exchanged past `load_state_dict`; before that
    one calls `forget`. Where somebody else records a step, it is part of that graph alone.

    Args:
        model: whose parameters are trained, where they are.
        config: rates, momenta, weight decay, clipping.
        ranks: who shares the work; None for this process alone.
        records: whether steps record themselves; False keeps to single launches, which a profiler tells apart.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks | None = None, *, records: bool = True) -> None:
        specs = parameter_specs(model)
        device = next(model.parameters()).device
        by_group: dict[Group, list[nn.Parameter]] = {group: [] for group in Group}
        for name, parameter in model.named_parameters():
            by_group[specs[name].group].append(parameter)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._ranks = ranks if ranks is not None and ranks.world_size > 1 else None
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
            capturable=device.type == "cuda",
        )
        self.all: list[Optimizer] = [self.muon, self.adam]
        self._full_rates = torch.tensor([group["lr"] for group in self.param_groups], device=device)
        self._rates = self._full_rates.clone()
        self._momentum = torch.tensor(config.muon_momentum, device=device)
        for group, rate in zip(self.param_groups, self._rates.unbind(), strict=True):
            group["lr"] = rate
        for group in self.muon.param_groups:
            group["momentum"] = self._momentum
        is_alone_on_gpu = device.type == "cuda" and self._ranks is None
        self._graphed = GraphedCall(device) if records and is_alone_on_gpu else None

    @property
    def param_groups(self) -> list[dict]:
        """Every parameter group of every optimizer."""
        return [group for optimizer in self.all for group in optimizer.param_groups]

    @property
    def is_recorded(self) -> bool:
        """Whether the next step, if all is as at the last one, is a replay."""
        return self._graphed is not None and self._graphed.is_recorded

    def set_schedule(self, *, lr_scale: float, momentum: float) -> None:
        """Sets every group's learning rate to `lr_scale` times its full one, and Muon's momentum."""
        torch.mul(self._full_rates, lr_scale, out=self._rates)
        self._momentum.fill_(momentum)

    def reducing(self) -> AbstractContextManager[None]:
        """For the last backward before a step: as `Muon.reducing`."""
        return self.muon.reducing()

    @torch.no_grad()
    def step(self) -> None:
        """Averages gradients over the ranks, clips their global norm, updates every parameter, frees the gradients."""
        if self._ranks is not None:
            finish_reducing = self.muon.start_reducing()
            self._ranks.average_gradients(self._others)
            finish_reducing()
        matrices, others = (list(map(gradients_of, optimizer.param_groups)) for optimizer in self.all)
        self._take(matrices, others)
        self._free_gradients()

    def _take(self, matrices: Sequence[GroupGradients], others: Sequence[GroupGradients]) -> None:
        """A step on these gradients, launched or replayed."""

        def launches() -> None:
            clip = self._clip(matrices, others) if self.grad_clip_norm > 0 else None
            finish_step = self.muon.start_step(None if clip is None else clip[0], matrices)
            # AdamW divides gradients by this, where it reads them anyway.
            _step_adam(self.adam, others, None if clip is None else clip[1])
            finish_step()

        if self._graphed is None or is_capturing(self._rates.device):
            launches()
        elif self._graphed(launches, self._graph_key((*matrices, *others))):
            # As launches do; autograd keeps nothing else that a step changes.
            torch.autograd.graph.increment_version([each for own in (*matrices, *others) for each in own.parameters])

    def _graph_key(self, by_group: Sequence[GroupGradients]) -> GraphKey | None:
        """What tells whether a step is as the one before; None if it is not to be recorded."""
        device = self._rates.device
        # Of another device it is not known whether its stream is captured.
        if self._graphed.has_given_up or torch.cuda.current_device() != device.index:
            return None
        where = []
        for parameters, gradients in by_group:
            if gradients.addresses is None:  # kernels cannot take them where they lie
                return None
            where.append((tuple(map(Tensor.data_ptr, parameters)), gradients.addresses))
        if not any([parameters for parameters, _ in where]):
            return None
        options = [option for group in self.param_groups for option in group.values()]
        if any([isinstance(option, Tensor) and option.device != device for option in options]):
            return None  # a launch reads it on the host
        # `load_state_dict` makes these anew. To look at every tensor in them, all of them long out of the CPU's caches,
        # would be a third of the host's time.
        states = [optimizer.state for optimizer in self.all]
        return GraphKey([*options, *states], (where, [*map(len, states)], self.grad_clip_norm, dispatch.chosen()))

    def forget(self) -> None:
        """Drops what a step recorded of itself, whose memory PyTorch can then free; the next step is launched."""
        if self._graphed is not None:
            self._graphed.forget()

    def abandon(self) -> None:
        """Forgets the gradients of a step that failed on its way."""
        self._free_gradients()
        self.muon.abandon()

    def _free_gradients(self) -> None:
        for parameter in self._names:
            parameter.grad = None

    def _clip(self, matrices: Sequence[GroupGradients], others: Sequence[GroupGradients]) -> Tensor | None:
        """What gradients are to be multiplied by so that their global norm is within bounds, and its inverse: `[2]`."""
        here, everywhere = (
            [gradient for each in several for gradient in each.gradients] for several in (matrices, others)
        )
        ranks = self._ranks
        if ranks is None:
            gradients = [*here, *everywhere]
            return clip_factors(square_sums(gradients), self.grad_clip_norm) if gradients else None
        zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
        sums = [square_sums(each).sum() if each else zero for each in (here, everywhere)]
        return clip_factors(torch.stack((ranks.reduce_sum(sums[0]), sums[1])), self.grad_clip_norm)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state of every parameter that has one, as `<parameter>.<entry>`.

        Over several ranks for all of them together; each gets the whole.
        """
        tensors = {}
        for optimizer in self.all:
            names = self._names_of(optimizer)
            for index, state in optimizer.state_dict()["state"].items():
                tensors.update({f"{names[index]}.{entry}": tensor for entry, tensor in state.items()})
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `state_tensors` gave, on any number of ranks; each takes its own of it."""
        self.reset()
        kept = {self.muon: (self.muon.own_parameters(), _MUON_ENTRIES), self.adam: (self._others, _ADAM_ENTRIES)}
        for optimizer, (parameters, entries) in kept.items():
            for parameter in parameters:
                name = self._names[parameter]
                if f"{name}.{entries[0]}" not in tensors:
                    continue
                state = optimizer.state[parameter]
                for entry in entries:
                    given = tensors[f"{name}.{entry}"]
                    if entry in state:
                        state[entry].copy_(given)
                    else:
                        state[entry] = given.to(parameter.device, copy=True)

    def _names_of(self, optimizer: Optimizer) -> list[str]:
        return [self._names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

    def reset(self) -> None:
        """Puts all state to zero, as it begins."""
        for optimizer in self.all:
            for state in optimizer.state.values():
                torch._foreach_zero_(list(state.values()))


def _step_adam(adam: AdamW, by_group: Sequence[GroupGradients], grad_scale: Tensor | None) -> None:
    """`adam.step()` of one without further options, on gradients divided by `grad_scale`; `by_group` are its groups'.

    That one asks so much about each parameter that the host takes as long for them as for all matrices. So it is left
    to give those a state that have none yet. Later what it ends in is called without it: one `_foreach_add_` for the
    steps of all groups, and `_fused_adamw_` for each group, whose tensors are of one dtype.
    """
    states = states_of(adam, [parameter for own in by_group for parameter in own.parameters])
    if not all(states):
        adam.grad_scale = grad_scale
        adam.step()
        adam.grad_scale = None  # of this step's gradients
        return
    steps, first, second = ([state[entry] for state in states] for entry in _ADAM_ENTRIES)
    if steps:
        torch._foreach_add_(steps, 1)
    start = 0
    for group, own in zip(adam.param_groups, by_group, strict=True):
        beta1, beta2 = group["betas"]
        its = slice(start, start + len(own.parameters))
        if own.parameters:
            torch._fused_adamw_(
                own.parameters,
                own.gradients,
                first[its],
                second[its],
                [],
                steps[its],
                grad_scale=grad_scale,
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        start = its.stop


def state_shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of everything that `Optimizers.state_tensors` can hold for a model, on whatever device."""
    specs, shapes = parameter_specs(model), {}
    for name, parameter in model.named_parameters():
        for entry in _MUON_ENTRIES if specs[name].group is Group.MATRIX else _ADAM_ENTRIES:
            like = (torch.Size(), torch.float32) if entry == "step" else (parameter.shape, parameter.dtype)
            shapes[f"{name}.{entry}"] = like
    return shapes
