"""The measurement of memory itself: it sees what a call takes, however large the test session is."""

import pytest
from peak_memory import peak_growth


@pytest.mark.parametrize("mebibytes", [0, 8, 64])
def test_what_a_call_takes_is_what_is_measured(mebibytes):
    growth, said = peak_growth("", f"bytearray(b'x') * {mebibytes * 2**20}")
    assert said == "no error"
    assert mebibytes - 1 < growth / 2**20 < mebibytes + 2


def test_a_golf_error_is_said_and_any_other_fails():
    raising = "from golfmodel.runtime.errors import DataError"
    assert peak_growth(raising, "raise DataError('damaged file')")[1] == "damaged file"
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        peak_growth("", "1 / 0")
