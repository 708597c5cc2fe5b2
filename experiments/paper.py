"""What a strategy costs at any number of tasks, without data: it learns a few tasks on torch's meta device.

Tensors there have shapes but no values, so that nothing is computed. The network really grows, a step of every phase of
training really passes through the cost ledger, and what follows the tasks' number alone is the same as in a run.
"""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.compare import BuildStrategy
from experiments.estimate import LookAhead
from lifelong_ens.accounting.components import sizes
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import banks
from lifelong_ens.networks.task import TaskNetwork
from lifelong_ens.training.data import ImageData, channels_last
from lifelong_ens.training.loop import Optimisation
from lifelong_ens.training.losses import member_loss
from strategies.base import Strategy
from strategies.costs import component_sizes, forward_cost
from streams.benchmark import StreamBenchmark, make_benchmark

META = torch.device("meta")
# the first may differ from all others, as it trains what is shared; three more make a parabola, and one checks it
LEAST_TASKS = 5
TASKS = 9
# of numbers that have been divided and multiplied by how many images there are
ROUNDING = 1e-9
MOST_TASKS = 10**12
# of steps by which the speed of a device is measured
ENOUGH_SECONDS = 0.3


@dataclass(frozen=True)
class TaskShape:
    """What a plan has to know of a stream; every task is alike.

    Attributes:
        classes: Of a task.
        image_shape: ``(C, H, W)``.
        images: Training images of a task.
    """

    classes: int
    image_shape: tuple[int, int, int]
    images: int


@dataclass(frozen=True)
class Cost:
    """Of a run, after its last task.

    Attributes:
        parameters: Learned numbers, heads included.
        bytes: Of all components of the ledger, the optimizer's state included.
        disk_bytes: Of the tensors of the last checkpoint.
        flops_forward: Of one image of the last task.
        flops_training: Of all tasks.
        memory_bytes: The most that tensors take at once while the last task is trained: what is stored, gradients, the
            optimizer's state, activations and what comes between. As float32 and without a library's workspaces.
    """

    parameters: int
    bytes: int
    disk_bytes: int
    flops_forward: int
    flops_training: float
    memory_bytes: int


class Growth:
    """The costs of a strategy at any number of tasks: after the first few, each is a parabola in that number.

    A parabola, as a column of a progressive network reads all earlier ones, each of which has read those before it. The
    three costs before the last must tell the last. Memory alone need not: it is the largest of several parabolas, may
    change to another one later, and is an estimate.

    Args:
        costs: After each of at least ``LEAST_TASKS`` tasks; ``flops_training`` is of that task alone.

    Raises:
        InputError: Costs other than memory do not grow like that.
    """

    def __init__(self, costs: Sequence[Cost]) -> None:
        self._values = {one.name: [getattr(cost, one.name) for cost in costs] for one in fields(Cost)}
        unknown = [name for name in self._values if name != "memory_bytes" and not self._is_parabola(name)]
        if unknown:
            raise InputError(
                f"its {', '.join(unknown)} do not grow with the number of tasks in a way that is known"
            )

    @property
    def settled(self) -> bool:
        """Whether memory grows like that too."""
        return self._is_parabola("memory_bytes")

    def _is_parabola(self, name: str) -> bool:
        *before, last = self._values[name]
        return abs(_at(before, len(before) + 1) - last) <= _rounding(last)

    def at(self, tasks: int) -> Cost:
        """After so many tasks."""
        costs = {name: _at(values, tasks) for name, values in self._values.items()}
        return Cost(**{**costs, "flops_training": _total(self._values["flops_training"], tasks)})

    def first_beyond(self, limit: float, cost: Callable[[Cost], float]) -> int | None:
        """The first number of tasks at which a cost, which never falls, is above the limit; None if it never is."""
        if cost(self.at(MOST_TASKS)) <= limit:
            return None
        fits, beyond = 0, MOST_TASKS
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            fits, beyond = (fits, middle) if cost(self.at(middle)) > limit else (middle, beyond)
        return beyond


def _differences(values: Sequence[float]) -> tuple[float, float, float]:
    """Of the parabola through the last three: its value at the first of them, and its two differences there."""
    first, second, third = values[-3:]
    steps = second - first, third - 2 * second + first
    return first, *(0 if abs(step) <= _rounding(first) else step for step in steps)  # pyright: ignore


def _rounding(value: float) -> float:
    """How far a number may be off: a whole one not at all."""
    return 0 if isinstance(value, int) else ROUNDING * value


def _at(values: Sequence[float], task: int) -> Any:
    if task <= len(values):
        return values[task - 1]
    steps = task - (len(values) - 2)
    return sum(math.comb(steps, order) * step for order, step in enumerate(_differences(values)))


def _total(values: Sequence[float], tasks: int) -> float:
    """The sum over tasks 1 to ``tasks``."""
    known = values[: min(tasks, len(values) - 3)]
    steps = tasks - len(known)
    return sum(known) + sum(
        math.comb(steps, order + 1) * step for order, step in enumerate(_differences(values))
    )


