from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench import peer
from golfmodel.data.shards import find_shards, open_shard, write_shard
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.runtime.versions import PROJECT_ROOT

# A script that prints what the challenge's scripts print, faster. Its step takes STEP_MS by its own clock; `extra` goes
# before the steps, where `last`, `every` and `say` are known.
SCRIPT = """\
import json, os, subprocess, sys, time
from pathlib import Path

last, every = int(os.environ["ITERATIONS"]), int(os.environ["TRAIN_LOG_EVERY"])
step_ms = float(os.environ.get("STEP_MS", 7.5))

def say(step, what="train"):
    ms = 1000 + step_ms * step
    print(f"step:{{step}}/{{last}} {{what}}_loss:3.1 train_time:{{ms:.0f}}ms step_avg:{{ms / max(step, 1):.2f}}ms")

print("logs/run.txt")
print("warmup_step:1/20")
{extra}
for step in range(1, last + 1):
    if step <= 10 or step % every == 0:
        say(step)
say(last, "val")
time.sleep(60)  # scoring
"""

DUMP = """
dumped = {"environment": dict(os.environ), "directory": os.getcwd(), "path": sys.path}
Path(os.environ["DUMP"]).write_text(json.dumps(dumped))
"""


@pytest.fixture
def script(tmp_path):
    """Writes the script above, with some lines more, and returns its path."""

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
        progress, error, said = printed.err.partition("error: ")
        assert error
        assert all(line.startswith("round ") for line in progress.splitlines())
        return said

    return run


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def marked_by(pid: int) -> list[str]:
    """The processes that the comparison in process `pid` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{peer.MARKER}={pid}-".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("text", "step", "train_ms"),
    [
        ("step:20/200 train_loss:3.1 train_time:1720ms step_avg:86.01ms", 20, 1720),
        ("step:20/200 train_loss:3.1000 lr_scale:1.000 train_time:1720ms step_avg:86.01ms tok/s:9,143", 20, 1720),
        ("step:20/200 train_loss:3.1 step_avg:86.01ms\n", 20, 1720.2),
        ("  step:20/200 loss:3.1 t:1720.5ms avg:86.0ms", 20, 1720.5),
        ("step 20/200 loss: 3.1 time: 1720 ms", 20, 1720),
        ("20/20000 train_loss: 3.1 train_time: 0.1m tok/s: 8100000", 20, None),
        ("step:20/200 loss:3.1", 20, None),
    ],
)
def test_lines_about_steps(text, step, train_ms):
    line = peer.parse_step_line(text, 12.0)
    assert (line.step, line.arrival_ms, line.validation) == (step, 12.0, False)
    assert line.train_ms == (None if train_ms is None else pytest.approx(train_ms))


def test_a_validation_line():
    line = peer.parse_step_line("step:20/200 val_loss:3.1 val_bpb:1.9 train_time:1720ms step_avg:86.01ms")
    assert (line.step, line.validation) == (20, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "warmup_step:3/20",
        "warmup_step:3/20 train_loss:3.1",
        "stopping_early: wallclock_cap train_time:600000ms step:20/200",
        "final_int8_zlib_roundtrip val_loss:3.1 val_bpb:1.9 eval_time:900ms",
        "train_batch_tokens:524288 train_seq_len:1024 iterations:20000",
        "training: 20/200 steps in 1.7s loss:3.1",
    ],
)
def test_other_lines(text):
    assert peer.parse_step_line(text) is None


def lines_of(*points: tuple[int, float | None]) -> list[peer.StepLine]:
    """Lines that come 40 ms a step apart."""
    return [peer.StepLine(step, 40.0 * step, train_ms, validation=False) for step, train_ms in points]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (lines_of((1, 900), (10, 1000), (20, 1500), (40, 2500), (80, 5100)), 60.0),
        (lines_of((19, 1490), (25, 1500), (50, 4000)), 100.0),  # on beats of its own
        (lines_of((1, 900), (10, 1000), (80, 5100)), None),
        ([], None),
    ],
)
def test_time_per_step_is_from_the_first_line_after_the_warm_up_to_the_last(lines, expected):
    assert peer.ms_per_step(lines, 20, "train_ms") == expected


def test_time_per_step_leaves_validation_lines_out():
    late = peer.StepLine(80, 9e9, 9e9, validation=True)
    assert peer.ms_per_step([*lines_of((20, 1500), (60, 3500)), late], 20, "train_ms") == 50.0


def test_time_per_step_by_arrival():
    lines = lines_of((20, None), (80, None))
    assert peer.ms_per_step(lines, 20, "train_ms") is None
    assert peer.ms_per_step(lines, 20, "arrival_ms") == 40.0


def test_contenders_alternate_in_who_goes_first():
    order = [(number, each) for number, each in peer.interleaved(["ours", "peer", "third"], 3)]
    assert order == [
        *((0, "ours"), (0, "peer"), (0, "third")),
        *((1, "third"), (1, "peer"), (1, "ours")),
        *((2, "ours"), (2, "peer"), (2, "third")),
    ]


def test_the_import_path_loses_this_checkout_only():
    here, other = str(PROJECT_ROOT), "/opt/site"
    cleaned = peer.clean_environment({"PYTHONPATH": os.pathsep.join([here, other, f"{here}/"]), "HOME": "/root"})
    assert cleaned == {"PYTHONPATH": other, "HOME": "/root"}
    assert peer.clean_environment({"PYTHONPATH": here}) == {}


def test_figures_table_and_json(script, ours, corpus, tmp_path, capsys):
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
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    monkeypatch.setenv("UNRELATED", "kept")
    monkeypatch.setenv("TRAIN_SEQ_LEN", "256")
    ours("os.environ['DUMP'] += '-ours'\n" + DUMP)
    number = itertools.count()
    run_once = peer.run_once
    seen: list[tuple[str, dict]] = []

    def run_and_read(contender, *arguments, **options):
        dump = tmp_path / f"dump-{next(number)}"
        monkeypatch.setenv("DUMP", str(dump))
        run = run_once(contender, *arguments, **options)
        written = Path(f"{dump}-ours" if contender.name == "ours" else dump)
        seen.append((contender.name, json.loads(written.read_text())))
        return run

    monkeypatch.setattr(peer, "run_once", run_and_read)
    assert peer.main([f"--script={script(DUMP)}", *corpus, "--steps=45", "--env=TRAIN_BATCH_TOKENS=4096"]) == 0
    assert [name for name, _ in seen] == ["ours", "record/train_gpt.py", "record/train_gpt.py", "ours"]
    assert len({dumped["directory"] for _, dumped in seen}) == 4
    for _, dumped in seen:
        environment = dumped["environment"]
        assert environment["UNRELATED"] == "kept"
        assert environment["ITERATIONS"] == "80"
        assert (environment["TRAIN_BATCH_TOKENS"], environment["TRAIN_SEQ_LEN"]) == ("4096", "256")
        assert environment["VOCAB_SIZE"] == "1024"
        assert str(PROJECT_ROOT) not in [environment.get("PYTHONPATH"), *dumped["path"]]
        assert not Path(dumped["directory"]).is_relative_to(PROJECT_ROOT)
        assert environment["RUNS_DIR"].startswith(dumped["directory"])
        assert not Path(dumped["directory"]).exists()
        shard = find_shards(environment["DATA_PATH"], "train")[0]
        assert (shard.name, len(open_shard(shard))) == ("fineweb_train_000000.bin", 5000)
    caches = {(name, dumped["environment"]["TORCHINDUCTOR_CACHE_DIR"]) for name, dumped in seen}
    assert len(caches) == len({cache for _, cache in caches}) == 2


def test_random_tokens(tmp_path):
    data_path, tokenizer_path = peer.synthetic_corpus(tmp_path / "data", 200_000)
    assert sorted(path.name for path in data_path.glob("*.bin")) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    tokenizer = Tokenizer(tokenizer_path, 1024)
    tokens = open_shard(data_path / "fineweb_train_000000.bin")
    assert len(tokens) == 200_001
    assert tokens.max() < 1024
    assert 10 < (tokens == tokenizer.bos_id).sum() < 100
    assert (open_shard(data_path / "fineweb_val_000000.bin")[:1000] != tokens[:1000]).any()


@pytest.mark.parametrize("obeys", [True, False])
def test_nothing_is_left_behind(obeys, script, ours, corpus, tmp_path, monkeypatch):
    """Not even a child in a session of its own, as torchrun's workers are, or one that ignores SIGTERM."""
    monkeypatch.setattr(peer, "GRACE_SECONDS", 2.0 if obeys else 0.2)
    ours()
    deaf = "" if obeys else "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    extra = f"""
