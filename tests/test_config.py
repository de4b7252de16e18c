"""Options as RECIPE.md names them: defaults, precedence, and what happens to values that cannot be."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from golfmodel.config import PRESETS, Config, resolve
from golfmodel.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]

# Every name that RECIPE.md gives: its default, another value as a user types it, and what that means.
RECIPE = {
    "MODEL_DIM": (512, "256", 256),
    "NUM_LAYERS": (9, "8", 8),
    "NUM_HEADS": (8, "16", 16),
    "NUM_KV_HEADS": (4, "2", 2),
    "MLP_MULT": (3.0, "2.5", 2.5),
    "VOCAB_SIZE": (1024, "2048", 2048),
    "TRAIN_SEQ_LEN": (2048, "1024", 1024),
    "TIE_EMBEDDINGS": (True, "0", False),
    "BIGRAM_VOCAB_SIZE": (4096, "0", 0),
    "BIGRAM_DIM": (128, "512", 512),
    "ROPE_BASE": (10000.0, "5e4", 50000.0),
    "QK_GAIN_INIT": (1.5, "1", 1.0),
    "LOGIT_SOFTCAP": (30.0, "15", 15.0),
    "HEAD_LR": (0.008, "0.01", 0.01),
    "QAT_ENABLED": (False, "1", True),
    "MTP_NUM_HEADS": (0, "2", 2),
    "MTP_LOSS_WEIGHT": (0.2, "0.5", 0.5),
    "TIED_EMBED_INIT_STD": (0.005, "0.02", 0.02),
    "GRAD_CLIP_NORM": (0.3, "0", 0.0),
    "MATRIX_LR": (0.04, "0.025", 0.025),
    "MUON_WD": (0.02, "0.04", 0.04),
    "MUON_MOMENTUM": (0.95, "0.99", 0.99),
    "MUON_MOMENTUM_WARMUP_START": (0.85, "0.92", 0.92),
    "MUON_MOMENTUM_WARMUP_STEPS": (500, "1500", 1500),
    "MUON_BACKEND_STEPS": (5, "6", 6),
    "EMBED_LR": (0.6, "0.3", 0.3),
    "BETA1": (0.9, "0.8", 0.8),
    "BETA2": (0.95, "0.99", 0.99),
    "ADAM_EPS": (1e-8, "1e-10", 1e-10),
    "ADAM_WD": (0.01, "0.04", 0.04),
    "TIED_EMBED_LR": (0.05, "0.035", 0.035),
    "SCALAR_LR": (0.04, "0.025", 0.025),
    "ITERATIONS": (20000, "100", 100),
    "WARMDOWN_ITERS": (1200, "3000", 3000),
    "MAX_WALLCLOCK_SECONDS": (600.0, "0", 0.0),
    "WARMUP_STEPS": (20, "0", 0),
    "SWA_ENABLED": (True, "0", False),
    "SWA_EVERY": (200, "50", 50),
    "TRAIN_BATCH_TOKENS": (786_432, "98304", 98_304),
    "MICRO_BATCH_TOKENS": (98_304, "49152", 49_152),
    "VAL_LOSS_EVERY": (1000, "0", 0),
    "TRAIN_LOG_EVERY": (200, "1", 1),
    "VAL_BATCH_SIZE": (524_288, "65536", 65_536),
    "EVAL_SEQ_LEN": (2048, "1024", 1024),
    "EVAL_STRIDE": (64, "256", 256),
    "SEED": (1337, "42", 42),
    "RUN_ID": ("", "first-run", "first-run"),
    "DATA_PATH": ("./data/datasets/fineweb10B_sp1024", "/somewhere/else", "/somewhere/else"),
    "TOKENIZER_PATH": ("./data/tokenizers/fineweb_1024_bpe.model", "/a/b.model", "/a/b.model"),
    "PAID_PREFIX_FILE": ("", "prefix.bin", "prefix.bin"),
    "PAID_PREFIX_CODEC": ("lzma", "zlib", "zlib"),
}

COMMAND = """
NCCL_IB_DISABLE=1 NUM_LAYERS=8 BIGRAM_VOCAB_SIZE=2048 MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 \
TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 \
WARMDOWN_ITERS=3000 MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64 torchrun --standalone --nproc_per_node=8 train.py
"""

TYPES = {"int": int, "float": float, "bool": bool, "str": str}
OPTIONS = dataclasses.fields(Config)


def command_environment() -> dict[str, str]:
    """The variables that a shell sets for RECIPE.md's command, and those that torchrun adds."""
    variables = dict(word.split("=", 1) for word in shlex.split(COMMAND) if not word.startswith("-") and "=" in word)
    return {**variables, "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}


def flag_of(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def complaint(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(arguments, environment or {})
    return str(caught.value)


@pytest.mark.parametrize("name", RECIPE)
def test_recipe_default(name):
    value = getattr(resolve([], {}), name.lower())
    assert value == RECIPE[name][0]
    assert type(value) is type(RECIPE[name][0])


@pytest.mark.parametrize("name", RECIPE)
def test_recipe_name_works_as_environment_variable_and_as_flag(name):
    _, text, value = RECIPE[name]
    from_environment = resolve([], {name: text})
    assert getattr(from_environment, name.lower()) == value
    assert type(getattr(from_environment, name.lower())) is type(value)
    assert resolve([flag_of(name), text], {}) == from_environment
    assert resolve([f"{flag_of(name)}={text}"], {}) == from_environment
    # Nothing else moves with it.
    assert dataclasses.replace(from_environment, **{name.lower(): RECIPE[name][0]}) == Config()


def test_flag_beats_environment_beats_preset_beats_default():
    preset = resolve(["--preset", "seed"], {})
    assert (preset.num_layers, Config().num_layers) == (8, 9)
    environment = {"PRESET": "seed", "NUM_LAYERS": "7"}
    assert resolve([], environment).num_layers == 7
    assert resolve([], environment).warmdown_iters == preset.warmdown_iters
    assert resolve(["--num-layers", "6"], environment).num_layers == 6


def test_preset_flag_beats_preset_variable():
    assert resolve(["--preset", "demo"], {"PRESET": "seed"}) == resolve(["--preset", "demo"], {})


def test_the_command_of_the_recipe_resolves():
    config = resolve([], command_environment())
    assert config == Config(
        num_layers=8,
        bigram_vocab_size=2048,
        muon_wd=0.04,
        adam_wd=0.04,
        matrix_lr=0.025,
        scalar_lr=0.025,
        tied_embed_lr=0.035,
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=1500,
        warmdown_iters=3000,
        max_wallclock_seconds=600.0,
        eval_stride=64,
    )
    assert config.rows_per_micro_batch(8) * config.train_seq_len == 98_304


def test_seed_preset_is_the_command_read_in_order():
    seed = resolve(["--preset", "seed"], {})
    assert seed == dataclasses.replace(resolve([], command_environment()), data_order="in_order")
    assert not seed.document_boundaries


def test_elsewhere_the_data_is_shuffled():
    assert Config().data_order == "shuffled"
    assert resolve(["--preset", "demo"], {}).data_order == "shuffled"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete_and_well_typed(preset):
    config = resolve(["--preset", preset], {})
    for each in OPTIONS:
        assert type(getattr(config, each.name)) is TYPES[each.type], each.name


@pytest.mark.parametrize("text", ["1", "true", "YES", "on", " 1 "])
def test_words_for_true(text):
    assert resolve([], {"QAT_ENABLED": text}).qat_enabled


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_words_for_false(text):
    assert not resolve([], {"SWA_ENABLED": text}).swa_enabled


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--num-layer", "8"], ["--num-layer", "did you mean --num-layers?"]),
        (["--num-layer=8"], ["--num-layer", "did you mean --num-layers?"]),
        (["--zebra", "8"], ["--zebra", "--help"]),
        (["zebra"], ["zebra"]),
        (["--num-layers"], ["--num-layers", "expected one argument"]),
        (["--preset", "sed"], ["PRESET", "--preset", "'sed'", *PRESETS]),
        (["--num-layers", "eight"], ["NUM_LAYERS", "--num-layers", "'eight'", "whole number"]),
        (["--num-layers", "8.0"], ["NUM_LAYERS", "'8.0'", "whole number"]),
        (["--num-layers", ""], ["NUM_LAYERS", "''", "whole number"]),
        (["--num-layers", "0"], ["NUM_LAYERS", "0", "at least 1"]),
        (["--num-layers=-3"], ["NUM_LAYERS", "-3", "at least 1"]),
        (["--matrix-lr", "fast"], ["MATRIX_LR", "--matrix-lr", "'fast'", "a number"]),
        (["--matrix-lr", "nan"], ["MATRIX_LR", "nan", "finite"]),
        (["--matrix-lr", "inf"], ["MATRIX_LR", "inf", "finite"]),
        (["--matrix-lr=-0.1"], ["MATRIX_LR", "-0.1", "at least 0"]),
        (["--muon-momentum", "1"], ["MUON_MOMENTUM", "1.0", "at least 0", "below 1"]),
        (["--beta2", "1"], ["BETA2", "1.0", "below 1"]),
        (["--logit-softcap", "0"], ["LOGIT_SOFTCAP", "0.0", "above 0"]),
        (["--tie-embeddings", "maybe"], ["TIE_EMBEDDINGS", "--tie-embeddings", "'maybe'", "0 or 1"]),
        (["--data-order", "random"], ["DATA_ORDER", "'random'", "shuffled, in_order"]),
        (["--paid-prefix-codec", "gzip"], ["PAID_PREFIX_CODEC", "'gzip'", "lzma, xz, zlib, raw, auto"]),
        (["--compute-dtype", "float16"], ["COMPUTE_DTYPE", "'float16'", "bfloat16, float32"]),
        (["--device", "tpu"], ["DEVICE", "'tpu'", "auto, cpu, cuda"]),
        (["--model-dim", "500"], ["MODEL_DIM", "500", "multiple of 2 * NUM_HEADS = 16"]),
        (["--model-dim", "8192"], ["NUM_HEADS", "8", "at most 512"]),
        (["--num-kv-heads", "3"], ["NUM_KV_HEADS", "3", "NUM_HEADS 8", "1, 2, 4, 8"]),
        (["--mlp-mult", "2.001"], ["MLP_MULT", "2.001", "512", "whole number"]),
        (["--bigram-vocab-size", "1"], ["BIGRAM_VOCAB_SIZE", "1", "0 (none) or at least 2"]),
        (["--bos-token-id", "1024"], ["BOS_TOKEN_ID", "1024", "VOCAB_SIZE 1024"]),
        (["--eval-stride", "4096"], ["EVAL_STRIDE", "4096", "EVAL_SEQ_LEN 2048"]),
        (["--train-batch-tokens", "786433"], ["TRAIN_BATCH_TOKENS", "786433", "multiple of", "TRAIN_SEQ_LEN 2048"]),
        (["--micro-batch-tokens", "1024"], ["MICRO_BATCH_TOKENS", "1024", "TRAIN_SEQ_LEN 2048"]),
        (["--run-id", "../escape"], ["RUN_ID", "'../escape'", "letters, digits"]),
        (["--run-id", "."], ["RUN_ID", "'.'", "starting with a letter or digit"]),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_what_would_be_valid(arguments, parts):
    message = complaint(arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", ["NUM_LAYERS", "MATRIX_LR", "SEED"])
def test_a_bad_variable_is_named_too(name):
    message = complaint([], {name: "x"})
    assert name in message
    assert "'x'" in message


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_too_large_for_a_float_is_out_of_range(digits):
    message = complaint(["--num-layers", "9" * digits])
    assert "NUM_LAYERS" in message


def test_multi_token_heads_need_a_target():
    batch = {"train_seq_len": 4, "train_batch_tokens": 64}
    assert Config(mtp_num_heads=3, **batch).mtp_num_heads == 3
    with pytest.raises(ConfigError, match=r"MTP_NUM_HEADS \(--mtp-num-heads\) is 4.*TRAIN_SEQ_LEN 4"):
        Config(mtp_num_heads=4, **batch)


def test_fp8_needs_bfloat16_activations():
    assert resolve(["--mlp-fp8", "1"], {}).mlp_fp8
    assert resolve([], {"MLP_FP8": "on"}).mlp_fp8
    assert not Config().mlp_fp8
    assert "mlp_fp8" not in Config(mlp_fp8=True).artifact_fields()
    with pytest.raises(ConfigError, match=r"MLP_FP8 \(--mlp-fp8\) is True: COMPUTE_DTYPE must be bfloat16.*float32"):
        Config(mlp_fp8=True, compute_dtype="float32")
    assert "MLP_FP8" in complaint(["--preset", "demo"], {"MLP_FP8": "1"})


def test_replace_checks_again():
    with pytest.raises(ConfigError, match="NUM_LAYERS"):
        dataclasses.replace(Config(), num_layers=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 384])
def test_ranks_cover_the_batch_in_micro_batches_that_fit(world_size):
    config = Config()
    rows = config.rows_per_micro_batch(world_size)
    share = config.train_batch_tokens // config.train_seq_len // world_size
    assert rows * config.train_seq_len <= config.micro_batch_tokens
    assert share % rows == 0
    larger = range(rows + 1, config.micro_batch_tokens // config.train_seq_len + 1)
    assert not any(share % n == 0 for n in larger)


@pytest.mark.parametrize("world_size", [5, 7, 16 * 9, 768])
def test_ranks_that_cannot_share_the_batch_are_told_which_numbers_can(world_size):
    with pytest.raises(ConfigError) as caught:
        Config().rows_per_micro_batch(world_size)
    message = str(caught.value)
    assert f"{world_size} ranks" in message
    assert "TRAIN_BATCH_TOKENS 786432" in message
    assert "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64" in message


@pytest.mark.parametrize(
    "run_id", ["..", "../x", "x/../../y", "/abs", "a/b", "a\\b", ".x", "-x", "a\0", "a\n", "a b", "~", "é"]
)
def test_no_run_leaves_the_directory_of_runs(run_id):
    with pytest.raises(ConfigError, match="RUN_ID"):
        resolve([], {"RUN_ID": run_id})


@pytest.fixture(scope="module")
def help_text() -> str:
    """What `train.py --help` prints where torch cannot be imported."""
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('train.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", program, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_option_with_its_meaning_and_default(help_text):
    joined = re.sub(r"\n {10,}", " ", help_text)  # a long flag has its meaning on the next line
    lines = {line.split()[0]: line for line in joined.splitlines() if line.startswith("  --")}
    assert lines.keys() == {"--preset", *(flag_of(each.name) for each in OPTIONS)}
    for name, (default, _, _) in RECIPE.items():
        shown = "empty" if default == "" else int(default) if isinstance(default, bool) else default
        assert lines[flag_of(name)].endswith(f"(default {shown})")
    for each in OPTIONS:
        assert each.metadata["meaning"] in lines[flag_of(each.name)]


def test_help_groups_the_options(help_text):
    headings = [line[:-1] for line in help_text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    groups = list(dict.fromkeys(each.metadata["group"] for each in OPTIONS))
    assert [heading for heading in headings if heading in groups] == groups
    optimizer = help_text.split("\noptimizer:")[1].split("\nschedule:")[0]
    assert "--matrix-lr" in optimizer
    assert "--num-layers" not in optimizer


def test_help_lists_the_presets(help_text):
    for name, (meaning, _) in PRESETS.items():
        assert any(line.split() == [name, *meaning.split()] for line in help_text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], ""), (["--resume"], "auto"), (["--resume", "runs/one"], "runs/one"), (["--resume", "--seed", "1"], "auto")],
)
def test_resume_alone_is_auto(arguments, value):
    assert resolve(arguments, {}).resume == value
    assert resolve([], {"RESUME": value}).resume == value


def test_determinism_and_a_time_limit_exclude_each_other():
    assert "MAX_WALLCLOCK_SECONDS" in complaint(["--deterministic", "1"])
    assert resolve(["--deterministic", "1", "--max-wallclock-seconds", "0"], {}).deterministic


def test_checkpoints_by_time_or_steps_or_not():
    assert resolve([], {}).checkpoints
    assert not resolve(["--checkpoint-seconds", "0"], {}).checkpoints
    assert resolve(["--checkpoint-seconds", "0", "--checkpoint-every", "100"], {}).checkpoints


def test_what_a_resumed_run_may_change_is_where_and_how_it_works():
    """Another value for every option: the differences name exactly those that change the result."""
    default = Config()
    assert default.differences(default.to_dict()) == []
    named = {each.split(":")[0].lower() for each in default.differences({})}
    assert {each.name for each in OPTIONS} - named == {
        *("data_path", "tokenizer_path", "micro_batch_tokens", "val_loss_every", "val_batch_size", "train_log_every"),
        *("run_id", "runs_dir", "device", "compile", "deterministic", "resume", "hang_timeout"),
        *("checkpoint_seconds", "checkpoint_every", "checkpoints_kept"),
    }
    assert default.differences({**default.to_dict(), "num_layers": 8}) == ["NUM_LAYERS: checkpoint 8, this run 9"]
