from __future__ import annotations

import pytest
import torch

from kernels.launch import MAX_ROWS, launch


class Kernel:
    """Stands in for one: keeps what it is started with."""

    __name__ = "some_kernel"

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append((grid, arguments))


def test_arguments_come_in_the_order_that_kernels_take_them():
    kernel, tensor = Kernel(), torch.ones(1)
    launch(kernel, (3,), (tensor, None), (5, 0.5), ("constant",))
    assert kernel.started == [((3,), (tensor, None, 5, 0.5, "constant"))]


def test_nothing_is_started_without_programs():
    kernel = Kernel()
    launch(kernel, (0,), (torch.ones(1),), (5,), ())
    assert not kernel.started


def test_more_rows_than_leave_room_for_a_tile_in_an_int32_are_refused():
    kernel = Kernel()
    launch(kernel, (1,), (torch.ones(1),), (MAX_ROWS,), ())
    with pytest.raises(ValueError, match=f"some_kernel was given {MAX_ROWS + 1} rows or items; it takes at most"):
        launch(kernel, (1,), (torch.ones(1),), (MAX_ROWS + 1,), ())
    assert len(kernel.started) == 1