def growth(build: BuildStrategy, task: TaskShape) -> Growth:
    """Let a strategy learn a few tasks that have no images.

    Args:
        build: Makes the strategy from a benchmark, a seed and a device.
        task: What each of its tasks is like.

    Raises:
        InputError: The strategy is not one of ours, cannot run on its network, or what it costs depends on what it
            learns.
    """
    benchmark = empty_benchmark(task)
    costs: list[Cost] = []
    with OnPaper() as paper:
        with META:
            strategy = build(benchmark=benchmark, seed=0, device=META)
        if not isinstance(strategy, Strategy):
            raise InputError("it is not one of our strategies: only its run can tell")
        if strategy.joint:
            raise InputError("it trains all tasks together, and stores and costs what finetune does")
        if (why := strategy.grows_by_learning()) is not None:
            raise InputError(f"{why}, so that its growth cannot be known; compare --dry_run bounds it")
        ahead = LookAhead(strategy)
        # one step of a phase stands for all, and none has to be warm
        strategy.skip_step = lambda _: True
        spare: list[int] = []
        strategy.on_step = lambda: spare.append(sum(bank.spare_bytes for bank in banks(strategy.network)))
        for experience in benchmark.streams["train"]:
            paper.peak = paper.live
            try:
                flops = ahead.learn(experience, []).flops
            except NotImplementedError as error:
                raise InputError(
                    "what it does depends on values that only training has; compare --dry_run takes its first steps"
                ) from error
            costs.append(_cost(strategy, task, len(costs), flops, paper.peak - spare[-1]))
            if len(costs) >= LEAST_TASKS and Growth(costs).settled:
                break
    return Growth(costs)


def _cost(strategy: Strategy, task: TaskShape, index: int, flops: float, memory_bytes: int) -> Cost:
    stored = component_sizes(strategy).values()
    forward = forward_cost(strategy, torch.empty(1, *task.image_shape, device=META), index)
    return Cost(
        sum(size.parameters for size in stored),
        sum(size.bytes for size in stored),
        sum(size.bytes for size in sizes(strategy.network).values()),
        sum(forward.by_component.values()),
        flops,
        memory_bytes,
    )


def plain_parameters(build: BuildStrategy, task: TaskShape, counts: Sequence[int]) -> dict[int, int]:
    """Of one plain network with as many heads as there are tasks, which costs are relative to.

    Args:
        build: Makes ``finetune``.
        task: What each task is like.
        counts: Numbers of tasks.
    """
    benchmark = empty_benchmark(task)
    with META:
        strategy: Any = build(benchmark=benchmark, seed=0, device=META)
        network = strategy.network
        one, two = (
            sum(size.parameters for size in sizes(network.regrow([task.classes])).values()) for _ in range(2)
        )
    return {count: one + (count - 1) * (two - one) for count in counts}


def measured_speed(build: BuildStrategy, task: TaskShape, device: torch.device) -> float:
    """FLOPs per second of a strategy's steps on its second task, of random images; takes seconds.

    Batches double until they are as large as they are to be or a step takes a second. What a method adds to the loss,
    or does beside such steps, is not among them.

    Args:
        build: Makes the strategy.
        task: What its tasks are like.
        device: Where.
    """
    strategy: Any = build(benchmark=empty_benchmark(task), seed=0, device=device)
    network = strategy.network.to(device).regrow([task.classes])
    network.begin_task(task.classes)
    network.train()
    optimisation = Optimisation(strategy.parameter_groups(), strategy.fit, steps_per_epoch=1)
    rows = 1
    while True:
        x = channels_last(torch.rand(rows, *task.image_shape, device=device))
        y = torch.arange(rows, device=device) % task.classes
        step = functools.partial(_step, network, optimisation, x, y)
        with FlopMeter(network) as meter:
            step()
        # the fastest: others may have waited for whatever else runs here
        seconds, start = math.inf, time.perf_counter()
        while (begin := time.perf_counter()) - start < ENOUGH_SECONDS:
            step()
            seconds = min(seconds, time.perf_counter() - begin)
        if rows == strategy.fit.batch_size or seconds >= 1:
            return meter.total / seconds
        rows = min(2 * rows, strategy.fit.batch_size)


def _step(network: TaskNetwork, optimisation: Optimisation, x: Tensor, y: Tensor) -> None:
    with optimisation.precision(x.device):
        logits = network.member_logits(x, 1) if network.members_per_task > 1 else network(x, 1)
        loss = member_loss(logits, y)
    optimisation.step(loss)
    loss.item()  # waits for the device


class OnPaper(TorchDispatchMode):
    """Lets training run on the meta device, and counts the bytes of the tensors that are there.

    The loss, and whatever else is read as a float, is 0. Whatever else is read has no value.

    Attributes:
        live: Bytes of the tensors that are there now.
        peak: The most since this was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].is_floating_point():
                return 0.0
            raise NotImplementedError("a number without a value was to be read")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._forget, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, size: int) -> None:
        self.live -= size


class NoImages:
    """So many images without values, as an ``ImageReader``."""

    def __init__(self, count: int, image_shape: tuple[int, int, int]) -> None:
        self.shape = (count, *image_shape)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """``(k, C, H, W)`` on the meta device."""
        return torch.empty(len(index), *self.shape[1:], dtype=torch.uint8, device=META)

    def read_ahead(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """See ``index_select``."""
        return (self.index_select(0, rows) for rows in batches)


def empty_benchmark(task: TaskShape) -> StreamBenchmark:
    """``TASKS`` tasks, whose images have labels but no pixels."""
    reader = NoImages(task.images, task.image_shape)
    scale = torch.ones(task.image_shape[0])
    labels = torch.arange(task.images) % task.classes
    data = [ImageData(reader, torch.arange(task.images), labels, scale, scale) for _ in range(TASKS)]
    classes = [list(range(k * task.classes, (k + 1) * task.classes)) for k in range(TASKS)]
    names = [str(number) for number in range(TASKS * task.classes)]
    return make_benchmark(data, data, classes=classes, class_names=names, name="on_paper")
