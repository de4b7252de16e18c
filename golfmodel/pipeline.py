"""The corridor from a config to a scored artifact: train, average, quantize, write, read back, score, report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golfmodel import report
from golfmodel.artifact import parts, prefix, readback, submission
from golfmodel.artifact.container import Artifact, decode_artifact, write_artifact
from golfmodel.config import Config
from golfmodel.data.loader import Loader, make_loader
from golfmodel.data.shards import find_shards, open_shard
from golfmodel.data.text import ValidationText, load_validation_text
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.evaluation.evaluator import Evaluator
from golfmodel.evaluation.windows import plan_windows
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import exported_parameters
from golfmodel.runtime import faults, liveness
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.determinism import determinism
from golfmodel.runtime.distributed import TIMEOUT, Ranks, process_group, rank_of, runs_on_gpu, world_size_of
from golfmodel.runtime.errors import ConfigError
from golfmodel.runtime.files import remove_temporaries, write_json
from golfmodel.runtime.runlog import RunLog
from golfmodel.runtime.sightings import longest_patience
from golfmodel.runtime.stopping import Stopped, StopRequest
from golfmodel.runtime.versions import versions
from golfmodel.runtime.watchdog import Watchdog
from golfmodel.training.checkpoint import Checkpoint
from golfmodel.training.checkpointing import Checkpoints, checkpoints_in
from golfmodel.training.resume import (
    CONFIG_NAME,
    SUMMARY_NAME,
    Start,
    choose_start,
    directory_of,
    first_state,
    launcher_of,
)
from golfmodel.training.trainer import Trainer, TrainingResult
from kernels import dispatch

ARTIFACT_NAME = "model.golf"


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked before any process group or GPU is touched."""

    tokenizer: Tokenizer
    text: ValidationText
    prefix_targets: int

    @property
    def digests(self) -> dict[str, str]:
        """What a resumed run must find the same."""
        return {"tokenizer": self.tokenizer.digest, "validation text": self.text.digest}


