from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench import peer
from bench.watched_run import MARKER, Run
from golfmodel.data.shards import find_shards, open_shard, write_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.versions import PROJECT_ROOT

# A script that prints what the challenge's scripts print, faster. Its step takes STEP_MS by its own clock.
SCRIPT = """\
import json, os, sys, time
from pathlib import Path

last, every = int(os.environ["ITERATIONS"]), int(os.environ["TRAIN_LOG_EVERY"])
{extra}
for step in (1, *range(every, last + 1, every)):
    print(f"step:{{step}}/{{last}} train_loss:3.1 train_time:{{1000 + float(os.environ['STEP_MS']) * step}}ms")
time.sleep(60)  # scoring
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes the script above, with some lines more, and returns its path."""
    monkeypatch.setenv("STEP_MS", "7.5")

    def write(extra: str = "", name: str = "record/train_gpt.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SCRIPT.format(extra=extra))
        return path

    return write


@pytest.fixture
def corpus(demo_corpus, tmp_path):
    """The options that name a corpus of a few tokens."""
    for split in ("train", "val"):
        tokens = open_shard(find_shards(demo_corpus, split)[0])[:5000]
        write_shard(tmp_path / "shards" / f"fineweb_{split}_000000.bin", tokens)
    return [f"--data-path={tmp_path / 'shards'}", f"--tokenizer-path={demo_corpus / 'demo_1024_bpe.model'}"]


@pytest.fixture
def ours(script, monkeypatch):
    """Puts such a script into the place of ours."""

    def place(extra: str = "") -> Path:
        path = script(extra, "ours/train.py")
        monkeypatch.setattr(peer, "OUR_SCRIPT", path)
        return path

    return place


@pytest.fixture
def complaint(capsys):
    """Runs the front door, which must refuse, and returns what it says."""

    def run(*arguments: str) -> str:
        assert peer.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return run


def marked_by(pid: int) -> list[str]:
    """The processes that the comparison in process `pid` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARKER}={pid}-".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_contenders_alternate_in_who_goes_first():
    order = [(number, each) for number, each in peer.interleaved(["ours", "peer", "third"], 3)]
    assert order == [
        *((0, "ours"), (0, "peer"), (0, "third")),
        *((1, "third"), (1, "peer"), (1, "ours")),
        *((2, "ours"), (2, "peer"), (2, "third")),
    ]


def test_figures_table_and_json(script, ours, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ours()
    out = tmp_path / "out.json"
    status = peer.main(
        [
            *(f"--script={script()}", *corpus, "--env=TRAIN_BATCH_TOKENS=4096", "--env=TRAIN_SEQ_LEN=512"),
            *("--peer-env=STEP_MS=15", "--reference", f"--output={out}"),
        ]
    )
    printed = capsys.readouterr()
    assert status == 0
    assert "| ours | 7.50 (7.50 to 7.50) | 546,133 |" in printed.out
    assert "| record/train_gpt.py | 15.00 (15.00 to 15.00) | 273,067 |" in printed.out
    assert printed.out.count("not measured") == 3
    assert "ours is 2.00 times as fast per step as record/train_gpt.py" in printed.out
    assert "ours is 1.00 times as fast per step as ours, GOLF_KERNELS=reference" in printed.out
    assert "torch " in printed.out
    assert "no claim" not in printed.out
    result = json.loads(out.read_text())
    names = ["ours", "record/train_gpt.py", "ours, GOLF_KERNELS=reference"]
    assert [(run["round"], run["contender"]) for run in result["runs"]] == [
        *((0, name) for name in names),
        *((1, name) for name in reversed(names)),
    ]
    assert {run["clock"] for run in result["runs"]} == {"train_ms"}
    assert {(run["first_step"], run["last_step"]) for run in result["runs"]} == {(1, 80)}
    assert all(0 < run["first_step_seconds"] < 20 for run in result["runs"])
    assert result["summary"]["ours"]["ms_per_step"] == 7.5
    assert result["environment"]["record/train_gpt.py"] == {
        "ITERATIONS": "80",
        "MAX_WALLCLOCK_SECONDS": "0",
        "VAL_LOSS_EVERY": "0",
        "WARMDOWN_ITERS": "0",
        "TRAIN_LOG_EVERY": "20",
        "TRAIN_BATCH_TOKENS": "4096",
        "TRAIN_SEQ_LEN": "512",
        "VOCAB_SIZE": "1024",
        "STEP_MS": "15",
    }
    assert result["environment"]["ours, GOLF_KERNELS=reference"]["GOLF_KERNELS"] == "reference"
    assert "STEP_MS" not in result["environment"]["ours"]
    assert result["versions"]["torch"]


def test_what_scripts_see(script, ours, corpus, tmp_path, monkeypatch):
    """Each run has a directory of its own outside the checkout; caches are kept from a contender's run to its next."""
    monkeypatch.setenv("TRAIN_SEQ_LEN", "256")
    monkeypatch.setenv("DUMP", str(tmp_path))
    seen = "{**os.environ, 'script': __file__, 'directory': os.getcwd()}"
    dump = f"Path(os.environ['DUMP'], str(time.time_ns()) + '.seen').write_text(json.dumps({seen}))"
    their_script, our_script = script(dump), ours(dump)
    out = tmp_path / "out.json"
    arguments = [f"--script={their_script}", *corpus, "--steps=45", "--env=TRAIN_BATCH_TOKENS=4096", f"--output={out}"]
    assert peer.main(arguments) == 0
    told = json.loads(out.read_text())["environment"]
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.seen"))]
    assert [run["script"] for run in runs] == [str(each) for each in (our_script, *[their_script] * 2, our_script)]
    assert len({run["directory"] for run in runs}) == 4
    for run in runs:
        name = "ours" if run["script"] == str(our_script) else "record/train_gpt.py"
        assert told[name].items() <= run.items()
        assert (run["ITERATIONS"], run["TRAIN_BATCH_TOKENS"], run["TRAIN_SEQ_LEN"]) == ("80", "4096", "256")
        assert not Path(run["directory"]).is_relative_to(PROJECT_ROOT)
        assert not Path(run["directory"]).exists()
        shard = find_shards(run["DATA_PATH"], "train")[0]
        assert (shard.name, len(open_shard(shard))) == ("fineweb_train_000000.bin", 5000)
    caches = {(run["script"], run["TORCHINDUCTOR_CACHE_DIR"], run["TRITON_CACHE_DIR"]) for run in runs}
    assert len(caches) == len({cache for _, *both in caches for cache in both}) // 2 == 2


def test_random_tokens(tmp_path):
    data_path = tmp_path / "data"
    tokenizer = Tokenizer(peer.synthetic_corpus(data_path, 200_000), 1024)
    assert sorted(path.name for path in data_path.glob("*.bin")) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    tokens = open_shard(data_path / "fineweb_train_000000.bin")
    assert len(tokens) == 200_001
    assert tokens.max() < 1024
    assert 10 < (tokens == tokenizer.bos_id).sum() < 100
    assert (open_shard(data_path / "fineweb_val_000000.bin")[:1000] != tokens[:1000]).any()


def test_ended_from_outside_it_ends_the_script(script, corpus):
    command = [sys.executable, "-m", "bench.peer", f"--script={script()}", *corpus]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (children := marked_by(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert children
    assert process.returncode == 130
    assert said == "interrupted\n"
    assert not marked_by(process.pid)


def test_a_script_that_takes_no_step_ends_the_comparison(script, ours, corpus, complaint):
    ours()
    said = complaint(f"--script={script('sys.exit(3)')}", *corpus)
    assert "round 1, ours: 7.50 ms/step" in said
    assert "error: record/train_gpt.py ended with exit status 3 before its first step" in said


def test_a_run_that_is_cut_short_supports_no_claim(script, ours, corpus, capsys):
    ours()
    path = script("print('step:20/80 train_loss:3.1'); sys.exit(3)")
    assert peer.main([f"--script={path}", *corpus, "--rounds=1"]) == 1
    printed = capsys.readouterr().out
    assert "| ours | 7.50 (7.50 to 7.50) |" in printed
    assert "| record/train_gpt.py | cut short |" in printed
    assert "round 1, record/train_gpt.py: ended with exit status 3 after step 20 of 80" in printed
    assert "no claim" in printed
    assert "times as fast" not in printed


def a_run(**changes) -> Run:
    """One that went as it should."""
    figures = {"ms_per_step": 50.0, "clock": "train_ms", "ms_per_step_by_arrival": 50.0, "peak_memory_bytes": 2 * 10**9}
    steps = {"first_step": 1, "first_step_seconds": 30.0, "last_step": 80}
    return Run(**{"contender": "peer", "round": 0, **figures, **steps, "problem": None, "last_output": (), **changes})


def test_figures_over_rounds():
    rounds = [
        a_run(ms_per_step=pace, first_step_seconds=wait, peak_memory_bytes=peak)
        for pace, wait, peak in ((52.0, 30.0, 1), (50.0, 5.0, 3), (57.0, 7.0, 2))
    ]
    assert peer.summarize(rounds, 5200) == {
        "peer": {
            "ms_per_step": 52.0,
            "ms_per_step_min": 50.0,
            "ms_per_step_max": 57.0,
            "tokens_per_second": 100_000.0,
            "first_step_seconds_cold": 30.0,
            "first_step_seconds_warm": 6.0,
            "peak_memory_bytes": 3,
        }
    }
    cut_short = a_run(ms_per_step=None, peak_memory_bytes=None, problem="ended")
    figures = peer.summarize([*rounds, cut_short], 5200)["peer"]
    assert (figures["ms_per_step"], figures["tokens_per_second"], figures["peak_memory_bytes"]) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"first_step": 20}, "its first line was about step 20"),
        ({"clock": "arrival_ms"}, "it prints no training time in ms: timed by when its lines came"),
        ({"ms_per_step_by_arrival": 52.0}, "by when its lines came, 52.00 ms/step"),
        ({"ms_per_step_by_arrival": 51.0}, None),
        ({"ms_per_step_by_arrival": None}, None),
    ],
)
def test_what_a_reader_must_know_of_a_run(changes, remark):
    runs = [a_run(), a_run(round=1, **changes)]
    about = {"rounds": 2, "steps": 60, "warm_up_steps": 20, "batch_tokens": 4096, "train_seq_len": 512, "nproc": 1}
    found = {"summary": peer.summarize(runs, 4096), "runs": [vars(run) for run in runs], "data": "synthetic"}
    page = peer.report({**about, **found, "versions": {"torch": "2"}})
    assert "| peer | 50.00 (50.00 to 50.00) | 81,920 | 30.0, then 30.0 | 2.00 |" in page
    remarks = [line for line in page.splitlines() if line.startswith("round ")]
    assert remarks == ([] if remark is None else [f"round 2, peer: {remark}"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--script=nowhere/train_gpt.py"], "--script is nowhere/train_gpt.py: no such file"),
        (["--env=NUM_LAYERS"], "--env is 'NUM_LAYERS': must be NAME=VALUE"),
        (["--peer-env==8"], "--peer-env is '=8': must be NAME=VALUE"),
        (["--our-env=NUM LAYERS=8"], "--our-env is 'NUM LAYERS=8': must be NAME=VALUE"),
        (["--env=DATA_PATH=/data"], "--env sets DATA_PATH: use --data-path"),
        (["--peer-env=TRAIN_BATCH_TOKENS=4096"], "must be the same for all: use --env"),
        (["--env=TRAIN_BATCH_TOKENS=many"], "TRAIN_BATCH_TOKENS (--train-batch-tokens) is 'many'"),
        (["--nproc=5"], "which 5 ranks do not divide"),
        (["--env=ITERATIONS=79"], "ITERATIONS of ours is '79': must be at least 80"),
        (["--peer-env=ITERATIONS=many"], "ITERATIONS of record/train_gpt.py is 'many'"),
        (["--steps=0"], "--steps is 0: must be above 0"),
        (["--timeout=nan"], "--timeout is nan: must be above 0"),
        (["--data-path=nowhere"], "--data-path and --tokenizer-path belong together"),
        (["--data-path=nowhere", "--tokenizer-path=nowhere"], "--tokenizer-path is nowhere: no such file"),
        (["--env=VOCAB_SIZE=512"], "VOCAB_SIZE is 512: random tokens have 1024 pieces"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(changes, said, script, complaint, monkeypatch):
    monkeypatch.setattr(peer, "run_once", None)
    assert said in complaint(f"--script={script()}", *changes)


def test_shards_that_scripts_would_not_find_are_refused(script, tiny_corpus, demo_corpus, complaint):
    tokenizer = demo_corpus / "demo_1024_bpe.model"
    said = complaint(f"--script={script()}", f"--data-path={tiny_corpus}", f"--tokenizer-path={tokenizer}")
    assert "no fineweb_train_*.bin" in said


def test_ours_beside_a_script(script, tiny_options, tmp_path, capsys):
    """Our own script, as it is, on random tokens."""
    told = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "bigram_vocab_size", "bigram_dim", "compute_dtype")
    sizes = ("train_seq_len", "train_batch_tokens", "micro_batch_tokens", "eval_seq_len", "warmup_steps", "device")
    settings = [f"--env={name.upper()}={tiny_options[name]}" for name in (*told, *sizes)]
    settings.append("--env=OMP_NUM_THREADS=1")  # two threads wait for each other wherever other tests run beside them
    counts = ("--rounds=1", "--steps=10", "--warm-up-steps=10")
    out = tmp_path / "out.json"
    assert peer.main([f"--script={script()}", *settings, *counts, f"--output={out}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    ours, theirs = result["runs"]
    assert (ours["contender"], ours["clock"], ours["first_step"], ours["last_step"]) == ("ours", "train_ms", 1, 20)
    assert ours["ms_per_step_by_arrival"] > 0
    assert theirs["ms_per_step"] == 7.5
    assert result["summary"]["ours"]["tokens_per_second"] == pytest.approx(512e3 / ours["ms_per_step"])
    assert f"ours is {7.5 / ours['ms_per_step']:.2f} times as fast per step as record/train_gpt.py" in printed
