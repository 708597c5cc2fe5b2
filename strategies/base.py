"""The bridge to Avalanche: our networks as its models, our training as one of its strategies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from avalanche.benchmarks import CLExperience, DatasetExperience
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule, avalanche_forward
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lifelong_ens.accounting.components import component_of_modules
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.errors import InputError, NonFiniteLossError
from lifelong_ens.networks.task import TaskNetwork
from lifelong_ens.training.augment import augment
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import EarlyStopping, Optimisation, mean_loss, run_epoch

Batch = list[Tensor]
ITERATION_CALLBACKS = (
    "before_training_iteration",
    "before_forward",
    "after_forward",
    "before_backward",
    "after_backward",
    "before_update",
    "after_update",
    "after_training_iteration",
)


class TaskModel(MultiTaskModule):
    """A ``TaskNetwork`` as an Avalanche model, for our strategies and for Avalanche's own.

    It grows when it meets a new task label in training and never in evaluation; for a task that it has not learnt
    all classes are equally likely. Avalanche's own multi-head modules grow in evaluation too (0.6.0).
    """

    def __init__(self, network: TaskNetwork) -> None:
        super().__init__()
        self.network = network
        self.tasks: dict[int, int] = {}
        self._classes_asked = 1

    def adaptation(self, experience: CLExperience) -> None:
        """Add the tasks of a training experience that are new; Avalanche calls it before every experience."""
        classes = _classes_of_tasks(experience)
        self._classes_asked = max(classes.values())
        if not self.training:
            return
        for label, num_classes in classes.items():
            if label not in self.tasks:
                self.tasks[label] = self.network.num_tasks
                self.network.begin_task(num_classes)
            elif self.network.frozen_past:
                raise InputError(
                    f"task {label} comes a second time; {type(self.network).__name__} learns every task once."
                )

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of rows with the given task labels, ``(batch,)``."""
        labels = task_labels.unique().tolist()
        if any(label not in self.tasks for label in labels):
            return x.new_zeros(len(x), self._classes_asked)
        if len(labels) == 1:
            return self.network(x, self.tasks[labels[0]])
        return self.network(x, _translate(task_labels, self.tasks))


def _classes_of_tasks(experience: CLExperience) -> dict[int, int]:
    """The number of classes of every task label of an experience, from the labels of its samples."""
    dataset: Any = experience.dataset  # pyright: ignore
    labels = dataset.targets_task_labels.uniques
    if len(labels) == 1:
        return {int(next(iter(labels))): int(max(dataset.targets.uniques)) + 1}
    targets, tasks = (np.fromiter(map(int, values), int) for values in (dataset.targets, dataset.targets_task_labels))
    return {int(label): int(targets[tasks == label].max()) + 1 for label in np.unique(tasks)}


def _translate(labels: Tensor, tasks: Mapping[int, int]) -> Tensor:
    """Task labels of rows to indices of tasks in the order they were learnt."""
    table = torch.zeros(max(tasks) + 1, dtype=torch.long, device=labels.device)
    for label, index in tasks.items():
        table[label] = index
    return table[labels]


