"""A file is whole or absent, whatever fails in between."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from golfmodel.runtime.errors import StorageError
from golfmodel.runtime.files import atomic_path, atomic_writer, remove_temporaries, write_bytes, write_json


def no_space(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that holds `before`."""
    path = tmp_path / "model.golf"
    path.write_bytes(b"before")
    return path


def test_writes_and_replaces(path):
    write_bytes(path, b"after")
    assert path.read_bytes() == b"after"
    assert list(path.parent.iterdir()) == [path]


def test_makes_missing_directories(tmp_path):
    write_bytes(tmp_path / "runs" / "one" / "file", b"x")
    assert (tmp_path / "runs" / "one" / "file").read_bytes() == b"x"


def test_takes_a_path_as_text(tmp_path):
    write_bytes(str(tmp_path / "file"), b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_the_old_content_stands_until_everything_is_written(path):
    with atomic_writer(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"before"
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"


def test_data_is_on_disk_before_the_name_changes(path, monkeypatch):
    contents = []
    monkeypatch.setattr(os, "fsync", lambda _handle: contents.append(path.read_bytes()))
    write_bytes(path, b"after")
    assert contents[0] == b"before"
    assert contents[1:] == [b"after"]  # the directory, so that the new name lasts too


def test_disk_full_at_the_flush_to_disk(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError) as caught:
        write_bytes(path, b"after")
    assert str(path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "unchanged" in str(caught.value)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


class FullDisk(io.FileIO):
    """A file that takes its first kilobyte only."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 1024:
            no_space()
        return super().write(data)


@pytest.mark.parametrize("size", [4 * 1024, 4 * io.DEFAULT_BUFFER_SIZE])
def test_disk_full_while_writing(path, monkeypatch, size):
    """A small write fails when the buffer is flushed, a large one at once."""
    monkeypatch.setattr(os, "fdopen", lambda handle, _mode: io.BufferedWriter(FullDisk(handle, "wb")))
    with pytest.raises(StorageError, match=r"model\.golf.*No space left"):
        write_bytes(path, b"x" * size)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_in_the_body_passes_through(path):
    with pytest.raises(ZeroDivisionError), atomic_writer(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_leaves_no_temporary_file(path):
    with pytest.raises(KeyboardInterrupt), atomic_writer(path):
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == [path]


def test_the_rename_fails(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="taken"):
        write_bytes(tmp_path / "taken", b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_file_where_a_directory_should_be(path):
    with pytest.raises(StorageError) as caught:
        write_bytes(path / "inside", b"x")
    assert str(path / "inside") in str(caught.value)
    assert path.read_bytes() == b"before"


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    write_bytes(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_readable(tmp_path):
    value = {"val_bpb": 1.0630, "val_bpb_with_prefix": None, "reasons": ["ü"]}
    write_json(tmp_path / "summary.json", value)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert '\n  "val_bpb": 1.063,' in text


def test_a_library_that_opens_files_itself_replaces_them_alike(path):
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    with pytest.raises(StorageError, match=r"model\.golf.*No space left"), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        no_space()
    assert path.read_bytes() == b"after"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_and_nothing_else(path):
    below = path.parent / "checkpoints"
    below.mkdir()
    left = [path.parent / ".model.golf.k2_x8.tmp", below / ".step-00000001.safetensors.0a.tmp"]
    others = [path, path.parent / ".hidden", below / "notes.tmp"]
    for file in (*left, *others):
        file.write_bytes(b"")
    remove_temporaries(path.parent)
    assert sorted(file for file in path.parent.rglob("*") if file.is_file()) == sorted(others)
    remove_temporaries(path.parent / "absent")
