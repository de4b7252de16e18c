"""What only a GPU can show: bfloat16 under the compiler, the block-sparse document mask, a whole run, its bits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import starting
import torch

from golfmodel import pipeline
from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.runtime.compiling import compiled
from golfmodel.runtime.runlog import read_events
from golfmodel.runtime.versions import PROJECT_ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(tiny_options) -> Config:
    changes = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "num_layers": 3,
        "model_dim": 256,
        "num_heads": 4,
        "train_seq_len": 256,
        "eval_seq_len": 256,
        "train_batch_tokens": 4096,
        "micro_batch_tokens": 4096,
    }
    return Config(**{**tiny_options, **changes})


def randomised(config: Config) -> GPT:
    """A model on the GPU with no zero-initialised weight left to hide an error behind."""
    torch.manual_seed(3)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.cuda()


def exact_copy(model: GPT) -> GPT:
    """The same weights, computed in float64."""
    copy = GPT(dataclasses.replace(model.config, compute_dtype="float32"))
    copy.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    copy.rotary.dtype = torch.float64
    return copy.cuda().double()


def batch(rows: int, length: int, *, document_every: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    tokens = torch.randint(2, 1024, (rows, length + 1), device="cuda")
    tokens[torch.rand(tokens.shape, device="cuda") < 1 / document_every] = 1
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("document_boundaries", "training", "implementation"),
    [(False, True, "auto"), (True, True, "auto"), (True, False, "auto"), (True, False, "reference")],
)
def test_compiled_bfloat16_is_as_near_the_truth_as_eager(
    config, monkeypatch, document_boundaries, training, implementation
):
    """Without gradients as well, as scoring runs it: the compiler then lays memory out in other ways."""
    config = dataclasses.replace(config, document_boundaries=document_boundaries)
    model = randomised(config)
    inputs, targets = batch(8, 256)
    truth = exact_copy(model).token_losses(inputs, targets).detach().double()
    eager = relative_error(model.token_losses(inputs, targets), truth)
    monkeypatch.setenv("GOLF_KERNELS", implementation)
    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        fused = relative_error(
            compiled(model.token_losses, "on", torch.device("cuda"), gains=True)(inputs, targets), truth
        )
    assert 0 < eager < 0.02
    assert fused <= 2 * eager


@pytest.mark.parametrize("document_boundaries", [False, True])
def test_compiled_gradients_are_as_near_the_truth_as_eager(config, document_boundaries):
    config = dataclasses.replace(config, document_boundaries=document_boundaries, mtp_num_heads=1)
    inputs, targets = batch(8, 256)

    def gradients(model: GPT, compile_choice: str) -> torch.Tensor:
        model.zero_grad()
        compiled(model, compile_choice, torch.device("cuda"), gains=True)(inputs, targets).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    model = randomised(config)
    truth = gradients(exact_copy(model), "off")
    eager = relative_error(gradients(model, "off"), truth)
    fused = relative_error(gradients(model, "on"), truth)
    assert 0 < eager < 0.1
    assert fused <= 2 * eager


def test_document_boundaries_hide_earlier_documents(config):
    """The block-sparse path: a document's losses do not depend on what stands before it."""
    model = randomised(dataclasses.replace(config, document_boundaries=True))
    losses = compiled(model.token_losses, "on", torch.device("cuda"), gains=True)
    inputs, targets = batch(4, 256, document_every=10**9)
    inputs[:, 100] = 1
    before = losses(inputs, targets)
    inputs[:, :100] = torch.randint(2, 1024, (4, 100), device="cuda")
    after = losses(inputs, targets)
    assert torch.equal(before[:, 100:], after[:, 100:])
    assert not torch.allclose(before[:, 1:99], after[:, 1:99])