class BatchLoader:
    """Whole batches of a dataset, gathered at once, augmented on the device; one pass each time it is iterated.

    Args:
        dataset: One of our stream's datasets, or anything that Avalanche made of it.
        batch_size: Images per batch; the last may be smaller.
        device: Where the batches go.
        generator: Order and augmentation; None for the dataset's order.
        augmentation: As in ``Fit``.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        augmentation: str = "none",
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self.generator, self.augmentation = generator, augmentation
        labels = dataset.targets_task_labels.uniques
        # rows of one task need no look at their labels
        self.task_label: int | None = next(iter(labels)) if len(labels) == 1 else None
        if generator is not None and augmentation != "none":
            self._device_generator = torch.Generator(device)
            self._device_generator.manual_seed(generator.initial_seed())

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.dataset)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for x, y, task_labels in self.dataset.batches(order, self.batch_size, self.device):
            if self.generator is not None and self.augmentation != "none":
                x = augment(x, self.augmentation, self._device_generator)  # pyright: ignore
            yield [x, y, task_labels]


class Strategy(SupervisedTemplate):
    """Training of a ``TaskNetwork`` over a stream, as an Avalanche strategy.

    Plugins attach as to any other. Where none of them uses the callbacks of an iteration, epochs run in a tight loop
    without them. A method that trains differently overrides ``fit_task``.

    Args:
        network: What is trained.
        fit: How each task is trained.
        seed: Of initial values, order, augmentation and dropout; each task's randomness follows from the seed and
            its number alone, so that a run that goes on from a checkpoint repeats the one that was not interrupted.
        device: Where it is trained.
        overrides: Options of the optimizer for the parameters of one component, such as
            ``{"fast_weights": {"lr": 0.1}}``.
        joint: Train all experiences that are given to ``train`` together.
        plugins: Avalanche plugins.
        evaluator: Avalanche's metrics and loggers; None, the fast choice, for none.
    """

    def __init__(
        self,
        *,
        network: TaskNetwork,
        fit: Fit | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        joint: bool = False,
        plugins: Sequence[SupervisedPlugin] | None = None,
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        fit = fit or Fit()
        placeholder = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        super().__init__(
            model=TaskModel(network),
            optimizer=placeholder,
            train_mb_size=fit.batch_size,
            train_epochs=fit.epochs,
            eval_mb_size=max(fit.batch_size, 256),
            device=device,
            plugins=plugins,
            evaluator=evaluator or silent_evaluator(),
        )
        # neither does anything here, but both cost time at every callback: an evaluator without metrics copies the
        # experience each time, and periodic evaluation is never switched on
        idle = [plugin for plugin in self.plugins if isinstance(plugin, PeriodicEval)]
        idle += [self.evaluator] if evaluator is None else []
        self.plugins = [plugin for plugin in self.plugins if not any(plugin is one for one in idle)]
        self.network = network
        self.fit, self.seed, self.joint = fit, seed, joint
        self.overrides = {"fast_weights": {"weight_decay": 0.0}, **(overrides or {})}
        self.meter = TrainingMeter()
        self.on_step: Callable[[], object] | None = None
        self._losses: list[Tensor] = []
        self._task_label: int | None = None
        self._compiled: Callable[..., Tensor] | None = None

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """Avalanche's ``train``; the caller's random generators are left as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self.joint:
                experiences = _together(experiences)
            return super().train(experiences, [] if eval_streams is None else eval_streams, **kwargs)

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task on ``self.dataloader``; a method with phases of its own overrides this.

        Args:
            validation: Held-out experiences of this task; empty where the stream has none.
        """
        self.run_epochs(self.fit.epochs, validation)

    def run_epochs(self, epochs: int, validation: Sequence[CLExperience] = ()) -> None:
        """Epochs with the present optimisation, with early stopping where ``fit`` and the stream allow it."""
        stopping = None
        if self.fit.patience is not None:
            if not validation:
                raise InputError("patience needs validation images: give the stream a fraction, --validation 0.1.")
            stopping = EarlyStopping(self.network, self.fit.patience)
        for _ in range(epochs):
            self._before_training_epoch()
            if self._stop_training:
                self._stop_training = False
                break
            self.training_epoch()
            self._after_training_epoch()
            if stopping is not None and stopping.should_stop(accuracy(self, validation)):
                break
        if stopping is not None:
            stopping.restore()

    def training_epoch(self, **kwargs: Any) -> None:
        """One pass: tight where no plugin looks at iterations, through Avalanche's callbacks where one does."""
        loader = self.dataloader
        self._task_label = loader.task_label if isinstance(loader, BatchLoader) else None
        try:
            # closing: when a step fails, the meter's with-blocks inside the generator end here and now
            with closing(self._counted(loader)) as batches:
                if self._iteration_plugins() or not isinstance(loader, BatchLoader):
                    self._epoch_with_callbacks(batches, **kwargs)
                else:
                    run_epoch(batches, self._loss_of, self.optimisation)
        except NonFiniteLossError as error:
            task, epoch = self.network.num_tasks, self.clock.train_exp_epochs + 1
            raise NonFiniteLossError(f"{error}, epoch {epoch}, task {task}") from error

    def _epoch_with_callbacks(self, batches: Iterator[Batch], **kwargs: Any) -> None:
        loader, self._losses = self.dataloader, []
        self.dataloader = batches
        try:
            super().training_epoch(**kwargs)
        finally:
            self.dataloader = loader
        mean_loss(self._losses)

    def forward(self) -> Tensor:
        """Logits of the mini-batch, averaged over members where the task holds several."""
        if not self.is_training:
            return super().forward()
        with self.optimisation.precision(self.device):
            logits = self._member_logits(self.mb_x, self._task())
        self._mb_logits = logits
        if logits.dim() == 2:
            return logits
        return logits[0] if len(logits) == 1 else logits.mean(dim=0)

    def criterion(self) -> Tensor:
        """Mean of the members' losses; with one member, the loss."""
        if not self.is_training:
            return super().criterion()
        return member_loss(self._mb_logits, self.mb_y)

    def backward(self) -> None:
        """Avalanche's, with the loss kept for the check at the end of the epoch."""
        self._losses.append(self.loss.detach().reshape(()))
        super().backward()

    def optimizer_step(self) -> None:
        """Clip, step, move the schedule."""
        self.optimisation.update()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trainable, a group for every component that has options of its own."""
        groups: dict[str, list[nn.Parameter]] = {}
        seen: set[int] = set()
        for module, component in component_of_modules(self.network):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    groups.setdefault(component if component in self.overrides else "", []).append(parameter)
        return [{"params": parameters, **self.overrides.get(name, {})} for name, parameters in groups.items()]

    def start_phase(self, epochs: int | None = None) -> None:
        """A fresh optimisation of what is trainable now; called at the start of every task."""
        self.optimisation = Optimisation(self.parameter_groups(), self.fit, len(self.dataloader), epochs)  # pyright: ignore
        self.optimizer = self.optimisation.optimizer
        self.meter.new_phase()

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow the network by the experience's tasks and build a fresh optimizer over what is trainable."""
        if not hasattr(self.experience, "task_labels"):
            raise InputError("this strategy needs task labels; build the benchmark with task labels.")
        torch.manual_seed(self._task_seed(self.network.num_tasks))
        self.model = self.model_adaptation()
        self.model.train()
        self._compiled = torch.compile(self.network.member_logits) if self.fit.compile else None
        self.start_phase()

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Whole batches where the dataset can give them, Avalanche's loader where not."""
        if hasattr(self.adapted_dataset, "batch"):
            generator = torch.Generator().manual_seed(self._task_seed(self.network.num_tasks) + 1)
            self.dataloader = BatchLoader(
                self.adapted_dataset, self.train_mb_size, self.device, generator, self.fit.augment
            )
        else:
            super().make_train_dataloader(**kwargs)

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Whole batches where the dataset can give them, Avalanche's loader where not."""
        if hasattr(self.adapted_dataset, "batch"):
            self.dataloader = BatchLoader(self.adapted_dataset, self.eval_mb_size, self.device)
        else:
            super().make_eval_dataloader(**kwargs)

    def _train_exp(self, experience: CLExperience, eval_streams: Any = None, **kwargs: Any) -> None:
        streams = [stream if isinstance(stream, Sequence) else [stream] for stream in eval_streams or []]
        validation = [one for stream in streams for one in stream]
        with self.meter.timing():
            self.fit_task(validation)
            self.network.finish_task()

    def _task_seed(self, task: int) -> int:
        return (self.seed * 1_000_003 + task * 7_919) % 2**62

    def _iteration_plugins(self) -> bool:
        """Whether any plugin does something in an iteration; Avalanche's clock only counts."""
        others = (plugin for plugin in self.plugins if plugin is not self.clock)
        return any(_overrides(plugin, name) for plugin in others for name in ITERATION_CALLBACKS)

    def _task(self) -> int | Tensor:
        """The network's index of the mini-batch's task, or one for each row."""
        tasks: dict[int, int] = self.model.tasks  # pyright: ignore
        return _translate(self.mb_task_id, tasks) if self._task_label is None else tasks[self._task_label]

    def _member_logits(self, x: Tensor, task: int | Tensor) -> Tensor:
        """``(members, batch, classes)``, or ``(batch, classes)`` where the network cannot have but one member."""
        if self._compiled is not None and self.meter.measured:
            return self._compiled(x, task)
        # putting an axis on and taking it off again is 2 % of a small network's step
        one = type(self.network).member_logits is TaskNetwork.member_logits
        return self.network(x, task) if one else self.network.member_logits(x, task)

    def _loss_of(self, batch: Batch) -> Tensor:
        self.mbatch = batch
        with self.optimisation.precision(self.device):
            return member_loss(self._member_logits(batch[0], self._task()), batch[1])

    def _counted(self, batches: Any) -> Iterator[Batch]:
        """The batches, their rows counted; the first step of a phase runs under the meter."""
        for batch in batches:
            rows = len(batch[1])
            if self.meter.measured:
                yield batch
            else:
                with self.meter.measure(self.network, rows):
                    yield batch
            self.meter.count(rows)
            if self.on_step is not None:
                self.on_step()


