"""Members in training: what every method of making an ensemble does with images, the same for all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.components import component_of_modules
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.errors import InputError
from lifelong_ens.training.augment import augment
from lifelong_ens.training.data import ImageData, channels_last
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import EarlyStopping, Optimisation, evaluating, run_epoch
from lifelong_ens.training.losses import member_loss
from lifelong_ens.training.seeding import seeded

Trained = TypeVar("Trained")
BuildNetwork = Callable[[], nn.Module]
# told what is trained and in how many steps; what it returns is called after every step, and may be SomeSteps
Progress = Callable[[str, int], Callable[[], object]]
# calls a function on each of several items, in turn as ``map`` does or at once, and gives the results in their order
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
ComputeLoss = Callable[[Tensor, Tensor], Tensor]


class SomeSteps(ABC):
    """What a progress returns that only looks ahead: it chooses which steps are made; the rows of all are counted."""

    @abstractmethod
    def __call__(self) -> None:
        """A step was made."""

    @abstractmethod
    def skip(self) -> bool:
        """Whether the next step is left out; not asked before the first of a phase, which is measured."""


def silent(label: str, steps: int) -> Callable[[], object]:
    """The progress that nobody sees."""
    return lambda: None


class Training:
    """One network in training, to be run for some epochs, and some more.

    The order of the images, their augmentation and whatever the network draws (dropout) come from ``seed`` alone.

    Attributes:
        ahead: Whether steps are left out, so that what is learnt is of no use.

    Args:
        network: What is trained.
        data: The images.
        fit: How; a method may change the learning rate of ``optimisation`` between two runs.
        seed: Of everything random.
        meter: Counts FLOPs, time and bytes saved for backward, over all trainings of an ensemble.
        epochs: Of the whole schedule; None for those of ``fit``.
        loss: From images ``(batch, C, H, W)`` and labels ``(batch,)``; the mean cross entropy of members if not given.
        groups: Parameter groups as torch has them; ``parameter_groups(network)`` if not given.
        after_step: Called after every step with whether it was left out.
        before_update: Called when the gradients are there.
    """

    def __init__(
        self,
        network: nn.Module,
        data: ImageData,
        fit: Fit,
        *,
        seed: int,
        meter: TrainingMeter,
        epochs: int | None = None,
        loss: ComputeLoss | None = None,
        groups: Iterable[Mapping[str, Any]] | None = None,
        after_step: Callable[[bool], object] | None = None,
        before_update: Callable[[], object] | None = None,
    ) -> None:
        self.network, self.data, self.fit, self.meter, self.seed = network, data, fit, meter, seed
        self.device = next(network.parameters()).device
        self.epochs = fit.epochs if epochs is None else epochs
        self.epochs_done = 0
        self.ahead = False
        self.optimisation = Optimisation(
            parameter_groups(network) if groups is None else groups,
            fit,
            self.steps_per_epoch,
            self.epochs,
            before_update,
        )
        self.after_step = after_step
        self._run = torch.compile(network) if fit.compile else network
        self._loss = loss or (lambda images, labels: member_loss(self._run(images), labels))
        # the order is drawn on the CPU, so that it is the same on every device
        self._order = torch.Generator().manual_seed(seed)
        self._pixels = torch.Generator(self.device).manual_seed(seed)
        meter.new_phase()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the images."""
        return math.ceil(len(self.data) / self.fit.batch_size)

    def run(
        self,
        epochs: int | None = None,
        step: Callable[[], object] = lambda: None,
        stopping: Stopping | None = None,
    ) -> None:
        """So many more epochs; None for all that are left.

        Args:
            epochs: How many.
            step: Called after every step, for a progress bar.
            stopping: Ends it early and puts the best epoch's weights back.

        Raises:
            NonFiniteLossError: A loss was NaN or infinite.
        """
        self.network.train()
        with self.meter.timing(), seeded(self.seed + self.epochs_done):
            for _ in range(self.epochs - self.epochs_done if epochs is None else epochs):
                run_epoch(self.counted(step), self._loss_of, self.optimisation)
                self.epochs_done += 1
                if stopping is not None and stopping.should_stop():
                    break
            if stopping is not None:
                stopping.restore()

    def _loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with self.optimisation.precision(self.device):
            return self._loss(*batch)

    def counted(self, step: Callable[[], object] = lambda: None) -> Generator[tuple[Tensor, Tensor]]:
        """The batches of one more epoch; what is done with the first of a phase runs under the meter."""
        data = self.data.subset(torch.randperm(len(self.data), generator=self._order))
        if not isinstance(step, SomeSteps):
            yield from self._made(data, step)
            return
        self.ahead = True
        for rows in torch.arange(len(data)).split(self.fit.batch_size):
            if self.meter.measured and step.skip():
                self._count(len(rows), left_out=True)
            else:
                yield from self._made(data.subset(rows), step)

    def _made(self, data: ImageData, step: Callable[[], object]) -> Generator[tuple[Tensor, Tensor]]:
        for images, labels in data.batches(self.fit.batch_size, self.device):
            batch = channels_last(augment(images, self.fit.augment, self._pixels)), labels
            if self.meter.measured:
                yield batch
            else:
                with self.meter.measure(self.network, len(labels)):
                    yield batch
            self._count(len(labels), left_out=False)
            step()

    def _count(self, rows: int, left_out: bool) -> None:
        self.meter.count(rows)
        if self.after_step is not None:
            self.after_step(left_out)


