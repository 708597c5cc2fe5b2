"""What a run will cost, found out by its first steps: for a plan before anything is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.benchmarks import CLExperience, CLScenario
from avalanche.training.templates import SupervisedTemplate

from lifelong_ens.errors import InputError
from lifelong_ens.store import tensors_file
from lifelong_ens.training.seeding import seeded
from strategies.base import Strategy
from strategies.costs import component_sizes, forward_cost

Build = Callable[[int], SupervisedTemplate]

# of warm steps in every phase of training, by which the others are judged
WARM_SECONDS = 0.1
# of streams with more tasks the first, the second, one half way and the last are measured; those between lie on a
# parabola: a column of a progressive network reads all earlier ones, each of which has read those before it
ALL_MEASURED = 5


@dataclass(frozen=True)
class TaskCost:
    """What the training of one task will take."""

    flops: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run will have cost at its end.

    Attributes:
        parameters: Learned numbers.
        bytes: Of all components, the optimizer's state included.
        disk_bytes: Of the last checkpoint.
        flops_forward: Of one image of the last task.
        tasks: Training, in the order of the tasks; one entry in all where they are trained together.
        measured: Those of ``tasks`` whose steps were measured; the others lie between.
        at_least: Why the sizes are the least that they can be, and FLOPs and time a guess; None where all are known.
        at_most: Why FLOPs and time are the most that they can be; None where they are known.
    """

    parameters: int
    bytes: int
    disk_bytes: int
    flops_forward: int
    tasks: tuple[TaskCost, ...]
    measured: tuple[int, ...]
    at_least: str | None = None
    at_most: str | None = None

    @property
    def flops_training(self) -> float:
        """Of all tasks."""
        return math.fsum(task.flops for task in self.tasks)

    @property
    def seconds_training(self) -> float:
        """Of all tasks."""
        return math.fsum(task.seconds for task in self.tasks)


def estimate(build: Build, benchmark: CLScenario, seed: int) -> Estimate:
    """What a run of a strategy over a benchmark will cost; nothing is evaluated, and nothing is written.

    A throw-away strategy goes through the stream as a run does, but takes only the first steps of its passes over a
    task's images; the meter counts the rows of the others. Parameters, bytes and FLOPs are those of the run, as far as
    they do not follow from what is learnt.

    Args:
        build: Makes the strategy; called with torch seeded.
        benchmark: An Avalanche benchmark with task labels.
        seed: Of everything random.

    Raises:
        InputError: The strategy is not one of ours, so that its steps cannot be left out.
        UnfitNetworkError: It cannot run on its network.
    """
    with seeded(seed):
        strategy = _ours(build(seed))
        tasks, measured = _costs_of_tasks(strategy, benchmark)
        early = None if strategy.fit.patience is None else "training may stop early (--patience)"
        test: Any = benchmark.streams["test"][-1]
        data = test.dataset
        image = data.batch(torch.tensor([0]))[0] if hasattr(data, "batch") else data[0][0].unsqueeze(0)
        forward = forward_cost(strategy, image, test.task_labels[0])
        at_least = strategy.grows_by_learning()
        if at_least is not None:
            classes = strategy.network.classes_per_task
            strategy = _ours(build(seed))
            strategy.network.regrow(classes)
    stored = component_sizes(strategy).values()
    return Estimate(
        sum(size.parameters for size in stored),
        sum(size.bytes for size in stored),
        len(tensors_file(strategy.network.state_dict())),
        sum(forward.by_component.values()),
        tasks,
        measured,
        at_least,
        early,
    )


def _ours(strategy: SupervisedTemplate) -> Strategy:
    if not isinstance(strategy, Strategy):
        raise InputError("it is not one of our strategies: only its run can tell")
    return strategy