def test_the_pipeline_runs_and_a_fresh_process_scores_alike(config):
    summary = pipeline.run(dataclasses.replace(config, iterations=30), {})
    assert summary["val_bpb"] < 3.5
    assert summary["versions"]["gpu"] == torch.cuda.get_device_name()
    artifact = Path(config.runs_dir) / config.run_id / pipeline.ARTIFACT_NAME
    paths = [f"--data-path={config.data_path}", f"--tokenizer-path={config.tokenizer_path}"]
    command = [sys.executable, "-m", "golfmodel.evaluation", str(artifact), *paths]
    result = subprocess.run(command, cwd=PROJECT_ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    again = json.loads(result.stdout)
    assert again["val_bpb"] == pytest.approx(summary["val_bpb"], rel=1e-6)
    assert again["val_bpb_int6"] == pytest.approx(summary["val_bpb_int6"], rel=1e-6)


def test_training_with_the_kernels_is_as_near_the_truth_as_with_the_reference(config, monkeypatch):
    """100 steps in bfloat16 from each of three seeds, fake quantization and document boundaries included.

    The truth is the reference in float32. How far training drifts from it by rounding alone, the reference in bfloat16
    shows; one run's drift is a noisy sample, so the three are taken together.
    """
    rates = {"matrix_lr": 0.025, "scalar_lr": 0.025, "tied_embed_lr": 0.035}
    config = dataclasses.replace(config, iterations=100, qat_enabled=True, document_boundaries=True, **rates)
    drifts, scores = {"kernels": [], "reference": []}, {"kernels": [], "reference": []}
    for seed in (1, 2, 3):
        losses, val_bpb = {}, {}
        for name, implementation, changes in (
            ("truth", "reference", {"compute_dtype": "float32", "compile": "off"}),
            ("reference", "reference", {"compile": "on"}),
            ("kernels", "auto", {"compile": "on"}),
        ):
            monkeypatch.setenv("GOLF_KERNELS", implementation)
            torch.compiler.reset()
            run_id = f"{name}-{seed}"
            summary = pipeline.run(dataclasses.replace(config, run_id=run_id, seed=seed, **changes), {})
            val_bpb[name] = summary["val_bpb"]
            log = Path(config.runs_dir) / run_id / "log.jsonl"
            losses[name] = torch.tensor([event["train_loss"] for event in read_events(log, "train")])
        assert len(losses["truth"]) == 100
        assert not torch.equal(losses["kernels"], losses["reference"])  # else both ran the same
        for name, drift in drifts.items():
            drift.append(losses[name] / losses["truth"] - 1)
            scores[name].append(val_bpb[name] / val_bpb["truth"] - 1)

    def size(drift: list) -> float:
        return float(torch.as_tensor(drift).square().mean().sqrt())

    for steps in (10, 100):
        kernels, reference = (torch.stack(drifts[name])[:, :steps] for name in ("kernels", "reference"))
        assert size(kernels) <= 2 * size(reference), f"over {steps} steps"
    assert size(scores["kernels"]) <= 2 * max(size(scores["reference"]), size(torch.stack(drifts["reference"])))


def test_the_time_limit_holds_though_the_host_runs_ahead(config):
    config = dataclasses.replace(
        config, max_wallclock_seconds=3.0, iterations=10**6, train_log_every=10**6, val_loss_every=0
    )
    summary = pipeline.run(config, {})
    assert 2.5 < summary["train_seconds"] <= 3.0


@pytest.mark.parametrize(
    "changes", [{}, {"document_boundaries": True, "qat_enabled": True, "mtp_num_heads": 1}, {"mlp_fp8": True}]
)
def test_deterministic_twice_and_stopped_and_resumed_give_the_same_bits(config, changes):
    """Weights of the last checkpoint and the artifact, in bfloat16; each run in a process of its own.

    With validation and averaging between steps. One records its step among the throw-away ones, and then resumes or
    begins anew in the same memory; another records the third that counts.
    """
    options = {
        **dataclasses.asdict(config),
        **changes,
        "deterministic": True,
        "iterations": 30,
        "checkpoint_seconds": 0.0,
        "checkpoint_every": 7,
    }
    warmup = {"one": 4, "another": 0, "stopped": 4}
    runs = {name: {**options, "run_id": name, "warmup_steps": steps} for name, steps in warmup.items()}
    for name, faults in (("one", ""), ("another", ""), ("stopped", "term@step:17")):
        result = starting.run(runs[name], faults=faults)
        assert result.returncode == 0, result.stderr[-3000:]
    result = starting.run({**runs["stopped"], "resume": "auto"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "after step 17, " in result.stdout
    starting.check_same(runs["another"], runs["one"])
    starting.check_same(runs["stopped"], runs["one"])
    assert starting.last_tensors_of(runs["stopped"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_and_give_the_same_bits_when_stopped_and_resumed(config):
    """Over NCCL, averaging while backward goes on: in a recorded step as in one that is not, for a fault is planned."""
    options = {
        **dataclasses.asdict(dataclasses.replace(config, iterations=30, data_order="shuffled")),
        "deterministic": True,
        "checkpoint_seconds": 0.0,
        "checkpoint_every": 7,
        "micro_batch_tokens": 2048,
        "num_layers": 6,
        "warmup_steps": 4,
    }
    faults = {"one": "", "unrecorded": "nan@gradient:1000/1", "stopped": "term@step:17/1", "alone": ""}
    runs = {name: {**options, "run_id": name} for name in faults}
    for name, planned in faults.items():
        result = starting.run(runs[name], ranks=1 if name == "alone" else 2, faults=planned)
        assert result.returncode == 0, result.stderr[-3000:]
    result = starting.run({**runs["stopped"], "resume": "auto"}, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    starting.check_same(runs["stopped"], runs["one"])
    starting.check_same(runs["unrecorded"], runs["one"])
    # sums in another order, and two bfloat16 gradients where there was one
    assert starting.result_of(runs["one"])[0] == pytest.approx(starting.result_of(runs["alone"])[0], rel=5e-3)


def test_checkpoints_cost_less_than_a_hundredth_of_the_training(config):
    """One a second, sixty times as many as by default."""
    config = dataclasses.replace(
        config, max_wallclock_seconds=6.0, iterations=10**6, checkpoint_seconds=1.0, train_log_every=10**6
    )
    summary = pipeline.run(dataclasses.replace(config, val_loss_every=0), {})
    directory = Path(config.runs_dir) / config.run_id
    events = list(read_events(directory / "log.jsonl", "checkpoint"))
    assert len(events) >= 3
    assert not [event for event in events if event["problem"]]
    held = sum(event["held_seconds"] for event in events[1:])  # the first also loads what copies
    assert held < 0.01 * summary["train_seconds"]
