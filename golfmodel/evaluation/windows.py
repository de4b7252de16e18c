"""Which windows of a text a score reads, and which targets each of them scores.

Target i of a text is token i + 1, predicted from the tokens up to i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from golfmodel.runtime.errors import DataError


@dataclass(frozen=True)
class Windows:
    """W windows of `length` targets each; window w scores its last `length - first[w]` targets.

    Attributes:
        start_W: the text's target that each window begins with (int64).
        first_W: the first target, within the window, that it scores (int64).
        length: targets a window.
    """

    start_W: np.ndarray
    first_W: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.start_W)


def plan_windows(num_targets: int, length: int, stride: int) -> Windows:
    """Windows that together score every target of a text exactly once.

    The first window scores all its targets, each later one starts `stride` further on and scores its last `stride`.
    The last is shifted back so that it ends with the text, and scores what is left. `stride == length` gives windows
    that do not overlap, but for the last.

    Args:
        num_targets: targets in the text, its tokens less one.
        length: targets a window.
        stride: new targets a window, in [1, length].

    Raises:
        DataError: the text is shorter than a window.
        ValueError: `stride` is out of its range.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}: must be between 1 and the window's length {length}")
    if num_targets < length:
        raise DataError(
            f"the validation text has {num_targets} targets, fewer than a window of EVAL_SEQ_LEN {length}: "
            "use a longer text or a smaller EVAL_SEQ_LEN"
        )
    later = -(-(num_targets - length) // stride)
    scored_from_W = np.concatenate(([0], length + stride * np.arange(later, dtype=np.int64)))
    end_W = np.minimum(length + stride * np.arange(later + 1, dtype=np.int64), num_targets)
    start_W = end_W - length
    return Windows(start_W, scored_from_W - start_W, length)
