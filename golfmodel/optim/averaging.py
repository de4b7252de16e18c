"""Stochastic weight averaging (Izmailov et al. 2018) in float32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MINIMUM_COPIES = 2


class WeightAverage:
    """A running mean of the weights, kept in float32 whatever their dtype: `mean += (w - mean) / n`."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._means: list[Tensor] = []
        self.copies = 0

    @torch.no_grad()
    def add(self) -> None:
        """Enters the present weights into the mean."""
        self.copies += 1
        if self.copies == 1:
            self._means = [p.float().clone() for p in self._parameters]
        else:
            torch._foreach_lerp_(self._means, [p.float() for p in self._parameters], 1 / self.copies)

    @property
    def means(self) -> list[Tensor]:
        """The mean of each parameter, in their order; none before the first copy."""
        return self._means

    def load(self, copies: int, means: Sequence[Tensor]) -> None:
        """Goes on from a mean over `copies` copies."""
        self.copies = copies
        self._means = [
            mean.to(parameter.device, torch.float32, copy=True)
            for mean, parameter in zip(means, self._parameters if copies else [], strict=True)
        ]

    @torch.no_grad()
    def apply(self) -> bool:
        """Replaces the weights by their mean; leaves them, and returns False, below `MINIMUM_COPIES` copies."""
        if self.copies < MINIMUM_COPIES:
            return False
        torch._foreach_copy_(self._parameters, self._means)
        return True