child = [sys.executable, "-c", "{deaf}import time; print(0, flush=True); time.sleep(60)"]
child = subprocess.Popen(child, start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
Path("{tmp_path}/pids").write_text(f"{{os.getpid()}} {{child.pid}}")
"""
    assert peer.main([f"--script={script(extra)}", *corpus, "--rounds=1"]) == 0
    pids = [int(text) for text in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


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


def test_a_script_that_dies_before_its_first_step(script, ours, corpus, complaint):
    ours()
    path = script("print('about to fail'); raise RuntimeError('no such kernel')")
    said = complaint(f"--script={path}", *corpus, "--rounds=1")
    assert "record/train_gpt.py ended with exit status 1 before its first step" in said
    assert "about to fail" in said
    assert "RuntimeError: no such kernel" in said


@pytest.mark.parametrize(
    "extra", ["print('compiling'); time.sleep(60)", "print('compiling'); os.close(1); time.sleep(60)"]
)
def test_a_script_that_never_takes_a_step(extra, script, ours, corpus, monkeypatch, capsys):
    ours()
    started = time.monotonic()
    assert peer.main([f"--script={script(extra)}", *corpus, "--rounds=1", "--timeout=1"]) == 2
    said = capsys.readouterr().err
    assert "record/train_gpt.py printed no step line for 1 s (--timeout) before its first step" in said
    assert "compiling" in said
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("say(1); say(20); print('out of memory'); sys.exit(3)", "ended with exit status 3 after step 20 of 80"),
        ("say(1); say(40); time.sleep(60)", "printed no step line for 1 s (--timeout) after step 40 of 80"),
        ("say(1); say(80); time.sleep(60)", "printed no two lines about training steps 20 to 80"),
    ],
)
def test_a_run_that_is_cut_short_supports_no_claim(extra, problem, script, ours, corpus, tmp_path, capsys):
    ours()
    out = tmp_path / "out.json"
    status = peer.main([f"--script={script(extra)}", *corpus, "--rounds=1", "--timeout=1", f"--output={out}"])
    printed = capsys.readouterr()
    assert status == 1
    assert "| record/train_gpt.py | cut short |" in printed.out
    assert f"round 1, record/train_gpt.py: {problem}" in printed.out
    assert "no claim" in printed.out
    assert "times as fast" not in printed.out
    ours_run, theirs = json.loads(out.read_text())["runs"]
    assert (ours_run["problem"], ours_run["last_output"], ours_run["ms_per_step"]) == (None, [], 7.5)
    assert (theirs["problem"], theirs["ms_per_step"]) == (problem, None)
    assert any("say" in extra and line.startswith("step:") for line in theirs["last_output"])


def test_a_script_without_training_times(script, ours, corpus, tmp_path, capsys):
    ours()
    extra = (
        "for step in (1, 20, 40, 80):\n    time.sleep(0.1)\n"
        "    print(f'{step}/{last} train_loss: 3.1 train_time: 0.0m')\ntime.sleep(60)\n"
    )
    out = tmp_path / "out.json"
    assert peer.main([f"--script={script(extra)}", *corpus, "--rounds=1", f"--output={out}"]) == 0
    run = json.loads(out.read_text())["runs"][1]
    assert run["clock"] == "arrival_ms"
    assert 200 / 60 <= run["ms_per_step"] < 1000 / 60
    assert "timed by when its lines came" in capsys.readouterr().out


def test_another_batch_is_not_compared(script, ours, corpus, complaint):
    ours()
    path = script("print('train_batch_tokens:524288 train_seq_len:1024')")
    said = complaint(f"--script={path}", *corpus)
    assert "trains on 524288 tokens a step where TRAIN_BATCH_TOKENS is 786432" in said


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


def test_memory_is_the_peak_over_what_was_in_use_before(tmp_path, monkeypatch):
    """On the GPU where that is most, until it is stopped."""
    used, calls = tmp_path / "used", tmp_path / "calls"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncat {used}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(peer, "MEMORY_POLL_SECONDS", 0.01)

    def set_used(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(used)
        seen = len(calls.read_text().splitlines()) if calls.exists() else 0
        while watching and len(calls.read_text().splitlines()) < seen + 3:
            time.sleep(0.01)

    watching = False
    set_used("700\n900\n")
    memory = peer.MemoryWatch(["0", "1"])
    watching = True
    for text in ("600\n900\n", "5000\n5000\n", "[N/A]\n", "2000\n2000\n"):
        set_used(text)
    memory.stop()
    watching = False
    set_used("9000\n9000\n")
    time.sleep(0.1)
    assert memory.peak_bytes == 4400 * 2**20
    expected = "--query-gpu=memory.used --format=csv,noheader,nounits -i 0,1"
    assert set(calls.read_text().splitlines()) == {expected}


def test_torchrun_starts_the_ranks(script, tmp_path):
    extra = (
        f"Path({str(tmp_path)!r}, 'rank-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "if os.environ['RANK'] != '0': time.sleep(60)\n"
    )
    contender = peer.Contender(
        "two ranks", peer.command_of(script(extra), 2), {"ITERATIONS": "80", "TRAIN_LOG_EVERY": "20"}
    )
    run = peer.run_once(contender, 0, tmp_path / "run", batch_tokens=1, warm_up=20, last_step=80, gpus=[], timeout=60.0)
    assert (run.ms_per_step, run.problem, run.peak_memory_bytes) == (7.5, None, None)
    pids = [int(path.read_text()) for path in sorted(tmp_path.glob("rank-*"))]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_ours_beside_a_script(script, tiny_options, tmp_path, capsys):
    """Our own script, as it is, on random tokens."""
    told = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "bigram_vocab_size", "bigram_dim", "compute_dtype")
    sizes = ("train_seq_len", "train_batch_tokens", "micro_batch_tokens", "eval_seq_len", "warmup_steps", "device")
    settings = [f"--env={name.upper()}={tiny_options[name]}" for name in (*told, *sizes)]
    out = tmp_path / "out.json"
    assert peer.main([f"--script={script()}", *settings, "--rounds=1", "--steps=20", f"--output={out}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    ours, theirs = result["runs"]
    assert (ours["contender"], ours["clock"], ours["first_step"], ours["last_step"]) == ("ours", "train_ms", 1, 40)
    assert ours["ms_per_step"] == pytest.approx(ours["ms_per_step_by_arrival"], rel=0.5)
    assert theirs["ms_per_step"] == 7.5
    assert result["summary"]["ours"]["tokens_per_second"] == pytest.approx(512e3 / ours["ms_per_step"])
    assert f"ours is {7.5 / ours['ms_per_step']:.2f} times as fast per step as record/train_gpt.py" in printed
