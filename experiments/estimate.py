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

from lifelong_ens.ensembles.training import SomeSteps
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
class Bound:
    """How far a number can be trusted that is not known before training.

    Attributes:
        mark: ``≥``, ``≤`` or ``≈``.
        why: It is not known.
    """

    mark: str
    why: str


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
        size: What parameters and bytes are; None where they are known.
        cost: What FLOPs and time of training are; None where they are known.
    """

    parameters: int
    bytes: int
    disk_bytes: int
    flops_forward: int
    tasks: tuple[TaskCost, ...]
    measured: tuple[int, ...]
    size: Bound | None = None
    cost: Bound | None = None

    @property
    def flops_training(self) -> float:
        """Of all tasks."""
        return math.fsum(task.flops for task in self.tasks)

    @property
    def seconds_training(self) -> float:
        """Of all tasks."""
        return math.fsum(task.seconds for task in self.tasks)


MAY_STOP = Bound("≤", "training may stop early (--patience)")


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
        cost = None if strategy.fit.patience is None else MAY_STOP
        test: Any = benchmark.streams["test"][-1]
        data = test.dataset
        image = data.batch(torch.tensor([0]))[0] if hasattr(data, "batch") else data[0][0].unsqueeze(0)
        forward = forward_cost(strategy, image, test.task_labels[0])
        size = None
        grows = strategy.grows_by_learning()
        if grows is not None:
            why = f"{grows}, so that its size is not known before it is trained"
            size, cost = Bound("≥", why), Bound("≈", why)
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
        size,
        cost,
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
        ahead.steps.idle = task not in measured
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


class Steps(SomeSteps):
    """Which steps a look ahead makes, and how long the others would take.

    Attributes:
        idle: Leave out all but the first steps of passes.
        left_out: Seconds of the steps that were left out, by the steps that were made.

    Args:
        device: Where they are made.
        compiled: Whether the first warm step of a phase is its compilation.
        least: How many warm steps of a phase are made, however long they take.
    """

    def __init__(self, device: torch.device, compiled: bool, least: int = 1) -> None:
        self.device, self.least = device, least
        self.idle, self.left_out = False, 0.0
        self._slow = int(compiled)
        self._steps = -self._slow
        self._warm = self._start = 0.0

    def skip(self, position: int | None = None) -> bool:
        """Whether a step is left out; the first of a pass over a task's images, at position 0, never is."""
        enough = self.idle or self._warm >= WARM_SECONDS
        if position != 0 and self._steps >= self.least and enough:
            self.left_out += self._warm / self._steps
            return True
        self._start = self._now()
        return False

    def __call__(self) -> None:
        """A step was made; without one to skip before it, it was the measured one of a new phase."""
        if not self._start:
            self._steps, self._warm = -self._slow, 0.0
            return
        self._steps += 1
        self._warm = self._warm + self._now() - self._start if self._steps > 0 else 0.0
        self._start = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class LookAhead:
    """Lets a strategy take the first steps of every pass over a task's images, and counts the others.

    Args:
        strategy: A fresh one, which is of no use for anything else afterwards.

    Attributes:
        steps: Of the strategy; where they are idle, whole trainings are left out too, and a task only adds what it
            stores.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.steps = Steps(strategy.device, strategy.fit.compile)
        self._run_epochs = strategy.run_epochs
        strategy.run_epochs = self.run_epochs  # pyright: ignore[reportAttributeAccessIssue]
        strategy.skip_step, strategy.on_step = self.steps.skip, self.steps

    def learn(
        self, experience: CLExperience | Sequence[CLExperience], held_out: Sequence[CLExperience]
    ) -> TaskCost:
        """Go through the training of a task, or of all together."""
        meter = self.strategy.meter
        flops, seconds, left_out = meter.flops, meter.seconds, self.steps.left_out
        self.strategy.train(experience, eval_streams=[list(held_out)] if held_out else [])
        return TaskCost(meter.flops - flops, meter.seconds - seconds + self.steps.left_out - left_out)

    def run_epochs(self, epochs: int, validation: Sequence[CLExperience] = ()) -> None:
        """Two epochs of so many: the first is measured, the second is warm and stands for all others."""
        if self.steps.idle:
            return
        meter = self.strategy.meter
        self._run_epochs(1, validation)
        if epochs > 1:
            start, flops, left_out = time.perf_counter(), meter.flops, self.steps.left_out
            self._run_epochs(1, validation)
            meter.flops += (epochs - 2) * (meter.flops - flops)
            spent = time.perf_counter() - start + self.steps.left_out - left_out
            self.steps.left_out += (epochs - 2) * spent