def _overrides(plugin: Any, name: str) -> bool:
    """Whether a plugin does anything in a callback: whether it is not the empty one of its base class."""
    method = getattr(type(plugin), name, None)
    return method is not None and getattr(method, "__module__", "") != "avalanche.core"


def silent_evaluator() -> EvaluationPlugin:
    """An evaluator without metrics or loggers, and without the warning that it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EvaluationPlugin()


def member_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over members and rows: logits ``(members, batch, classes)``, labels ``(batch,)``.

    The logits of one member may come without its axis.
    """
    if logits.dim() == 2:
        return F.cross_entropy(logits.float(), labels)
    members = len(logits)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels if members == 1 else labels.repeat(members))


def predict(
    strategy: SupervisedTemplate, experiences: Sequence[CLExperience], batch_size: int = 512
) -> tuple[Tensor, Tensor] | None:
    """What the members of each image's task answer; nothing of the model changes.

    Returns:
        Log-probabilities ``(members, images, classes)`` and labels ``(images,)`` on the CPU; None where a task has
        not been learnt yet.
    """
    model = strategy.model
    log_probs, labels = [], []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for experience in experiences:
            if isinstance(model, TaskModel) and not set(experience.task_labels) <= set(model.tasks):  # pyright: ignore
                return None
            for x, y, task_labels in _evaluation_batches(experience.dataset, batch_size, strategy.device):  # pyright: ignore
                with torch.no_grad():
                    log_probs.append(torch.log_softmax(_answers(model, x, task_labels).float(), dim=-1).cpu())
                labels.append(y.cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(log_probs, dim=1), torch.cat(labels)


def accuracy(strategy: SupervisedTemplate, experiences: Sequence[CLExperience]) -> float:
    """Share of right answers in [0, 1] over all images of the experiences; NaN for a task not learnt yet."""
    answers = predict(strategy, experiences)
    if answers is None:
        return float("nan")
    log_probs, labels = answers
    return float((log_probs.exp().mean(dim=0).argmax(dim=-1) == labels).double().mean())


def _answers(model: nn.Module, x: Tensor, task_labels: Tensor) -> Tensor:
    """Member logits ``(members, batch, classes)`` of any strategy's model; one member where it has no members."""
    if isinstance(model, TaskModel):
        label = task_labels.unique().tolist()
        task = model.tasks[label[0]] if len(label) == 1 else _translate(task_labels, model.tasks)
        return model.network.member_logits(x, task)
    return avalanche_forward(model, x, task_labels).unsqueeze(0)


def _evaluation_batches(dataset: Any, batch_size: int, device: torch.device) -> Iterable[Batch]:
    """Batches in the dataset's order, gathered whole where it can do that."""
    if hasattr(dataset, "batch"):
        return BatchLoader(dataset, batch_size, device)
    loader = DataLoader(dataset.eval(), batch_size, collate_fn=dataset.collate_fn)
    return ([part.to(device) for part in batch] for batch in loader)


def _together(experiences: Iterable[CLExperience]) -> CLExperience:
    """All experiences as one, whose samples keep their task labels."""
    parts = list(experiences)
    dataset = parts[0].dataset  # pyright: ignore
    for part in parts[1:]:
        dataset = dataset.concat(part.dataset)  # pyright: ignore
    together = DatasetExperience(dataset=dataset, current_experience=0)
    together.task_labels = sorted({label for part in parts for label in part.task_labels})  # pyright: ignore
    together._origin_stream = parts[0].origin_stream  # pyright: ignore
    return together
