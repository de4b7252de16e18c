from __future__ import annotations

import json

import pytest
from starting import flags

from bench import losses


@pytest.fixture
def options(tiny_options) -> list[str]:
    unwanted = {"run_id", "runs_dir", "iterations", "max_wallclock_seconds", "train_log_every"}
    return flags({name: value for name, value in tiny_options.items() if name not in unwanted})


def test_ways_are_set_beside_the_first(options, tmp_path, capsys):
    beside = ["--beside", "GOLF_KERNELS=reference", "--beside", "GRAD_CLIP_NORM=0.01,MATRIX_LR=0.2"]
    assert losses.main([*options, "--steps", "6", "--output", str(tmp_path), *beside]) == 0
    content = json.loads((tmp_path / "losses.json").read_text())
    ours, same, other = content["ways"].values()
    assert list(content["ways"]) == ["as it is", "GOLF_KERNELS=reference", "GRAD_CLIP_NORM=0.01,MATRIX_LR=0.2"]
    assert len(ours["losses"]) == 6
    assert (ours["rms_apart"], ours["most_apart"]) == (0, 0)
    assert same["losses"] == ours["losses"], "on a CPU both are the definitions"
    assert other["losses"][0] == ours["losses"][0], "the first loss is before any step"
    apart = [mine / theirs - 1 for mine, theirs in zip(other["losses"], ours["losses"], strict=True)]
    assert other["most_apart"] == pytest.approx(max(map(abs, apart)))
    assert 0 < other["rms_apart"] < other["most_apart"]
    assert other["mean_of_last"] == other["losses"][-1]
    page = capsys.readouterr().out
    assert f"| {ours['losses'][0]:.4f} |" in page
    assert "step 6" in page


def test_the_kernels_that_are_named_are_those_that_run(tiny_config):
    with pytest.raises(RuntimeError, match=r"GOLF_KERNELS=triton, but .* was given a tensor on cpu"):
        losses.losses(tiny_config, "triton")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beside", "GOLF_KERNELS"], "--beside is 'GOLF_KERNELS': must be NAME=VALUE"),
        (["--beside", "GOLF_KERNELS=fast"], "GOLF_KERNELS=fast: must be one of auto"),
        (["--beside", "NO_SUCH=1"], "unknown option --no-such"),
        (["--steps", "0"], "--steps is 0: must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_an_error(options, tmp_path, capsys, arguments, said):
    assert losses.main([*options, "--output", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
