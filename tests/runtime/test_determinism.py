from __future__ import annotations

import os

import pytest
import torch
import torch._inductor.config

from golfmodel.runtime.determinism import CUBLAS_VARIABLE, determinism


def settings() -> list[object]:
    cudnn = torch.backends.cudnn
    inductor = getattr(torch._inductor.config, "deterministic", None)
    return [torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, inductor]


def test_only_while_it_is_wanted(monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with determinism(False):
        assert settings() == before
        assert CUBLAS_VARIABLE not in os.environ
    with pytest.raises(ZeroDivisionError), determinism(True):
        assert settings() == [True, True, False, None if before[3] is None else True]
        assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
        raise ZeroDivisionError
    assert settings() == before


def test_an_operation_without_a_fixed_order_is_refused():
    with determinism(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
