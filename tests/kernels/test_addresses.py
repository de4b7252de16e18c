"""What lists of tensors say of them."""

from __future__ import annotations

import pytest
import torch

from kernels.addresses import Pieces, Tensors, as_tensors

DTYPES = (torch.float32, torch.bfloat16)


def pieces(starts: tuple[int, ...]) -> Pieces:
    flat = torch.arange(64, dtype=torch.float32)
    return Pieces(flat, ((2, 3), (4,)), ((3, 1), (1,)), starts)


def test_tensors_say_what_each_would():
    several = [torch.zeros(3, 5, dtype=dtype) for dtype in DTYPES]
    tensors = Tensors(several)
    assert list(tensors) == several
    assert tensors.shapes == ((3, 5), (3, 5))
    assert tensors.dtypes == DTYPES
    assert tensors.addresses == tuple(tensor.data_ptr() for tensor in several)
    assert tensors.like is several[0]


def test_each_is_asked_once(monkeypatch):
    asked = []
    data_ptr = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: asked.append(tensor) or data_ptr(tensor))
    tensors = Tensors([torch.zeros(4), torch.zeros(4)])
    assert tensors.addresses == tensors.addresses
    assert len(asked) == 2


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(8)[1:], torch.zeros(4, 4).t()[:, :3]],
    ids=["not aligned", "not in a row"],
)
def test_no_addresses_where_kernels_cannot_read(bad):
    assert Tensors([torch.zeros(4), bad]).addresses is None


def test_a_tensor_without_elements_lies_nowhere():
    assert Tensors([torch.zeros(0, 4)]).addresses == (0,)
    assert Tensors([]).addresses == ()


def test_pieces_say_where_they_lie():
    several = pieces((0, 8))
    assert several.addresses == tuple(piece.data_ptr() for piece in several)
    assert several.dtypes == tuple(piece.dtype for piece in several)
    assert several.shapes == tuple(piece.shape for piece in several)
    assert pieces((0, 6)).addresses is None


def test_lists_that_know_themselves_stay():
    several, tensors = pieces((0, 8)), Tensors([torch.zeros(3)])
    assert as_tensors(several) is several
    assert as_tensors(tensors) is tensors
    assert isinstance(as_tensors([torch.zeros(3)]), Tensors)
