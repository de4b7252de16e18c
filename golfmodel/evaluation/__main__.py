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
from golfmodel.artifact.readback import score_model, unpack_model
from golfmodel.data.text import load_validation_text
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.evaluation.evaluator import Evaluator
from golfmodel.runtime.distributed import process_group
from golfmodel.runtime.errors import ConfigError, DataError, front_door


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
        tokenizer = Tokenizer(options.tokenizer_path, config.vocab_size)
        if tokenizer.digest != artifact.tokenizer_digest:
            raise DataError(
                f"the tokenizer {options.tokenizer_path} has SHA-256 {tokenizer.digest}, the artifact was made with "
                f"{artifact.tokenizer_digest}"
            )
        text = load_validation_text(options.data_path, tokenizer)
        covered = 0
        if options.paid_prefix_file:
            targets = np.asarray(text.tokens[1:])
            covered = len(load_prefix(options.paid_prefix_file, options.paid_prefix_codec, targets))
        evaluator = Evaluator(
            text, ranks, length=config.eval_seq_len, stride=stride, batch_tokens=config.val_batch_size
        )
        scores = score_model(model, evaluator, options.compile, covered)
        if ranks.is_main:
            result = {
                "val_bpb": scores.sliding,
                "val_bpb_int6": scores.int6,
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
        default=environment.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024"),
        help="directory with *_val_*.bin shards",
    )
    parser.add_argument(
        "--tokenizer-path",
        default=environment.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model"),
        help="the SentencePiece model the artifact was trained with",
    )
    parser.add_argument("--eval-stride", type=int, help="new targets a sliding window; the artifact's if not given")
    parser.add_argument("--paid-prefix-file", default="", help="stored validation targets (research only)")
    parser.add_argument("--paid-prefix-codec", default="lzma", choices=CODECS, help="how that file is packed")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    parser.add_argument(
        "--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
