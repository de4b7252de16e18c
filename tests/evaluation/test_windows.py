"""Every target of a text is scored once, with as much before it as the stride promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from golfmodel.evaluation.windows import Windows, plan_windows
from golfmodel.runtime.errors import DataError


@st.composite
def plans(draw) -> tuple[int, int, int]:
    """(targets in the text, targets a window, stride)."""
    length = draw(st.integers(1, 40))
    return draw(st.integers(length, 10 * length + 7)), length, draw(st.integers(1, length))


def scored(windows: Windows) -> list[range]:
    """The text's targets that each window scores."""
    firsts = (windows.start_W + windows.first_W).tolist()
    ends = (windows.start_W + windows.length).tolist()
    return [range(first, end) for first, end in zip(firsts, ends, strict=True)]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(plan=plans())
@example(plan=(2048, 2048, 64))
@example(plan=(2049, 2048, 64))
@example(plan=(2048 + 64, 2048, 64))
@example(plan=(2048 + 65, 2048, 2048))
@example(plan=(1, 1, 1))
def test_windows(plan):
    num_targets, length, stride = plan
    windows = plan_windows(num_targets, length, stride)
    targets = scored(windows)
    # Every target once, in order.
    assert [target for window in targets for target in window] == list(range(num_targets))
    # The first window scores everything, each later one at most its last `stride`, and something.
    assert targets[0] == range(length)
    assert all(1 <= len(window) <= stride for window in targets[1:])
    # All but the last advance by the stride and score all of it; the last ends with the text.
    starts = windows.start_W.tolist()
    assert starts[:-1] == [stride * index for index in range(len(starts) - 1)]
    assert all(len(window) == stride for window in targets[1:-1])
    assert starts[-1] + length == num_targets
    # Every target beyond the first window sees at least `length - stride` tokens before its own input.
    contexts = [target - start for start, window in zip(starts[1:], targets[1:], strict=True) for target in window]
    assert all(context >= length - stride for context in contexts)
    assert windows.start_W.dtype == windows.first_W.dtype == np.int64
    assert len(windows) == len(starts) == 1 + -(-(num_targets - length) // stride)


def test_by_hand():
    windows = plan_windows(11, 4, 3)
    # [0 1 2 3] 4 5 6 7 8 9 10, then 4-6 in the window from 3, 7-9 in that from 6, and 10 in the last four.
    assert windows.start_W.tolist() == [0, 3, 6, 7]
    assert windows.first_W.tolist() == [0, 1, 1, 3]


def test_side_by_side():
    windows = plan_windows(10, 4, 4)
    assert windows.start_W.tolist() == [0, 4, 6]
    assert windows.first_W.tolist() == [0, 0, 2]


def test_a_text_shorter_than_a_window():
    with pytest.raises(DataError) as caught:
        plan_windows(2047, 2048, 64)
    assert "2047 targets" in str(caught.value)
    assert "EVAL_SEQ_LEN 2048" in str(caught.value)


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_a_stride_that_would_skip_targets(stride):
    with pytest.raises(ValueError, match=rf"stride is {stride}.*between 1 and.*4"):
        plan_windows(10, 4, stride)
