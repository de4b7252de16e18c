"""The training loop: warm-up, steps, log lines, averaging. It never sees a validation text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from golfmodel.config import Config
from golfmodel.optim.averaging import WeightAverage
from golfmodel.optim.groups import Optimizers
from golfmodel.optim.schedule import learning_rate_scale, muon_momentum
from golfmodel.runtime.distributed import Ranks
from golfmodel.runtime.errors import TrainingError
from golfmodel.runtime.progress import Progress
from golfmodel.runtime.runlog import RunLog
from golfmodel.training.clock import TrainingClock

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
    ) -> None:
        self.config, self.model, self.ranks, self.log = config, model, ranks, log
        self.average = WeightAverage(model.parameters())
        self._loss, self._batches, self._micro_batches = loss, batches, micro_batches
        self._validate = validate
        self._optimizers = Optimizers(model, config, ranks)
        self._clock = TrainingClock(ranks.device)
        self._first_bad_step = torch.tensor(NEVER, device=ranks.device)
        self._bpb: float | None = None
        self._last_logged = (0, 0.0)

    def warm_up(self) -> None:
        """Takes `WARMUP_STEPS` steps that prime every compiled path, then puts everything back as it was."""
        if self.config.warmup_steps == 0:
            return
        weights = [p.detach().clone() for p in self.model.parameters()]
        position = self._batches.state_dict()
        with Progress("warm-up", self.config.warmup_steps, unit="steps", enabled=self.ranks.is_main) as progress:
            for step in range(self.config.warmup_steps):
                self._take_step(step, lr_scale=1.0)
                progress.update()
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), weights)
        self._optimizers.reset()
        self._batches.load_state_dict(position)
        self._first_bad_step.fill_(NEVER)

    def train(self) -> TrainingResult:
        """Steps until `ITERATIONS` or the time limit, whichever comes first.

        Raises:
            TrainingError: the loss stopped being finite; says at which step.
        """
        config, step = self.config, 0
        self.model.train()
        self._clock.resume()
        with Progress("training", config.iterations, unit="steps", enabled=self.ranks.is_main) as progress:
            while step < config.iterations:
                self._clock.wait_for_room()
                elapsed, end = self._agreed_times()
                if step and config.max_wallclock_seconds and end > config.max_wallclock_seconds:
                    break
                lr_scale = learning_rate_scale(config, step, elapsed)
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
        self._check_finite()
        return TrainingResult(
            steps=step,
            seconds=self._clock.seconds,
            tokens=step * config.train_batch_tokens,
            averaged_copies=self.average.copies,
        )

    def _take_step(self, step: int, lr_scale: float) -> Tensor:
        """One optimizer step; returns this rank's mean loss, on the device."""
        total = torch.zeros((), device=self.ranks.device)
        for _ in range(self._micro_batches):
            inputs_BT, targets_BT = next(self._batches)
            loss = self._loss(inputs_BT, targets_BT) / self._micro_batches
            loss.backward()
            total += loss.detach()
        self._optimizers.set_schedule(lr_scale=lr_scale, momentum=muon_momentum(self.config, step))
        self._optimizers.step()
        bad = torch.where(total.isfinite(), NEVER, step + 1)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        return total

    def _agreed_times(self) -> tuple[float, float]:
        """Rank 0's training time and its forecast of the next step's end, so that all ranks decide alike."""
        elapsed, end = self.ranks.broadcast_numbers([self._clock.seconds, self._clock.end_of_next_step()])
        return elapsed, end

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
        self._clock.pause()
        self._check_finite()
        self.model.eval()
        self._bpb = self._validate()
        self.model.train()
        seconds = self._clock.seconds
        progress.update(0, bpb=f"{self._bpb:.4f}")
        progress.write(f"step:{step}/{self.config.iterations} val_bpb_training:{self._bpb:.4f} at {seconds:.1f}s")
        self.log.event("validation", step=step, val_bpb_training=self._bpb, train_seconds=seconds)
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