def _costs_of_tasks(
    strategy: Strategy, benchmark: CLScenario
) -> tuple[tuple[TaskCost, ...], tuple[int, ...]]:
    """What the training of every task costs, and which of them were measured."""
    experiences: list[Any] = list(benchmark.streams["train"])
    valid = benchmark.streams.get("valid")
    held_out = [[] for _ in experiences] if valid is None else [[one] for one in valid]
    ahead = LookAhead(strategy)
    if strategy.joint:
        return (ahead.learn(experiences, [one for part in held_out for one in part]),), (0,)
    count = len(experiences)
    measured = tuple(range(count)) if count <= ALL_MEASURED else (0, 1, count // 2, count - 1)
    known: dict[int, TaskCost] = {}
    for task in range(count):
        ahead.idle = task not in measured
        cost = ahead.learn(experiences[task], held_out[task])
        if task in measured:
            known[task] = cost
    images = [len(experience.dataset) for experience in experiences]
    return tuple(known.get(task) or _between(known, images, task) for task in range(count)), measured


def _between(known: Mapping[int, TaskCost], images: Sequence[int], task: int) -> TaskCost:
    """A task's cost, where cost per image is a parabola through the tasks that were measured after the first."""
    flops = seconds = 0.0
    points = [one for one in known if one]
    for point in points:
        others = [one for one in points if one != point]
        weight = math.prod((task - other) / (point - other) for other in others) / images[point]
        flops += weight * known[point].flops
        seconds += weight * known[point].seconds
    return TaskCost(images[task] * max(flops, 0.0), images[task] * max(seconds, 0.0))


class LookAhead:
    """Lets a strategy take the first steps of every pass over a task's images, and counts the others.

    Attributes:
        idle: Leave out whole trainings too: a task only adds what it stores.

    Args:
        strategy: A fresh one, which is of no use for anything else afterwards.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.idle = strategy, False
        # seconds of what was left out, by the steps that were not
        self.left_out = 0.0
        self._run_epochs = strategy.run_epochs
        strategy.run_epochs = self.run_epochs  # pyright: ignore[reportAttributeAccessIssue]
        strategy.skip_step, strategy.on_step = self.skip, self.stepped
        # the first warm step after torch.compile is its compilation
        self._slow = 1 if strategy.fit.compile else 0
        self._steps = -self._slow
        self._warm = self._start = 0.0

    def learn(
        self, experience: CLExperience | Sequence[CLExperience], held_out: Sequence[CLExperience]
    ) -> TaskCost:
        """Go through the training of a task, or of all together."""
        meter = self.strategy.meter
        flops, seconds, left_out = meter.flops, meter.seconds, self.left_out
        self.strategy.train(experience, eval_streams=[list(held_out)] if held_out else [])
        return TaskCost(meter.flops - flops, meter.seconds - seconds + self.left_out - left_out)

    def run_epochs(self, epochs: int, validation: Sequence[CLExperience] = ()) -> None:
        """Two epochs of so many: the first is measured, the second is warm and stands for all others."""
        if self.idle:
            return
        meter = self.strategy.meter
        self._run_epochs(1, validation)
        if epochs > 1:
            start, flops, left_out = time.perf_counter(), meter.flops, self.left_out
            self._run_epochs(1, validation)
            meter.flops += (epochs - 2) * (meter.flops - flops)
            self.left_out += (epochs - 2) * (time.perf_counter() - start + self.left_out - left_out)

    def skip(self, position: int) -> bool:
        """Whether a step is left out; the first of a pass never is."""
        if position and self._steps > 0 and (self.idle or self._warm >= WARM_SECONDS):
            self.left_out += self._warm / self._steps
            return True
        self._start = self._now()
        return False

    def stepped(self) -> None:
        """A step was done; without one to skip before it, it was the measured one of a new phase."""
        if not self._start:
            self._steps, self._warm = -self._slow, 0.0
            return
        self._steps += 1
        self._warm = self._warm + self._now() - self._start if self._steps > 0 else 0.0
        self._start = 0.0

    def _now(self) -> float:
        if self.strategy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
