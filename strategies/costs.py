"""The cost ledger of any Avalanche strategy, ours or foreign."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.core import SupervisedPlugin
from avalanche.models import avalanche_forward
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from lifelong_ens.accounting.components import Size, optimizer_size, sizes
from lifelong_ens.accounting.flops import FlopMeter, forward_flops
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.errors import NonFiniteLossError
from strategies.base import Strategy
from strategies.model import TaskModel


class CostPlugin(SupervisedPlugin):
    """Meters a foreign strategy: its first iteration of every experience, its rows, its time.

    Extra work inside an iteration, such as a second network's forward pass, is counted, as what runs is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.meter = TrainingMeter()
        self.on_step: Callable[[], object] | None = None
        self.on_epoch: Callable[[float], object] | None = None
        self._losses: list[float] = []
        self._timing = ExitStack()
        self._measuring = ExitStack()

    @property
    def newest_loss(self) -> float | None:
        """The loss of the last step; None before the first of an epoch."""
        losses = self._losses
        return losses[-1] if losses else None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.meter.new_phase()
        self._timing.enter_context(self.meter.timing())

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Measure the first iteration."""
        if not self.meter.measured:
            self._measuring.enter_context(self.meter.measure(strategy.model, len(strategy.mb_y)))

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Count the rows; stop at a loss that is no number."""
        self._measuring.close()
        self.meter.count(len(strategy.mb_y))
        loss = float(strategy.loss.detach())
        if not math.isfinite(loss):
            clock = strategy.clock
            step, epoch, task = clock.train_epoch_iterations, clock.train_exp_epochs, clock.train_exp_counter
            raise NonFiniteLossError(
                f"the loss is {loss} at step {step + 1}, epoch {epoch + 1}, task {task + 1}"
            )
        self._losses.append(loss)
        if self.on_step is not None:
            self.on_step()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forget the losses of the epoch before."""
        self._losses = []

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Tell the mean loss."""
        if self.on_epoch is not None and self._losses:
            self.on_epoch(fmean(self._losses))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._timing.close()


def metered(strategy: SupervisedTemplate) -> Strategy | CostPlugin:
    """What has the strategy's ``meter`` and takes its ``on_step``; a foreign strategy gets a plugin for it."""
    if isinstance(strategy, Strategy):
        return strategy
    plugin = CostPlugin()
    strategy.plugins.append(plugin)
    return plugin


def network_of(strategy: SupervisedTemplate) -> nn.Module:
    """The module whose state is what the strategy has learnt."""
    model = strategy.model
    return model.network if isinstance(model, TaskModel) else model


def component_sizes(strategy: SupervisedTemplate) -> dict[str, Size]:
    """What each component stores now: the network's, the optimizer's, and what plugins keep (``buffer``)."""
    components = sizes(network_of(strategy))
    extra = {"optimizer": optimizer_size(strategy.optimizer), "buffer": Size(0, buffer_bytes(strategy))}
    for name, size in extra.items():
        components[name] = components.get(name, Size()) + size
    return {name: size for name, size in components.items() if size.bytes}


def buffer_bytes(strategy: SupervisedTemplate) -> int:
    """Bytes that plugins keep between tasks: replayed samples at a byte per pixel value, and their tensors."""
    seen: set[int] = set()
    plugins = (plugin for plugin in strategy.plugins if not isinstance(plugin, CostPlugin | EvaluationPlugin))
    return sum(sum(_bytes_inside(vars(plugin), seen, depth=0)) for plugin in plugins)


def _bytes_inside(value: Any, seen: set[int], depth: int) -> Iterator[int]:
    """Sizes of the tensors and datasets that can be reached from a plugin's attributes."""
    if id(value) in seen or depth > 8 or isinstance(value, SupervisedTemplate | nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, AvalancheDataset):
        if len(value):
            pixels = value[0][0]
            label_bytes = 8
            yield len(value) * (pixels.numel() + label_bytes)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _bytes_inside(one, seen, depth + 1)
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _bytes_inside(one, seen, depth + 1)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("avalanche"):
        yield from _bytes_inside(vars(value), seen, depth + 1)


def forward_cost(strategy: SupervisedTemplate, image: Tensor, task_label: int) -> FlopMeter:
    """Forward FLOPs of one image ``(1, C, H, W)`` of a task that has been learnt, by component."""
    x = image.to(strategy.device)
    labels = torch.tensor([task_label], device=strategy.device)
    model = strategy.model
    if isinstance(model, TaskModel):
        task = model.tasks[task_label]
        return forward_flops(model.network, lambda: model.network.member_logits(x, task))
    return forward_flops(model, lambda: avalanche_forward(model, x, labels))
