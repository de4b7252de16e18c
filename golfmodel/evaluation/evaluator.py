"""The two ways in which a run scores a text: windows side by side, and a sliding window."""

from __future__ import annotations

from golfmodel.evaluation.score import Score, Text, TokenLosses, score_text
from golfmodel.evaluation.windows import plan_windows
from golfmodel.runtime.distributed import Ranks


class Evaluator:
    """Scores one text again and again, always over every target.

    Args:
        text: what to score.
        ranks: who takes part.
        length: targets a window (`EVAL_SEQ_LEN`).
        stride: new targets a sliding window (`EVAL_STRIDE`); 0 when there is no sliding score.
        batch_tokens: tokens at a time over all ranks (`VAL_BATCH_SIZE`).

    Raises:
        DataError: the text is shorter than a window.
    """

    def __init__(self, text: Text, ranks: Ranks, *, length: int, stride: int, batch_tokens: int) -> None:
        self._text, self._ranks, self._batch_tokens = text, ranks, batch_tokens
        num_targets = len(text.tokens) - 1
        self._side_by_side = plan_windows(num_targets, length, length)
        self._sliding = plan_windows(num_targets, length, stride) if stride else None

    def side_by_side(self, token_losses: TokenLosses, label: str = "scoring") -> Score:
        """Windows that do not overlap, but for the last: each target sees what is before it in its window."""
        return score_text(
            token_losses, self._text, self._side_by_side, self._ranks, batch_tokens=self._batch_tokens, label=label
        )

    def sliding(
        self, token_losses: TokenLosses, *, prefix_targets: int = 0, label: str = "sliding window"
    ) -> Score | None:
        """Every target but the first window's sees at least `length - stride` tokens; None with stride 0."""
        if self._sliding is None:
            return None
        return score_text(
            token_losses,
            self._text,
            self._sliding,
            self._ranks,
            batch_tokens=self._batch_tokens,
            prefix_targets=prefix_targets,
            label=label,
        )
