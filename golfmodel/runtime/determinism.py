"""The same bits each time, on one machine, with one version of everything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Where it is wanted, only operations that give the same bits each time, and no choice by timing.

    PyTorch then raises a RuntimeError at an operation that has no such form. Enter before the first matrix product on
    a GPU: cuBLAS reads its variable then.
    """
    if not wanted:
        yield
        return
    from torch._inductor import config as inductor  # noqa: PLC0415  (0.8 s that only this mode needs at every start)

    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn = cudnn.deterministic, cudnn.benchmark
    before_inductor = getattr(inductor, "deterministic", None)  # newer than torch 2.9
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    if before_inductor is not None:
        inductor.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before_cudnn
        if before_inductor is not None:
            inductor.deterministic = before_inductor
