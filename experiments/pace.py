"""How far a run is: counts kept by the training, read by whoever wants to know."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from experiments.run import Run
from experiments.unfinished import AnyCell
from lifelong_ens.report.status import Status, mean_accuracy
from strategies.base import Strategy

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


class Pace:
    """Of the run of a strategy. Training only counts; ``status`` may be asked from another thread."""

    def __init__(self, cell: AnyCell) -> None:
        self.cell = cell
        self.run: Run | None = None
        self.part = ""
        self._began = time.monotonic()
        self._steps = self._steps_before = self._resumed = self._finished = 0
        self._per_task: list[int] = []
        self._loss: float | None = None
        self._speed = Speed()

    def begin(self, run: Run) -> None:
        """The run is there, and goes on from what it has finished."""
        self._per_task = _steps_per_task(run)
        self._finished = len(run.progress.tasks)
        self._resumed = sum(self._per_task[: self._finished])
        self.run = run

    def step(self) -> None:
        """A step was made."""
        self._steps += 1

    def task(self) -> None:
        """A task is finished."""
        run = self.run
        self._finished = 0 if run is None else len(run.progress.tasks)
        self._steps_before = self._steps
        self.part = ""

    def phase(self, words: str) -> None:
        """A part of a task's training begins."""
        self.part = words

    @property
    def done(self) -> int:
        """Steps so far, those of earlier tasks as many as were expected of them."""
        here = self._per_task[self._finished : self._finished + 1]
        within = min(self._steps - self._steps_before, *here) if here else 0
        return sum(self._per_task[: self._finished]) + within

    def status(self) -> Status:
        """How far it is; reading the loss waits for the device."""
        label, name = self.cell.label(), self.cell.named.name
        seconds = time.monotonic() - self._began
        begun = Status(label, name, "running", seconds=seconds, memory_bytes=peak_memory())
        run = self.run
        if run is None:
            return replace(begun, doing="starting")
        strategy, done, total = run.strategy, self.done, max(sum(self._per_task), 1)
        # until its first step, the clock is that of the task before
        begun_task = self._steps > self._steps_before
        epochs, epoch = strategy.train_epochs, strategy.clock.train_exp_epochs + 1 if begun_task else 1
        fresh = done - self._resumed
        cuda = strategy.device.type == "cuda"
        return replace(
            begun,
            doing=run.doing or self.part,
            task=min(self._finished + 1, len(self._per_task)),
            num_tasks=len(self._per_task),
            epoch=0 if run.doing else epoch,
            epochs=epochs if epoch <= epochs else 0,
            loss=self._newest_loss(run),
            accuracy=mean_accuracy(run.progress.accuracy),
            images_per_second=self._speed.after(run.costs.meter.rows),
            share=done / total,
            seconds_left=seconds * (total - done) / fresh if fresh > 0 else None,
            device_bytes=torch.cuda.max_memory_allocated(strategy.device) if cuda else None,
        )

    def _newest_loss(self, run: Run) -> float | None:
        """That of the last step, also between two epochs."""
        newest = run.costs.newest_loss
        self._loss = self._loss if newest is None else newest
        return self._loss


class EnsemblePace:
    """Of the training of an ensemble, which says what it trains and in how many steps, one thing after the other."""

    def __init__(self, cell: AnyCell, rows: int, batch_size: int, device: torch.device) -> None:
        self.cell, self.batch_size, self.device = cell, batch_size, device
        self.steps_per_epoch = math.ceil(rows / batch_size)
        self.part, self.measuring = "starting", False
        self._began = time.monotonic()
        self._all = self._steps = self._phase_steps = 0
        self._share = 0.0
        self._speed = Speed()

    def phase(self, label: str, steps: int) -> Callable[[], None]:
        """So many steps of something begin; what is returned is called after each."""
        self.part, self._steps, self._phase_steps = label, 0, steps
        return self.step

    def step(self) -> None:
        """A step was made."""
        self._steps += 1
        self._all += 1

    def status(self) -> Status:
        """How far it is."""
        steps, seconds = min(self._steps, self._phase_steps), time.monotonic() - self._began
        within = steps / max(self._phase_steps, 1)
        part = re.search(r"(\d+)/(\d+)", self.part)
        number, parts = (int(part[1]), int(part[2])) if part else (1, 1)
        self._share = max(self._share, (number - 1 + within) / max(parts, 1))
        training = bool(self._phase_steps) and not self.measuring
        return Status(
            self.cell.label(),
            self.cell.named.name,
            "running",
            doing="measuring" if self.measuring else self.part,
            epoch=min(steps, self._phase_steps - 1) // self.steps_per_epoch + 1 if training else 0,
            epochs=math.ceil(self._phase_steps / self.steps_per_epoch),
            images_per_second=self._speed.after(self._all * self.batch_size),
            share=self._share,
            seconds=seconds,
            seconds_left=seconds * (1 - self._share) / self._share if self._share and training else None,
            memory_bytes=peak_memory(),
            device_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )


class Speed:
    """Images in a second, a running mean over the last few seconds in which some were trained."""

    def __init__(self) -> None:
        self._rows, self._time = 0, time.monotonic()
        self._mean: float | None = None

    def after(self, rows: int) -> float | None:
        """The speed when so many have been trained; None before the first."""
        now = time.monotonic()
        if rows > self._rows and now > self._time:
            newest = (rows - self._rows) / (now - self._time)
            keep = 0.0 if self._mean is None else math.exp((self._time - now) / 3)
            self._mean = keep * (self._mean or 0.0) + (1 - keep) * newest
        self._rows, self._time = rows, now
        return self._mean


def peak_memory() -> int | None:
    """Most bytes that this process has had in memory; None where the system does not say."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _steps_per_task(run: Run) -> list[int]:
    """About how many training steps every task takes; one number where all are trained together."""
    strategy = run.strategy
    lengths = [len(experience.dataset) for experience in run.experiences]  # pyright: ignore
    if isinstance(strategy, Strategy):
        steps = [strategy.steps_for(length, task) for task, length in enumerate(lengths)]
    else:
        steps = [-(-length // strategy.train_mb_size) * strategy.train_epochs for length in lengths]
    return [sum(steps)] if getattr(strategy, "joint", False) else steps