class Stopping:
    """Early stopping on the validation accuracy of a network, whose members' probabilities are averaged."""

    def __init__(self, network: nn.Module, validation: ImageData, patience: int) -> None:
        self.network, self.validation = network, validation
        self._memory = EarlyStopping(network, patience)

    def should_stop(self) -> bool:
        """Whether patience is at its end, after another epoch."""
        return self._memory.should_stop(accuracy(self.network, self.validation))

    def restore(self) -> None:
        """Put the best epoch's weights back."""
        self._memory.restore()


def train_network(
    network: nn.Module,
    train: ImageData,
    validation: ImageData | None,
    fit: Fit,
    *,
    label: str,
    progress: Progress,
    **options: Any,
) -> nn.Module:
    """Train for all epochs, with early stopping where ``fit.patience`` asks for it; ``network`` itself is returned.

    Args:
        network: What is trained.
        train: The images.
        validation: What early stopping looks at.
        fit: How.
        label: What ``progress`` is told.
        progress: Hears of every step.
        **options: Of ``Training``.
    """
    run_all(Training(network, train, fit, **options), validation, label, progress)
    return network


def train_apart(
    train_one: Callable[[Any, TrainingMeter], Trained], items: Iterable[Any], each: Each
) -> tuple[list[Trained], TrainingMeter]:
    """Members that do not hang on each other, and what all of them took together.

    Args:
        train_one: Trains the member of an item under a meter; it may be called in another process.
        items: One for each member.
        each: Calls a function on each.
    """

    def train(item: Any) -> tuple[Trained, TrainingMeter]:
        own = TrainingMeter()
        return train_one(item, own), own

    members, meter = [], TrainingMeter()
    for member, own in each(train, items):
        members.append(member)
        meter.add(own)
    return members, meter


def run_all(training: Training, validation: ImageData | None, label: str, progress: Progress) -> None:
    """Run a training to its end, with early stopping where its ``fit.patience`` asks for it."""
    stopping = None
    if training.fit.patience is not None:
        if validation is None:
            raise InputError("patience needs validation images; give --validation 0.1.")
        stopping = Stopping(training.network, validation, training.fit.patience)
    training.run(step=progress(label, training.epochs * training.steps_per_epoch), stopping=stopping)


def new_network(build_network: BuildNetwork, seed: int, device: torch.device | str) -> nn.Module:
    """A network with the initial weights of a seed, on a device."""
    with seeded(seed):
        return build_network().to(device)


def parameter_groups(network: nn.Module, fast_learning_rate: float | None = None) -> list[dict[str, Any]]:
    """Everything trainable, fast weights in a group of their own that has no weight decay.

    Args:
        network: What is trained.
        fast_learning_rate: Of fast weights; None for that of all.
    """
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    seen: set[int] = set()
    for module, component in component_of_modules(network):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (fast if component == "fast_weights" else slow).append(parameter)
    rate = {} if fast_learning_rate is None else {"lr": fast_learning_rate}
    groups = [{"params": slow}, {"params": fast, "weight_decay": 0.0, **rate}]
    return [group for group in groups if group["params"]]


def accuracy(network: nn.Module, data: ImageData, batch_size: int = 512) -> float:
    """The share of images that a network, or the mean probability of its members, gets right; in [0, 1]."""
    device = next(network.parameters()).device
    right = torch.zeros((), dtype=torch.long, device=device)
    with evaluating(network):
        for images, labels in data.batches(batch_size, device):
            logits = network(channels_last(images)).float()
            if logits.dim() == 3:
                logits = logits.softmax(dim=-1).mean(dim=0)
            right += (logits.argmax(dim=-1) == labels).sum()
    return float(right) / max(len(data), 1)
