"""Scores an artifact on a directory of shards: `python -m golfmodel.evaluation PATH --data-path DIR`.

The same windows, and so the same numbers, as the run that made it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import numpy as np

from golfmodel.artifact.container import read_artifact
from golfmodel.artifact.prefix import load_prefix
from golfmodel.artifact.prefix_codec import CODECS
from golfmodel.artifact.readback import unpack_model
from golfmodel.config import Config
from golfmodel.data.text import load_validation_text
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.evaluation.evaluator import Evaluator
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.distributed import process_group
from golfmodel.runtime.errors import ConfigError, front_door, leave


@front_door
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    with process_group(options.device, os.environ) as ranks:
        artifact = read_artifact(options.artifact)
        model = unpack_model(artifact, ranks.device, options.artifact)
        config = model.config
        stride = config.eval_stride if options.eval_stride is None else options.eval_stride
        if not 0 <= stride <= config.eval_seq_len:
            raise ConfigError(f"--eval-stride is {stride}: must be between 0 and EVAL_SEQ_LEN {config.eval_seq_len}")
        # A foreign artifact may ask for 2^40; more than usual is only scored at a time when the command says so.
        usual = min(config.val_batch_size, Config.val_batch_size)
        batch_tokens = usual if options.val_batch_size is None else options.val_batch_size
        if batch_tokens < 1:
            raise ConfigError(f"--val-batch-size is {batch_tokens}: must be at least 1")
        tokenizer = Tokenizer(options.tokenizer_path, config.vocab_size)
        tokenizer.require(artifact.tokenizer_digest, options.artifact)
        text = load_validation_text(options.data_path, tokenizer)
        covered = 0
        if options.paid_prefix_file:
            targets = np.asarray(text.tokens[1:])
            covered = len(load_prefix(options.paid_prefix_file, options.paid_prefix_codec, targets))
        evaluator = Evaluator(text, ranks, length=config.eval_seq_len, stride=stride, batch_tokens=batch_tokens)
        token_losses = compiled(model.token_losses, options.compile, ranks.device, gains=model.gains_from_compiling)
        scores = evaluator.both(token_losses, prefix_targets=covered)
        if ranks.is_main:
            result = {
                "val_bpb": scores.sliding,
                "val_bpb_int6": scores.side_by_side,
                "val_bpb_with_prefix": scores.with_prefix,
                "validation_targets": text.num_targets,
                "validation_bytes": int(text.target_bytes.sum()),
                "validation_digest": text.digest,
            }
            print(json.dumps(result, indent=2), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m golfmodel.evaluation",
        description="Scores an artifact in bits per byte, every target of the text once. Prints JSON. "
        "torchrun shares the work among ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    environment = os.environ
    parser.add_argument("artifact", help="the artifact file, such as runs/<RUN_ID>/model.golf")
    parser.add_argument(
        "--data-path",
        default=environment.get("DATA_PATH", Config.data_path),
        help="directory with *_val_*.bin shards",
    )
    parser.add_argument(
        "--tokenizer-path",
        default=environment.get("TOKENIZER_PATH", Config.tokenizer_path),
        help="the SentencePiece model the artifact was trained with",
    )
    parser.add_argument("--eval-stride", type=int, help="new targets a sliding window; the artifact's if not given")
    parser.add_argument(
        "--val-batch-size",
        type=int,
        help=f"tokens scored at a time; the artifact's, at most {Config.val_batch_size:,}, if not given",
    )
    parser.add_argument("--paid-prefix-file", default="", help="stored validation targets (research only)")
    parser.add_argument("--paid-prefix-codec", default="lzma", choices=CODECS, help="how that file is packed")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    parser.add_argument(
        "--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU"
    )
    return parser


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