def run(config: Config, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The whole pipeline on this rank; rank 0 writes `summary.json` and returns what is in it, others `{}`.

    A run that is asked to stop while it trains returns `{}` on every rank, with a checkpoint written; one that is asked
    later ends the process, with status 0.

    Raises:
        GolfError: a bad option, input or disk, or a training run that failed; the message says what would be valid.
    """
    config.rows_per_micro_batch(world_size_of(environment))
    check_kernels(on_gpu=runs_on_gpu(config.device))
    is_main = rank_of(environment) == 0
    # the watchdog finds out earlier, and says who
    patience = max(TIMEOUT, timedelta(seconds=1.2 * longest_patience(config.hang_timeout)))
    with StopRequest(announce=is_main) as stop, determinism(config.deterministic):
        inputs = open_inputs(config)
        start = choose_start(config, environment, inputs.digests) if is_main else Start(directory_of(config))
        try:
            with (
                RunLog(start.directory, enabled=is_main, resume=start.resumes) as log,
                process_group(config.device, environment, timeout=patience) as ranks,
                Watchdog(ranks, stop, config.hang_timeout) as watchdog,
                open_loader(config, ranks) as loader,
            ):
                stop.farewell = lambda: _leave(start.directory, stop, watchdog, is_main=is_main)
                return _run(config, inputs, start, loader, ranks, log, stop, launcher_of(environment))
        except Stopped as stopped:
            if is_main:
                print(_how_to_go_on(start.directory, stop, str(stopped)), flush=True)
            return {}


def _run(
    config: Config,
    inputs: Inputs,
    start: Start,
    loader: Loader,
    ranks: Ranks,
    log: RunLog,
    stop: StopRequest,
    launcher: str,
) -> dict[str, Any]:
    """What `run` does once ranks, log and data are there."""
    found = versions() if ranks.is_main else {}
    checkpoint = start.shared(ranks)
    first = first_state(
        checkpoint,
        config=config,
        inputs=inputs.digests,
        world_size=ranks.world_size,
        batches=loader.state_dict(),
    )
    if ranks.is_main:
        where = {"config": config.to_dict(), "world_size": ranks.world_size, "versions": found, "launcher": launcher}
        if start.resumes:
            log.event("resume", step=first.step, checkpoint=start.path and start.path.name, **where)
        else:
            log.event("start", **where)
        write_json(start.directory / CONFIG_NAME, config.to_dict())
        rows = config.rows_per_micro_batch(ranks.world_size)
        print(
            f"run {start.directory} on {ranks.world_size} x {found['gpu'] or 'CPU'}, {loader.micro_batches_per_step} "
            f"micro-batches of {rows} x {config.train_seq_len} tokens a rank and step",
            flush=True,
        )
        if checkpoint is not None and checkpoint.state.code != first.code:
            print("the code has changed since that checkpoint: an undisturbed run may have differed", flush=True)
    evaluator = Evaluator(
        inputs.text,
        ranks,
        length=config.eval_seq_len,
        stride=config.eval_stride,
        batch_tokens=config.val_batch_size,
    )
    with Checkpoints(config, log, ranks.device, first) as checkpoints:
        model, result, scores = _train(config, loader, ranks, log, evaluator, checkpoints, checkpoint, stop)
    path = start.directory / ARTIFACT_NAME
    artifact, artifact_scores = _export(config, model, inputs, ranks, evaluator, path)
    scores.update(artifact_scores)
    log.event("scored", **scores)
    summary: dict[str, Any] = {}
    if ranks.is_main:
        liveness.enter("report")
        submitted = submission.check_submission(
            path,
            prefix=config.paid_prefix_file or None,
            train_seconds=result.seconds,
            scored=scores["val_bpb"] is not None,
        )
        by_part = parts.bytes_by_part(artifact, submitted.artifact_bytes, show_progress=True)
        summary = _summary(config, inputs, result, scores, submitted, by_part, model, ranks, found)
        summary["resumed_at_steps"] = list(first.resumed_at)
        write_json(start.directory / SUMMARY_NAME, summary)
        print(report.describe(summary), flush=True)
        print(f"\nartifact: {path}", flush=True)
        print(f"report: {report.draw(start.directory)}", flush=True)
    return summary


def _leave(directory: Path, stop: StopRequest, watchdog: Watchdog, *, is_main: bool) -> int:
    """Ends a run that is asked to stop where there is nothing left to save; the status to leave with."""
    status = watchdog.farewell()
    if is_main:
        remove_temporaries(directory)
        newest = next(iter(checkpoints_in(directory)), None)
        where = "before its first checkpoint" if newest is None else f"its newest checkpoint is {newest.name}"
        print(_how_to_go_on(directory, stop, where), flush=True)
    return status


def _how_to_go_on(directory: Path, stop: StopRequest, where: str) -> str:
    return f"stopped by {stop.requested}, {where}; go on with the same command and --resume {directory}"


def check_kernels(*, on_gpu: bool) -> None:
    """Refuses a `GOLF_KERNELS` under which the ops could not run.

    Raises:
        ConfigError: it is none of its choices, or "triton" where there is neither a GPU nor Triton's interpreter.
    """
    try:
        choice = dispatch.chosen()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if choice == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("GOLF_KERNELS is 'triton', which needs a GPU; use auto")


def open_inputs(config: Config) -> Inputs:
    """The tokenizer, the validation text and the paid prefix of a config, checked against each other.

    Training shards have their headers checked here too, so that a damaged one shows before the ranks meet.

    Raises:
        GolfError: one of them is missing, damaged, or at odds with the config.
    """
    tokenizer = Tokenizer(config.tokenizer_path, config.vocab_size)
    if tokenizer.bos_id != config.bos_token_id:
        raise ConfigError(
            f"BOS_TOKEN_ID (--bos-token-id) is {config.bos_token_id}: the tokenizer {config.tokenizer_path} starts "
            f"documents with {tokenizer.bos_id}"
        )
    for path in find_shards(config.data_path, "train"):
        open_shard(path)
    text = load_validation_text(config.data_path, tokenizer)
    plan_windows(text.num_targets, config.eval_seq_len, config.eval_stride or config.eval_seq_len)
    if not config.paid_prefix_file:
        return Inputs(tokenizer, text, 0)
    covered = prefix.load_prefix(config.paid_prefix_file, config.paid_prefix_codec, np.asarray(text.tokens[1:]))
    return Inputs(tokenizer, text, len(covered))


def open_loader(config: Config, ranks: Ranks) -> Loader:
    """This rank's training batches."""
    return make_loader(
        directory=config.data_path,
        order=config.data_order,
        seq_len=config.train_seq_len,
        batch_tokens=config.train_batch_tokens,
        micro_batch_tokens=config.rows_per_micro_batch(ranks.world_size) * config.train_seq_len,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        vocab_size=config.vocab_size,
        device=ranks.device,
    )


def build_model(config: Config, ranks: Ranks) -> GPT:
    """The initial model: seeded, on the device, the same on every rank."""
    torch.manual_seed(config.seed)
    model = GPT(config).to(ranks.device)
    ranks.broadcast_parameters(model.parameters())
    return model


def _train(
    config: Config,
    loader: Loader,
    ranks: Ranks,
    log: RunLog,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
) -> tuple[GPT, TrainingResult, dict[str, float]]:
    """Trains and averages; returns the model as it will be exported, and its scores before quantization."""
    model = build_model(config, ranks)
    token_losses = compiled(model.token_losses, config.compile, ranks.device, gains=model.gains_from_compiling)

    def bits_per_byte() -> float:
        return evaluator.side_by_side(token_losses, "validating").bits_per_byte

    trainer = Trainer(
        config,
        model,
        compiled(model, config.compile, ranks.device, gains=model.gains_from_compiling),
        loader,
        loader.micro_batches_per_step,
        ranks,
        log,
        bits_per_byte,
        checkpoints,
        stop,
    )
    if checkpoint is None or not checkpoint.state.ended:
        trainer.warm_up()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    result = trainer.train()
    loader.close()
    model.eval()
    liveness.enter("averaging")
    scores = {"val_bpb_training": bits_per_byte()}
    faults.reach("averaging")
    averaged = trainer.average.apply()
    scores["val_bpb_averaged"] = bits_per_byte() if averaged else scores["val_bpb_training"]
    log.event("trained", steps=result.steps, train_seconds=result.seconds, averaged=result.averaged_copies, **scores)
    return model, result, scores


def _export(
    config: Config, model: GPT, inputs: Inputs, ranks: Ranks, evaluator: Evaluator, path: Path
) -> tuple[Artifact, dict[str, float | None]]:
    """Writes the artifact to `path`, reads the file back on every rank, and scores what it holds."""
    written = None
    liveness.enter("writing the artifact")
    if ranks.is_main:
        artifact = readback.pack_model(model, inputs.tokenizer.digest, show_progress=True)
        write_artifact(path, artifact, show_progress=True)
        written = path.read_bytes()
    artifact = decode_artifact(ranks.broadcast_bytes(written), str(path))
    liveness.enter("scoring")
    read_back = readback.unpack_model(artifact, ranks.device, str(path))
    token_losses = compiled(read_back.token_losses, config.compile, ranks.device, gains=read_back.gains_from_compiling)
    scores = evaluator.both(token_losses, prefix_targets=inputs.prefix_targets)
    return artifact, {
        "val_bpb_int6": scores.side_by_side,
        "val_bpb": scores.sliding,
        "val_bpb_with_prefix": scores.with_prefix,
    }


def _summary(
    config: Config,
    inputs: Inputs,
    result: TrainingResult,
    scores: dict[str, float | None],
    submitted: submission.Submission,
    bytes_by_part: dict[str, int],
    model: GPT,
    ranks: Ranks,
    found: dict[str, Any],
) -> dict[str, Any]:
    on_gpu = ranks.device.type == "cuda"
    return {
        "val_bpb": scores["val_bpb"],
        "val_bpb_training": scores["val_bpb_training"],
        "val_bpb_averaged": scores["val_bpb_averaged"],
        "val_bpb_int6": scores["val_bpb_int6"],
        "val_bpb_with_prefix": scores["val_bpb_with_prefix"],
        **submitted.summary(),
        "artifact_bytes_by_part": bytes_by_part,
        "train_seconds": result.seconds,
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "averaged_copies": result.averaged_copies,
        "parameters": sum(tensor.numel() for tensor, _ in exported_parameters(model).values()),
        "validation_targets": inputs.text.num_targets,
        "validation_bytes": int(inputs.text.target_bytes.sum()),
        "validation_digest": inputs.text.digest,
        "world_size": ranks.world_size,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "kernels": os.environ.get("GOLF_KERNELS", "auto"),
        "seed": config.seed,
        "versions": found,
    }
