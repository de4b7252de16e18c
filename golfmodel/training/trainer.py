"""The training loop: warm-up, steps, log lines, averaging. It never sees a validation text."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.optim.averaging import WeightAverage
from golfmodel.optim.groups import Optimizers
from golfmodel.optim.schedule import learning_rate_scale, muon_momentum
from golfmodel.runtime import faults, liveness
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import TrainingError
from golfmodel.runtime.progress import Progress
from golfmodel.runtime.runlog import RunLog
from golfmodel.runtime.stopping import Stopped, StopRequest
from golfmodel.training.checkpoint import Checkpoint
from golfmodel.training.checkpointing import Checkpoints
from golfmodel.training.clock import TrainingClock
from golfmodel.training.snapshot import Training
from golfmodel.training.step import UNRECORDED_STEPS, Step

SWA_BELOW_LR_SCALE = 0.5
NEVER = 2**62


class Batches(Protocol):
    """Where micro-batches come from: (inputs `[B, T]`, targets `[B, T]`), int64, on the device."""

    def __next__(self) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did: steps, training seconds, tokens over all ranks, copies in the weight average."""

    steps: int
    seconds: float
    tokens: int
    averaged_copies: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """Trains `model` in place.

    Args:
        model: on the ranks' device, with the same weights on every rank.
        loss: the training loss of (inputs, targets); `model` itself, or its compiled form.
        batches: this rank's micro-batches.
        micro_batches: how many make a step.
        validate: called every `VAL_LOSS_EVERY` steps, outside the training time; returns bits per byte.
        checkpoints: of the run; None for none.
        stop: whether someone asked for a stop; None where nobody can.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        batches: Batches,
        micro_batches: int,
        ranks: Ranks,
        log: RunLog,
        validate: Callable[[], float] | None = None,
        checkpoints: Checkpoints | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.model, self.ranks, self.log = config, model, ranks, log
        self.average = WeightAverage(model.parameters())
        self._batches, self._micro_batches = batches, micro_batches
        self._validate, self._checkpoints, self._stop = validate, checkpoints, stop
        self._optimizers = Optimizers(model, config, ranks)
        self._step = Step(loss, self._optimizers, micro_batches, ranks.device)
        self._training = Training(model, self._optimizers, self.average, ranks)
        self._clock = TrainingClock(ranks.device)
        self._first_bad_step = torch.tensor(NEVER, device=ranks.device)
        self._bpb: float | None = None
        self._last_logged = (0, 0.0)
        self._first_step, self._ended = 0, False

    def warm_up(self) -> None:
        """Takes `WARMUP_STEPS` steps, then puts everything back.

        They compile what later ones run, and as `Step` says the third is recorded.
        """
        if self.config.warmup_steps == 0:
            return
        self.model.train()
        liveness.enter("warm-up")
        weights = [p.detach().clone() for p in self.model.parameters()]
        position = self._batches.state_dict()
        with Progress("warm-up", self.config.warmup_steps, unit="steps", enabled=self.ranks.is_main) as progress:
            for step in range(self.config.warmup_steps):
                faults.reach("warm-up")
                self._take_step(step, lr_scale=1.0)
                progress.update()
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), weights)
        self._optimizers.reset()
        self._batches.load_state_dict(position)
        self._first_bad_step.fill_(NEVER)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; after `warm_up`, before `train`.

        Raises:
            DataError: the checkpoint's data are not this run's.
        """
        state = checkpoint.state
        self._batches.load_state_dict(state.batches)
        self._training.restore(checkpoint)
        self._clock.restore(state.train_seconds, state.slowest_step)
        self._first_step, self._ended = state.step, state.ended
        self._last_logged = state.last_logged

    def train(self) -> TrainingResult:
        """Steps until `ITERATIONS` or the time limit, whichever comes first; none where a checkpoint says it is over.

        Raises:
            TrainingError: the loss stopped being finite; says at which step.
            Stopped: someone asked for a stop; a checkpoint of the last step is written.
            StorageError: someone did, and it cannot be written.
        """
        step = self._first_step
        if not self._ended:
            liveness.enter("training", slow=self.config.warmup_steps <= UNRECORDED_STEPS)
            with self._stop.at_step_ends() if self._stop is not None else nullcontext():
                step = self._steps()
                self._step.forget()
                self._check_finite()
                self._ended = True
                if self._checkpoints is not None and self._checkpoints.wanted:
                    self._save(step)
                    self._checkpoints.wait()
        return TrainingResult(
            steps=step,
            seconds=self._clock.seconds,
            tokens=step * self.config.train_batch_tokens,
            averaged_copies=self.average.copies,
        )

    def _steps(self) -> int:
        """Takes all steps there are; returns how many the run then has."""
        config, step = self.config, self._first_step
        self.model.train()
        self._clock.resume()
        with Progress("training", config.iterations, unit="steps", enabled=self.ranks.is_main) as progress:
            progress.update(step)
            while step < config.iterations:
                self._clock.wait_for_room()
                elapsed, end, save, stop = self._agree(step)
                if stop:
                    self._stop_here(step)
                if save:
                    self._save(step)
                if step and config.max_wallclock_seconds and end > config.max_wallclock_seconds:
                    break
                lr_scale = learning_rate_scale(config, step, elapsed)
                liveness.begin_step(step + 1)
                faults.reach("step")
                loss = self._take_step(step, lr_scale)
                step += 1
                self._clock.step_launched()
                if config.swa_enabled and lr_scale < SWA_BELOW_LR_SCALE and step % config.swa_every == 0:
                    self.average.add()
                planned, status = self._status(step, elapsed)
                progress.expect(planned)
                progress.update(1, **status)
                if step % config.train_log_every == 0 or step == 1:
                    self._log_step(step, loss, lr_scale, progress)
                if self._validate is not None and config.val_loss_every and step % config.val_loss_every == 0:
                    self._log_validation(step, progress)
        self._clock.pause()
        return step

    def _take_step(self, step: int, lr_scale: float) -> Tensor:
        """One optimizer step; returns this rank's mean loss, on the device, until the next step."""
        self._optimizers.set_schedule(lr_scale=lr_scale, momentum=muon_momentum(self.config, step))
        loss = self._step(next(self._batches) for _ in range(self._micro_batches))
        bad = torch.where(loss.isfinite(), NEVER, step + 1)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        return loss

    def _agree(self, step: int) -> tuple[float, float, bool, bool]:
        """What all ranks have to do alike, as rank 0 sees it, in one message between hosts.

        Returns:
            its training time; its forecast of the next step's end; whether a checkpoint is due; whether to stop, of
            which the watchdog tells rank 0 where it was another rank that was asked.
        """
        seconds = self._clock.seconds
        save = self.ranks.is_main and self._checkpoints is not None and self._checkpoints.due(step, seconds)
        stop = self._stop is not None and self._stop.requested != ""
        elapsed, end, save, stop = self.ranks.broadcast_numbers([seconds, self._clock.end_of_next_step(), save, stop])
        return elapsed, end, bool(save), bool(stop)

    def _save(self, step: int) -> None:
        """Copies everything and has it written; for all ranks together."""
        started = time.perf_counter()
        tensors = self._training.copied()
        if self._checkpoints is None or not self.ranks.is_main:
            return
        state = replace(
            self._checkpoints.start,
            step=step,
            train_seconds=self._clock.seconds,
            slowest_step=self._clock.slowest,
            ended=self._ended,
            last_logged=self._last_logged,
            averaged_copies=self.average.copies,
            batches=self._batches.state_dict(),
        )
        self._checkpoints.write(state, tensors, held_seconds=time.perf_counter() - started)

    def _stop_here(self, step: int) -> None:
        assert self._stop is not None
        self._stop.request("rank 0")  # which may have heard of it first
        self._clock.pause()
        self._check_finite()
        if self._checkpoints is not None:
            if step:
                self._save(step)
            self._checkpoints.wait(insist=True)
        self.log.event("stopped", step=step, by=self._stop.requested)
        raise Stopped(f"after step {step} of {self.config.iterations}")

    def _status(self, step: int, elapsed: float) -> tuple[int, dict[str, str]]:
        """How many steps the run will have, by its speed so far, and what stands beside the progress bar."""
        config = self.config
        if not elapsed:
            return config.iterations, {}
        mean = elapsed / max(step - 1, 1)
        left = mean * (config.iterations - step)
        if config.max_wallclock_seconds:
            left = max(0.0, min(left, config.max_wallclock_seconds - elapsed))
        fields = {"tok/s": f"{config.train_batch_tokens / mean:,.0f}", "left": f"{left:.0f}s"}
        return step + round(left / mean), fields

    def _log_step(self, step: int, loss: Tensor, lr_scale: float, progress: Progress) -> None:
        self._check_finite()
        mean_loss = self.ranks.reduce_sum(loss).item() / self.ranks.world_size
        seconds = self._clock.seconds
        last_step, last_seconds = self._last_logged
        tokens_per_second = (step - last_step) * self.config.train_batch_tokens / (seconds - last_seconds)
        self._last_logged = (step, seconds)
        progress.update(0, loss=f"{mean_loss:.4f}", **({} if self._bpb is None else {"bpb": f"{self._bpb:.4f}"}))
        progress.write(
            f"step:{step}/{self.config.iterations} train_loss:{mean_loss:.4f} lr_scale:{lr_scale:.3f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / step:.2f}ms tok/s:{tokens_per_second:,.0f}"
        )
        self.log.event(
            "train",
            step=step,
            train_loss=mean_loss,
            lr_scale=lr_scale,
            train_seconds=seconds,
            tokens_per_second=tokens_per_second,
        )

    def _log_validation(self, step: int, progress: Progress) -> None:
        assert self._validate is not None
        liveness.enter("validation")
        self._clock.pause()
        self._check_finite()
        self.model.eval()
        self._bpb = self._validate()
        self.model.train()
        seconds = self._clock.seconds
        progress.update(0, bpb=f"{self._bpb:.4f}")
        progress.write(f"step:{step}/{self.config.iterations} val_bpb_training:{self._bpb:.4f} at {seconds:.1f}s")
        self.log.event("validation", step=step, val_bpb_training=self._bpb, train_seconds=seconds)
        liveness.enter("training", slow=False)
        self._clock.resume()

    def _check_finite(self) -> None:
        first = int(self.ranks.reduce_min(self._first_bad_step).item())
        if first < NEVER:
            self.log.event("not_finite", step=first)
            place = self.log.directory if self.ranks.is_main else "the run directory of rank 0"
            raise TrainingError(
                f"the training loss is not finite since step {first}: training stopped, the log is kept in {place}; "
                f"try lower learning rates (MATRIX_LR {self.config.matrix_lr}, "
                f"SCALAR_LR {self.config.scalar_lr}) or look at the batch of that step"
            )
