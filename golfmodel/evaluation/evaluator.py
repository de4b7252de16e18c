"""The two ways in which a run scores a text: windows side by side, and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from golfmodel.evaluation.score import Score, Text, TokenLosses, score_text
from golfmodel.evaluation.windows import plan_windows
from golfmodel.runtime.distributed import Ranks


@dataclass(frozen=True)
class ModelScores:
    """Bits per byte of one model on one text.

    Attributes:
        side_by_side: windows that do not overlap.
        sliding: the sliding window; None with `EVAL_STRIDE` 0.
        with_prefix: the sliding window with covered targets at 0 bits; None without a paid prefix.
    """

    side_by_side: float
    sliding: float | None
    with_prefix: float | None


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

    def both(self, token_losses: TokenLosses, *, prefix_targets: int = 0) -> ModelScores:
        """Both ways, and with a paid prefix of `prefix_targets` targets where that is above 0."""
        side_by_side = self.side_by_side(token_losses, "scoring the artifact")
        sliding = self.sliding(token_losses, prefix_targets=prefix_targets)
        return ModelScores(
            side_by_side=side_by_side.bits_per_byte,
            sliding=None if sliding is None else sliding.bits_per_byte,
            with_prefix=sliding.bits_per_byte_with_prefix if sliding is not None and prefix_targets else None,
        )
