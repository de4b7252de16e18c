from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from golfmodel.runtime.errors import StorageError
from golfmodel.runtime.runlog import RunLog, is_at_work, new_run_id, read_events


def test_events_are_lines_of_json_as_they_come(tmp_path):
    with RunLog(tmp_path / "runs" / "one") as log:
        log.event("start", world_size=8)
        # Another process can read it while the run goes on.
        assert json.loads(log.path.read_text())["world_size"] == 8
        log.event("train", step=1, train_loss=6.9)
    lines = (tmp_path / "runs" / "one" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "train"]
    assert events[1] == {"event": "train", "seconds": events[1]["seconds"], "step": 1, "train_loss": 6.9}
    assert 0 <= events[0]["seconds"] <= events[1]["seconds"] < 60


def test_reads_events_of_one_kind(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.event("train", step=step)
        log.event("validation", step=2)
    assert [event["step"] for event in read_events(log.path, "train")] == [0, 1, 2]
    assert [event["event"] for event in read_events(log.path)] == ["train"] * 3 + ["validation"]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("train", step=1)
    with log.path.open("a") as file:
        file.write('{"event": "train", "st')
    assert [event["step"] for event in read_events(log.path)] == [1]


def test_what_is_no_event_is_passed_over(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("train", step=1)
    with log.path.open("ab") as file:
        file.write(b"[1]\n7\n\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"event": "train", "step": 2}\n')
    assert [event["step"] for event in read_events(log.path)] == [1, 2]


def test_an_existing_run_is_refused_and_kept(tmp_path):
    with RunLog(tmp_path / "one") as log:
        log.event("start")
    before = log.path.read_bytes()
    with pytest.raises(StorageError) as caught:
        RunLog(tmp_path / "one")
    assert str(tmp_path / "one") in str(caught.value)
    assert "RUN_ID" in str(caught.value)
    assert log.path.read_bytes() == before


def test_a_run_is_gone_on_with_after_a_crash_in_the_middle_of_a_line(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("train", step=1)
    with log.path.open("a") as file:
        file.write('{"event": "train", "st')
    (tmp_path / ".model.golf.x8k2.tmp").write_bytes(b"half")
    for step in (2, 3):
        with RunLog(tmp_path, resume=True) as log:
            log.event("train", step=step)
    assert [event["step"] for event in read_events(log.path)] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [log.path]


def test_two_processes_cannot_work_on_one_run(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("train", step=1)
        assert is_at_work(tmp_path)
        with pytest.raises(StorageError, match="another process is at work"):
            RunLog(tmp_path, resume=True)
    assert not is_at_work(tmp_path)
    assert not is_at_work(tmp_path / "absent")


def test_a_run_that_failed_before_its_first_event_may_start_again(tmp_path):
    with RunLog(tmp_path / "one"):
        pass
    with RunLog(tmp_path / "one") as log:
        log.event("start")
    assert [event["event"] for event in read_events(log.path)] == ["start"]


def test_a_file_where_the_run_directory_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError) as caught:
        RunLog(tmp_path / "runs" / "one")
    assert str(tmp_path / "runs" / "one") in str(caught.value)
    assert "RUNS_DIR" in str(caught.value)


def test_other_ranks_make_and_write_nothing(tmp_path):
    with RunLog(tmp_path / "one", enabled=False) as log:
        log.event("start")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error_to_the_end(tmp_path):
    """The event fails, and closing the log, which holds the event still, must not raise something else."""
    with (
        pytest.raises(StorageError, match=r"log\.jsonl.*No space left"),
        Path("/dev/full").open("w") as full,
        RunLog(tmp_path) as log,
    ):
        os.dup2(full.fileno(), log._file.fileno())
        log.event("start")


def test_a_disk_that_fills_up_at_the_close_is_a_storage_error(tmp_path, monkeypatch):
    def no_space(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match=r"log\.jsonl.*No space left"), RunLog(tmp_path) as log:
        log.event("start")


def test_closing_twice_is_fine(tmp_path):
    log = RunLog(tmp_path)
    log.close()
    log.close()


def test_run_ids_sort_by_time_and_do_not_repeat():
    names = [new_run_id() for _ in range(50)]
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)
    assert len(set(names)) > 45
