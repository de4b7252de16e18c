from __future__ import annotations

import importlib.util
import json

import pytest

from golfmodel import report
from golfmodel.runtime.runlog import RunLog

SUMMARY = {
    "val_bpb": 1.25,
    "val_bpb_training": 1.3,
    "val_bpb_averaged": 1.29,
    "val_bpb_int6": 1.31,
    "val_bpb_with_prefix": None,
    "artifact_bytes_by_part": {"attention": 1000, "mlp": 2000},
    "code_bytes": 500,
    "prefix_bytes": 0,
    "total_bytes": 3500,
    "limit_bytes": 16_000_000,
    "eligible": True,
    "not_eligible_because": [],
    "train_seconds": 60.0,
    "steps": 100,
    "tokens_per_second": 1234567.0,
    "world_size": 1,
    "versions": {"gpu": None},
}


@pytest.fixture
def run_directory(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.event(
                "train", step=step, train_loss=5 - step / 2, lr_scale=1.0, train_seconds=step, tokens_per_second=100.0
            )
        log.event("validation", step=3, val_bpb_training=1.5, train_seconds=3.0)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def test_the_text_names_every_score_and_the_bytes():
    text = report.describe(SUMMARY)
    for shown in ("1.2500", "1.3000", "1.2900", "1.3100", "3,500 of 16,000,000", "100 in 60.0 s", "1,234,567", "yes"):
        assert shown in text
    assert "prefix (not" not in text


def test_the_text_says_why_a_run_is_not_eligible():
    broken = {**SUMMARY, "eligible": False, "not_eligible_because": ["too large", "late"], "val_bpb_with_prefix": 1.1}
    text = report.describe({**broken, "val_bpb": None})
    assert "no: too large; late" in text
    assert "1.1000" in text
    assert "none" in text


def test_the_picture_holds_the_logged_curves(run_directory, monkeypatch):
    from matplotlib import pyplot  # noqa: PLC0415

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    path = report.draw(run_directory)
    assert path == str(run_directory / "report.png")
    assert (run_directory / "report.png").read_bytes().startswith(b"\x89PNG")
    loss, bpb, *_ = figures[0].axes
    assert list(loss.lines[0].get_ydata()) == [4.5, 4.0, 3.5, 3.0, 2.5]
    assert list(bpb.lines[0].get_ydata()) == [1.5, 1.3]


def test_a_picture_that_cannot_be_drawn_is_no_error(run_directory):
    (run_directory / "summary.json").write_text("{}")
    assert report.draw(run_directory).startswith("not drawn, KeyError")


def test_no_picture_without_matplotlib(run_directory, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "matplotlib is missing" in report.draw(run_directory)
    assert not (run_directory / "report.png").exists()
