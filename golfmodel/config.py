"""Every option of a run in one dataclass: presets, environment variables and flags onto it.

An option `num_layers` is the environment variable `NUM_LAYERS` and the flag `--num-layers`. A flag beats the
environment, which beats the preset, which beats the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from golfmodel.runtime.errors import ConfigError


def option(
    default: Any,
    group: str,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    in_artifact: bool = False,
    may_change: bool = False,
    alone: str | None = None,
) -> Any:
    """A field of `Config`: `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.

    `in_artifact` options are what a model needs to be rebuilt and scored; the artifact carries them. `may_change`
    options say only where and how a run works or what it logs: a resumed run may have others. `alone` is what the
    flag means without a value.
    """
    metadata = {
        "group": group,
        "meaning": meaning,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": tuple(choices) if choices else None,
        "in_artifact": in_artifact,
        "may_change": may_change,
        "alone": alone,
    }
    return field(default=default, metadata=metadata)


MODEL, OPTIMIZER, SCHEDULE, DATA = "model", "optimizer", "schedule", "data"
EVALUATION, ARTIFACT, RUN, SURVIVAL = "evaluation", "artifact", "run", "checkpoints and faults"

MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class Config:
    """A complete, valid run. Build one with `resolve`, which checks it; `dataclasses.replace` re-checks it."""

    num_layers: int = option(9, MODEL, "transformer blocks", low=1, high=256, in_artifact=True)
    model_dim: int = option(512, MODEL, "width of the residual stream", low=8, high=16384, in_artifact=True)
    num_heads: int = option(8, MODEL, "query heads", low=1, high=1024, in_artifact=True)
    num_kv_heads: int = option(4, MODEL, "key/value heads; divides NUM_HEADS", low=1, high=1024, in_artifact=True)
    mlp_mult: float = option(3.0, MODEL, "MLP hidden width over MODEL_DIM", above=0, high=64, in_artifact=True)
    vocab_size: int = option(1024, MODEL, "tokenizer pieces", low=4, high=65536, in_artifact=True)
    tie_embeddings: bool = option(True, MODEL, "the head is the token embedding", in_artifact=True)
    tied_embed_init_std: float = option(0.005, MODEL, "std of a tied embedding at the start", above=0, high=10)
    bigram_vocab_size: int = option(
        4096, MODEL, "rows of the bigram table; 0: none", low=0, high=1 << 24, in_artifact=True
    )
    bigram_dim: int = option(
        128, MODEL, "width of the bigram table; MODEL_DIM: no projection", low=1, high=16384, in_artifact=True
    )
    rope_base: float = option(10000.0, MODEL, "rotary base", above=1, high=1e9, in_artifact=True)
    qk_gain_init: float = option(1.5, MODEL, "gain on each head's queries at the start", above=0, high=100)
    logit_softcap: float = option(
        30.0, MODEL, "c of the soft cap c * tanh(logit / c)", above=0, high=1e4, in_artifact=True
    )
    document_boundaries: bool = option(
        False, MODEL, "SmearGate, bigram hash and attention reset at BOS", in_artifact=True
    )
    bos_token_id: int = option(1, MODEL, "the piece that starts a document", low=0, high=65535, in_artifact=True)
    qat_enabled: bool = option(False, MODEL, "train on int6-rounded weights (straight-through gradient)")
    mtp_num_heads: int = option(0, MODEL, "extra heads that predict tokens i + 2, i + 3, ...", low=0, high=16)
    mtp_loss_weight: float = option(0.2, MODEL, "weight of their mean loss", low=0, high=100)
    compute_dtype: str = option(
        "bfloat16", MODEL, "activations and matrix products", choices=("bfloat16", "float32"), in_artifact=True
    )
    mlp_fp8: bool = option(False, MODEL, "FP8 for the MLP's matrix products in training; scoring never uses it")

    matrix_lr: float = option(0.04, OPTIMIZER, "learning rate of Muon", low=0, high=100)
    scalar_lr: float = option(0.04, OPTIMIZER, "AdamW, per-channel and scalar parameters", low=0, high=100)
    tied_embed_lr: float = option(0.05, OPTIMIZER, "AdamW, embeddings under a tied head", low=0, high=100)
    embed_lr: float = option(0.6, OPTIMIZER, "AdamW, embeddings under an untied head", low=0, high=100)
    head_lr: float = option(0.008, OPTIMIZER, "Adam, an untied head", low=0, high=100)
    muon_momentum: float = option(0.95, OPTIMIZER, "momentum after its ramp", low=0, below=1)
    muon_momentum_warmup_start: float = option(0.85, OPTIMIZER, "momentum at step 0", low=0, below=1)
    muon_momentum_warmup_steps: int = option(500, OPTIMIZER, "length of the linear ramp", low=0, high=10**9)
    muon_wd: float = option(0.02, OPTIMIZER, "Muon's decoupled weight decay", low=0, high=10)
    muon_backend_steps: int = option(5, OPTIMIZER, "Newton-Schulz iterations", low=1, high=100)
    beta1: float = option(0.9, OPTIMIZER, "AdamW", low=0, below=1)
    beta2: float = option(0.95, OPTIMIZER, "AdamW", low=0, below=1)
    adam_eps: float = option(1e-8, OPTIMIZER, "AdamW", above=0, high=1)
    adam_wd: float = option(0.01, OPTIMIZER, "AdamW's decoupled weight decay", low=0, high=10)
    grad_clip_norm: float = option(0.3, OPTIMIZER, "largest global gradient norm; 0: no clipping", low=0, high=1e9)

    iterations: int = option(20000, SCHEDULE, "steps at most", low=1, high=10**9)
    max_wallclock_seconds: float = option(600.0, SCHEDULE, "training seconds at most; 0: no limit", low=0, high=1e9)
    warmdown_iters: int = option(1200, SCHEDULE, "steps of the linear fall to zero", low=0, high=10**9)
    warmup_steps: int = option(20, SCHEDULE, "throw-away steps: compile, and from 3 record", low=0, high=10**6)
    swa_enabled: bool = option(True, SCHEDULE, "average weights over the second half of the warmdown")
    swa_every: int = option(200, SCHEDULE, "steps between two copies", low=1, high=10**9)

    data_path: str = option("./data/datasets/fineweb10B_sp1024", DATA, "directory of shards", may_change=True)
    tokenizer_path: str = option(
        "./data/tokenizers/fineweb_1024_bpe.model", DATA, "SentencePiece model", may_change=True
    )
    data_order: str = option(
        "shuffled", DATA, "every window once an epoch, or one stream", choices=("shuffled", "in_order")
    )
    train_seq_len: int = option(2048, DATA, "tokens a row", low=2, high=1 << 17, in_artifact=True)
    train_batch_tokens: int = option(786_432, DATA, "tokens a step, over all ranks", low=2, high=1 << 40)
    micro_batch_tokens: int = option(
        98_304, DATA, "tokens a rank at a time, at most", low=2, high=1 << 30, may_change=True
    )

    val_loss_every: int = option(
        1000, EVALUATION, "steps between validations; 0: at the end", low=0, high=10**9, may_change=True
    )
    val_batch_size: int = option(
        524_288,
        EVALUATION,
        "tokens scored at a time, over all ranks",
        low=1,
        high=1 << 40,
        in_artifact=True,
        may_change=True,
    )
    eval_seq_len: int = option(2048, EVALUATION, "tokens a window", low=2, high=1 << 17, in_artifact=True)
    eval_stride: int = option(
        64, EVALUATION, "new targets a sliding window; 0: no sliding score", low=0, high=1 << 17, in_artifact=True
    )

    embed_storage: str = option(
        "fp16", ARTIFACT, "how the artifact stores the token embedding", choices=("fp16", "int8"), in_artifact=True
    )
    paid_prefix_file: str = option("", ARTIFACT, "stored validation targets (research; makes a run not eligible)")
    paid_prefix_codec: str = option(
        "lzma", ARTIFACT, "how that file is packed", choices=("lzma", "xz", "zlib", "raw", "auto")
    )

    run_id: str = option("", RUN, "name of the run; empty: random", may_change=True)
    runs_dir: str = option("./runs", RUN, "where runs/<RUN_ID>/ is made", may_change=True)
    seed: int = option(1337, RUN, "of initial weights and data order", low=0, high=2**63 - 1)
    train_log_every: int = option(200, RUN, "steps between log lines", low=1, high=10**9, may_change=True)
    device: str = option(
        "auto", RUN, "where to run; auto: a GPU if there is one", choices=("auto", "cpu", "cuda"), may_change=True
    )
    compile: str = option(
        "auto",
        RUN,
        "torch.compile; auto: on a GPU, where the kernels leave it something to gain",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    deterministic: bool = option(
        False, RUN, "the same bits each time; takes a schedule by steps (MAX_WALLCLOCK_SECONDS 0)", may_change=True
    )

    checkpoint_seconds: float = option(
        60.0, SURVIVAL, "training seconds between checkpoints; 0: not by time", low=0, high=1e9, may_change=True
    )
    checkpoint_every: int = option(
        0, SURVIVAL, "steps between checkpoints; 0: not by steps", low=0, high=10**9, may_change=True
    )
    checkpoints_kept: int = option(2, SURVIVAL, "how many, the newest", low=1, high=10**6, may_change=True)
    resume: str = option(
        "",
        SURVIVAL,
        "go on from: auto (RUN_ID's run, or the newest unfinished one of this config), a run's directory, or a "
        "checkpoint",
        may_change=True,
        alone="auto",
    )
    hang_timeout: float = option(
        300.0, SURVIVAL, "seconds without progress after which a rank ends the run", above=0, high=1e6, may_change=True
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "float" and type(value) is int:
                value = float(value)
                object.__setattr__(self, each.name, value)
            _check_value(each, value)
        self._check_together()

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    def _check_together(self) -> None:
        if self.model_dim % (2 * self.num_heads):
            rule = f"must be a multiple of 2 * NUM_HEADS = {2 * self.num_heads}, so that every head has an even size"
            raise self._impossible("model_dim", rule)
        if self.head_dim > MAX_HEAD_DIM:
            rule = f"a head of MODEL_DIM {self.model_dim} would be {self.head_dim} wide, at most {MAX_HEAD_DIM}"
            raise self._impossible("num_heads", rule)
        if self.num_heads % self.num_kv_heads:
            valid = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            raise self._impossible("num_kv_heads", f"must divide NUM_HEADS {self.num_heads} ({valid})")
        if self.mlp_mult * self.model_dim != self.mlp_dim:
            raise self._impossible("mlp_mult", f"times MODEL_DIM {self.model_dim} must be a whole number of channels")
        if self.mlp_fp8 and self.compute_dtype != "bfloat16":
            raise self._impossible("mlp_fp8", f"COMPUTE_DTYPE must be bfloat16, and is {self.compute_dtype}")
        if self.bigram_vocab_size == 1:
            raise self._impossible("bigram_vocab_size", "must be 0 (none) or at least 2")
        if self.bos_token_id >= self.vocab_size:
            raise self._impossible("bos_token_id", f"must be below VOCAB_SIZE {self.vocab_size}")
        if self.train_seq_len <= self.mtp_num_heads:
            raise self._impossible("mtp_num_heads", f"must be below TRAIN_SEQ_LEN {self.train_seq_len}")
        if self.eval_stride > self.eval_seq_len:
            rule = f"must be at most EVAL_SEQ_LEN {self.eval_seq_len}, or targets would be skipped"
            raise self._impossible("eval_stride", rule)
        if self.paid_prefix_file and self.eval_stride == 0:
            raise self._impossible(
                "paid_prefix_file", "a prefix is scored by sliding window, so EVAL_STRIDE must be above 0"
            )
        if self.train_batch_tokens % self.train_seq_len:
            raise self._impossible("train_batch_tokens", f"must be a multiple of TRAIN_SEQ_LEN {self.train_seq_len}")
        if self.micro_batch_tokens < self.train_seq_len:
            raise self._impossible("micro_batch_tokens", f"must hold a row of TRAIN_SEQ_LEN {self.train_seq_len}")
        if self.run_id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.run_id):
            rule = "must be at most 128 letters, digits, '.', '_' and '-', starting with a letter or digit"
            raise self._impossible("run_id", rule)
        if self.deterministic and self.max_wallclock_seconds:
            rule = "the clock would set the schedule, so MAX_WALLCLOCK_SECONDS (--max-wallclock-seconds) must be 0"
            raise self._impossible("deterministic", rule)

    def _impossible(self, name: str, rule: str) -> ConfigError:
        return ConfigError(f"{_label(name)} is {getattr(self, name)!r}: {rule}")

    def rows_per_micro_batch(self, world_size: int) -> int:
        """Rows of `train_seq_len` tokens that one rank takes at a time.

        The largest divisor of a rank's share of the batch that fits `micro_batch_tokens`.

        Raises:
            ConfigError: `world_size` ranks cannot share the batch in whole rows.
        """
        rows = self.train_batch_tokens // self.train_seq_len
        if rows % world_size:
            valid = ", ".join(str(n) for n in range(1, min(rows, 64) + 1) if rows % n == 0)
            raise ConfigError(
                f"TRAIN_BATCH_TOKENS {self.train_batch_tokens} is {rows} rows of TRAIN_SEQ_LEN {self.train_seq_len}, "
                f"which {world_size} ranks do not divide; valid numbers of ranks: {valid}"
            )
        share = rows // world_size
        largest = min(share, self.micro_batch_tokens // self.train_seq_len)
        return next(n for n in range(largest, 0, -1) if share % n == 0)

    @property
    def checkpoints(self) -> bool:
        """Whether the run writes any but at a signal."""
        return bool(self.checkpoint_seconds or self.checkpoint_every)

    def differences(self, values: Mapping[str, Any]) -> list[str]:
        """How the options of another run, by field name, differ from these where a resumed run must not; in words."""
        return [
            f"{each.name.upper()}: checkpoint {values.get(each.name)!r}, this run {getattr(self, each.name)!r}"
            for each in fields(self)
            if not each.metadata["may_change"] and values.get(each.name) != getattr(self, each.name)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Every option and its value, by field name."""
        return dataclasses.asdict(self)

    def artifact_fields(self) -> dict[str, Any]:
        """The options that rebuild and score the model, by field name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata["in_artifact"]}

    @staticmethod
    def from_artifact_fields(values: Mapping[str, Any]) -> Config:
        """The inverse of `artifact_fields`, for values from an untrusted file.

        Raises:
            ConfigError: an option is missing, unknown, of another type, or out of its range.
        """
        known = {each.name: each for each in fields(Config) if each.metadata["in_artifact"]}
        if values.keys() != known.keys():
            odd = ", ".join(map(reprlib.repr, sorted(values.keys() ^ known.keys())[:5]))
            raise ConfigError(f"the stored config lacks or adds options: {odd}")
        for name, each in known.items():
            if type(values[name]).__name__ != each.type:
                value = reprlib.repr(values[name])
                raise ConfigError(f"the stored {name.upper()} is {value}: must be of type {each.type}")
        # How a batch was cut into rows is no part of a model; a batch of one row fits every length of a row.
        length = values["train_seq_len"]
        return Config(**values, train_batch_tokens=length, micro_batch_tokens=length)


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("the defaults below", {}),
    "seed": (
        "the 8-layer recipe that the project started from: 600 s, 8 GPUs",
        {
            "num_layers": 8,
            "bigram_vocab_size": 2048,
            "muon_wd": 0.04,
            "adam_wd": 0.04,
            "matrix_lr": 0.025,
            "scalar_lr": 0.025,
            "tied_embed_lr": 0.035,
            "muon_momentum": 0.99,
            "muon_momentum_warmup_start": 0.92,
            "muon_momentum_warmup_steps": 1500,
            "warmdown_iters": 3000,
            "data_order": "in_order",
        },
    ),
}
PRESETS["quick"] = (
    "the seed's recipe on one GPU for two minutes, an eighth of its batch",
    {
        **PRESETS["seed"][1],
        "train_batch_tokens": 98_304,
        "muon_momentum_warmup_steps": 300,
        "warmdown_iters": 600,
        "swa_every": 50,
        "max_wallclock_seconds": 120.0,
        "val_loss_every": 300,
        "train_log_every": 50,
        "data_order": "shuffled",
    },
)
PRESETS["demo"] = (
    "a small model on Python's own sources: 90 s on 2 CPU cores",
    {
        "num_layers": 4,
        "model_dim": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "bigram_vocab_size": 1024,
        "bigram_dim": 64,
        "train_seq_len": 256,
        "eval_seq_len": 256,
        "train_batch_tokens": 2048,
        "micro_batch_tokens": 2048,
        "val_batch_size": 16384,
        "val_loss_every": 0,
        "train_log_every": 50,
        "muon_momentum_warmup_steps": 100,
        "warmdown_iters": 200,
        "warmup_steps": 3,
        "swa_every": 20,
        "max_wallclock_seconds": 90.0,
        "compute_dtype": "float32",
        "data_path": "./data/demo",
        "tokenizer_path": "./data/demo/demo_1024_bpe.model",
    },
)

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def resolve(arguments: Sequence[str], environment: Mapping[str, str], *, program: str = "train.py") -> Config:
    """The config that flags, environment and preset give together.

    `--help` prints every option and exits.

    Raises:
        ConfigError: an unknown flag, or a value that is malformed, out of range, or at odds with another.
    """
    flags = vars(_parser(program).parse_args(list(arguments)))
    preset = flags.pop("preset") or environment.get("PRESET") or "default"
    if preset not in PRESETS:
        raise ConfigError(f"PRESET (--preset) is {preset!r}: must be one of {', '.join(PRESETS)}")
    values = dict(PRESETS[preset][1])
    for each in fields(Config):
        text = flags[each.name]
        if text is None:
            text = environment.get(each.name.upper())
        if text is not None:
            values[each.name] = _parse(each, text)
    return Config(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown.group(1).split("=")[0]
            flags = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(flag, flags, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists the options"
            raise ConfigError(f"unknown option {flag}{hint}")
        raise ConfigError(message)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage=f"{program} [--preset NAME] [--option VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Train, average, quantize, write, read back and score a model within 16,000,000 bytes.\n"
            "Each option is also an environment variable: --num-layers is NUM_LAYERS. A flag beats the environment,\n"
            "which beats the preset. Start several ranks with torchrun --standalone --nproc_per_node=N train.py."
        ),
    )
    presets = parser.add_argument_group(
        "presets", "\n".join(f"  {name:9} {meaning}" for name, (meaning, _) in PRESETS.items())
    )
    presets.add_argument("--preset", metavar="NAME", help="a complete config to start from (default default)")
    groups: dict[str, Any] = {}
    for each in fields(Config):
        name = each.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        shown = int(each.default) if isinstance(each.default, bool) else each.default
        choices = each.metadata["choices"]
        valid = f"; one of {', '.join(choices)}" if choices else ""
        default = "empty" if shown == "" else shown
        alone = each.metadata["alone"]
        groups[name].add_argument(
            "--" + each.name.replace("_", "-"),
            **({} if alone is None else {"nargs": "?", "const": alone}),
            metavar={"int": "N", "float": "X", "bool": "0|1", "str": "TEXT"}[str(each.type)],
            help=f"{each.metadata['meaning']}{valid} (default {default})".replace("%", "%%"),
        )
    return parser


def _label(name: str) -> str:
    return f"{name.upper()} (--{name.replace('_', '-')})"


def _parse(each: dataclasses.Field[Any], text: str) -> Any:
    kind = str(each.type)
    if kind == "str":
        return text
    if kind == "bool":
        lowered = text.strip().lower()
        if lowered in _TRUE or lowered in _FALSE:
            return lowered in _TRUE
        raise ConfigError(f"{_label(each.name)} is {text!r}: must be 0 or 1")
    try:
        return int(text.replace("_", "")) if kind == "int" else float(text)
    except ValueError:
        wanted = "a whole number" if kind == "int" else "a number"
        raise ConfigError(f"{_label(each.name)} is {text!r}: must be {wanted}") from None


def _check_value(each: dataclasses.Field[Any], value: Any) -> None:
    limits = each.metadata
    if type(value).__name__ != each.type:
        raise ConfigError(f"{_label(each.name)} is {value!r}: must be of type {each.type}")
    if limits["choices"] and value not in limits["choices"]:
        valid = ", ".join(limits["choices"])
        raise ConfigError(f"{_label(each.name)} is {reprlib.repr(value)}: must be one of {valid}")
    if isinstance(value, str):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_label(each.name)} is {value}: must be finite")
    fails = (
        (limits["low"] is not None and value < limits["low"])
        or (limits["high"] is not None and value > limits["high"])
        or (limits["above"] is not None and value <= limits["above"])
        or (limits["below"] is not None and value >= limits["below"])
    )
    if fails:
        bounds = [
            f"{words} {limits[key]:,}"
            for key, words in (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
            if limits[key] is not None
        ]
        shown = f"a number of {_digits(value)} digits" if abs(value) >= 10**30 else value
        raise ConfigError(f"{_label(each.name)} is {shown}: must be {' and '.join(bounds)}")


def _digits(value: float) -> int:
    """About how many decimal digits, without writing them out."""
    return int(math.log10(abs(value))) + 1
