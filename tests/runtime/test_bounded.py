"""What may be read whole: regular files within a limit, of the size they had when they were opened."""

from pathlib import Path

import pytest

from golfmodel.runtime.bounded import read_bounded
from golfmodel.runtime.errors import ArtifactError, DataError


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"12345"):
        path.write_bytes(content)
        assert read_bounded(path, 5, "a thing", DataError) == content
    path.write_bytes(b"123456")
    with pytest.raises(DataError, match=r"file: 6 bytes; a thing has at most 5$"):
        read_bounded(path, 5, "a thing", DataError)


@pytest.mark.parametrize("error", [DataError, ArtifactError])
def test_what_cannot_be_read_is_the_callers_error(tmp_path, error):
    with pytest.raises(error, match=r"gone: cannot read a thing: No such file or directory$"):
        read_bounded(tmp_path / "gone", 5, "a thing", error)
    with pytest.raises(error, match=r"cannot read a thing: .*null"):
        read_bounded("nul\0", 5, "a thing", error)
    with pytest.raises(error, match=r"not a file; expected a thing$"):
        read_bounded(tmp_path, 5, "a thing", error)


def test_a_file_that_grows_meanwhile_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    measure = Path.stat

    def grow(self: Path):
        measured = measure(self)
        with self.open("ab") as file:
            file.write(b"more")
        return measured

    monkeypatch.setattr(Path, "stat", grow)
    with pytest.raises(DataError, match="file: grew beyond 4 bytes while it was read; expected a thing"):
        read_bounded(path, 100, "a thing", DataError)
