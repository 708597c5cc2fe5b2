"""The bridge to Avalanche: our networks as its models, our training as one of its strategies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn

from lifelong_ens.accounting.components import component_of_modules
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.errors import InputError, NonFiniteLossError, UnfitNetworkError
from lifelong_ens.networks.task import TaskNetwork
from lifelong_ens.training.devices import ALONE, Devices
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import EarlyStopping, Optimisation, compiled, mean_loss, run_epoch
from lifelong_ens.training.losses import member_loss
from lifelong_ens.training.seeding import derived_seed
from lifelong_ens.training.sharing import Sharing
from strategies.evaluation import accuracy
from strategies.loader import Batch, BatchLoader, together
from strategies.model import TaskModel, task_indices

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


class Strategy(SupervisedTemplate):
    """Training of a ``TaskNetwork`` over a stream, as an Avalanche strategy.

    Plugins attach as to any other. Where none of them uses the callbacks of an iteration, epochs run in a tight loop
    without them. A method that trains differently overrides ``fit_task``; one that changes a step overrides ``penalty``
    or ``before_step``, which both loops call.

    Attributes:
        meter: What training has cost so far.
        on_step: Called after every training step.
        on_epoch: Called with the mean loss after every epoch.
        skip_step: For a look ahead: asked before every step but the first of a phase, with its position in the pass
            over the images; True leaves the step out and counts its rows, as if it had been done.
        on_phase: Called with a few words, such as ``trial 3/20``, when a part of a task's training begins.
        extra_rows: How many rows a step passes forward and backward beside its mini-batch, for the meter.
        epoch_loss: Mean training loss of the last epoch.
        devices: Those that share the rows of every step; see ``share_with``.
        sharing: How a step is put together, where it is computed on several devices or in several parts.

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
        self.on_epoch: Callable[[float], object] | None = None
        self.on_phase: Callable[[str], object] | None = None
        self.skip_step: Callable[[int], bool] | None = None
        self.extra_rows = 0
        self.epoch_loss = math.nan
        self.devices = ALONE
        self.sharing = Sharing(ALONE, fit.accumulate) if fit.accumulate > 1 else None
        self._passes = 0
        self._losses: list[Tensor] = []
        self._task_label: int | None = None

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """Avalanche's ``train``; the caller's random generators are left as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self.joint:
                experiences = together(experiences)
            return super().train(experiences, [] if eval_streams is None else eval_streams, **kwargs)

    def share_with(self, devices: Devices) -> None:
        """Share the rows of every step with other processes, each of which calls this on the same strategy.

        All draw the same mini-batches and take the same steps. What a method computes from the rows of ``counted``, a
        loss that is a mean over them apart, it sums over the processes with ``devices.total``; what it decides, it
        decides on numbers that are the same in all of them. Dropout is drawn by each for its own rows.

        Raises:
            UnfitNetworkError: The method does not run on several devices.
            InputError: Options of training do not.
        """
        if devices.count == 1:
            return
        if self.fit.compile:
            raise InputError("compile does not run on several devices yet; leave --compile out.")
        if self.fit.batch_size // self.fit.accumulate < devices.count:
            parts = f" in {self.fit.accumulate} parts" if self.fit.accumulate > 1 else ""
            raise InputError(
                f"a batch_size of {self.fit.batch_size}{parts} is too small for {devices.count} devices, "
                "each of which computes some of the images: take a larger batch_size, or fewer devices."
            )
        self.devices, self.sharing = devices, Sharing(devices, self.fit.accumulate)

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task on ``self.dataloader``; a method with phases of its own overrides this.

        Args:
            validation: Held-out experiences of this task; empty where the stream has none.
        """
        self.run_epochs(self.fit.epochs, validation)

    def steps_for(self, images: int, task: int = 0) -> int:
        """About how many training steps a task with so many images takes, for a progress bar.

        Args:
            images: Those in the stream's training part.
            task: Its index; a method may train the first one differently.
        """
        return math.ceil(images / self.fit.batch_size) * self.fit.epochs

    @property
    def newest_loss(self) -> float | None:
        """The loss of the last step, as far as it is computed here; None before the first step of an epoch.

        Reading it waits for the device.
        """
        losses = self._losses
        return float(losses[-1]) if losses else None

    def grows_by_learning(self) -> str | None:
        """Why nobody knows the network's size before it is trained, in a few words; None where its tasks tell."""

    def penalty(self) -> Tensor | None:
        """What a method adds to the loss of ``mbatch``, whose forward pass has been done; nothing here."""

    def before_step(self) -> None:
        """Called when the gradients of a step are there, before they are clipped and used; a method may change them."""

    def run_epochs(self, epochs: int, validation: Sequence[CLExperience] = ()) -> None:
        """Epochs with the present optimisation, with early stopping where ``fit`` and the stream allow it."""
        stopping = None
        if self.fit.patience is not None:
            if not validation:
                raise InputError(
                    "patience needs validation images: give the stream a fraction, --validation 0.1."
                )
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
        loader, self._losses = self.dataloader, []
        self._task_label = loader.task_label if isinstance(loader, BatchLoader) else None
        try:
            # closing: when a step fails, the meter's with-blocks inside the generator end here and now
            with closing(self.counted(loader)) as batches:
                if self._iteration_plugins() or not isinstance(loader, BatchLoader):
                    if self.sharing is not None:
                        raise UnfitNetworkError(
                            "on several devices, or with accumulate, neither plugins that act on training steps nor "
                            "data that is not read in whole batches are supported yet: run on one, without accumulate."
                        )
                    self._epoch_with_callbacks(batches, **kwargs)
                else:
                    self.epoch_loss = run_epoch(batches, self._loss_of, self.optimisation, self._losses)
        except NonFiniteLossError as error:
            task, epoch = self.network.num_tasks, self.clock.train_exp_epochs + 1
            raise NonFiniteLossError(f"{error}, epoch {epoch}, task {task}") from error
        if self.on_epoch is not None:
            self.on_epoch(self.epoch_loss)

    def _epoch_with_callbacks(self, batches: Iterator[Batch], **kwargs: Any) -> None:
        loader = self.dataloader
        self.dataloader = batches
        try:
            super().training_epoch(**kwargs)
        finally:
            self.dataloader = loader
        self.epoch_loss = mean_loss(self._losses)

    def forward(self) -> Tensor:
        """Logits of the mini-batch, averaged over members where the task holds several."""
        if not self.is_training:
            return super().forward()
        with self.optimisation.precision(self.device):
            self._mb_logits = self._logits(self.mb_x)
        return self._mb_logits if self._mb_logits.dim() == 2 else self._mb_logits.mean(dim=0)

    def criterion(self) -> Tensor:
        """Mean of the members' losses, with one member the loss, and what the method adds."""
        if not self.is_training:
            return super().criterion()
        return self._loss(self._mb_logits, self.mb_y)

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
        steps = len(self.dataloader)  # pyright: ignore
        self.optimisation = Optimisation(
            self.parameter_groups(), self.fit, steps, epochs, self.before_step, self.sharing
        )
        self.optimizer = self.optimisation.optimizer
        self.meter.new_phase()

    def check_model_and_optimizer(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Grow the network by the experience's tasks and build a fresh optimizer over what is trainable."""
        if not hasattr(self.experience, "task_labels"):
            raise InputError("this strategy needs task labels; build the benchmark with task labels.")
        torch.manual_seed(self._task_seed(self.network.num_tasks))
        self._passes = 0
        self.model = self.model_adaptation()
        self.model.train()
        self.start_phase()

    def make_train_dataloader(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whole batches where the dataset can give them, Avalanche's loader where not."""
        if hasattr(self.adapted_dataset, "batch"):
            seed = self._task_seed(self.network.num_tasks) + 1
            self.dataloader = BatchLoader(
                self.adapted_dataset, self.train_mb_size, self.device, seed, self.fit.augment
            )
        else:
            super().make_train_dataloader(**kwargs)

    def make_eval_dataloader(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whole batches where the dataset can give them, Avalanche's loader where not."""
        if hasattr(self.adapted_dataset, "batch"):
            self.dataloader = BatchLoader(self.adapted_dataset, self.eval_mb_size, self.device)
        else:
            super().make_eval_dataloader(**kwargs)

    def _train_exp(self, experience: CLExperience, eval_streams: Any = None, **kwargs: Any) -> None:
        streams = [stream if isinstance(stream, Sequence) else [stream] for stream in eval_streams or []]
        validation = [one for stream in streams for one in stream]
        with self.meter.timing(), compiled(self.network.compiled_parts() if self.fit.compile else []):
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
        return task_indices(self.mb_task_id, tasks) if self._task_label is None else tasks[self._task_label]

    def _logits(self, x: Tensor) -> Tensor:
        """``(batch, classes)``, or ``(members, batch, classes)`` where a task holds several members."""
        forward = self.network if self.network.members_per_task == 1 else self.network.member_logits
        return forward(x, self._task())

    def _loss_of(self, batch: Batch) -> Tensor:
        self.mbatch = batch
        with self.optimisation.precision(self.device):
            return self._loss(self._logits(batch[0]), batch[1])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss, penalty = member_loss(logits, labels), self.penalty()
        return loss if penalty is None else loss + penalty

    def counted(self, batches: Any, shared: bool = True, saved: bool = True) -> Generator[Batch, None, None]:
        """The batches, their rows counted; what is done with the first of a phase runs under the meter.

        Args:
            batches: Images, labels and what else belongs to them.
            shared: Whether a device gives only those rows of a mini-batch that it computes, part by part; else each
                computes everything.
            saved: As in ``TrainingMeter.measure``.
        """
        sharing = self.sharing if shared else None
        position, left_out = -1, False
        with nullcontext() if sharing is None else self._own_randomness():
            for batch in batches if sharing is None else sharing.portions(batches):
                starts, ends = (True, True) if sharing is None else (sharing.starts, sharing.ends)
                position += starts
                rows, every = self._rows(batch, sharing)
                if not self.meter.measured:
                    left_out = False
                    # what is compiled cannot be counted
                    eager = torch.compiler.set_stance("force_eager") if self.fit.compile else nullcontext()
                    with self.meter.measure(self.network, rows, saved), eager:
                        yield batch
                else:
                    if starts:
                        left_out = self.skip_step is not None and self.skip_step(position)
                    if not left_out:
                        yield batch
                self.meter.count(every)
                if ends and not left_out and self.on_step is not None:
                    self.on_step()

    def _rows(self, batch: Sequence[Tensor], sharing: Sharing | None) -> tuple[int, int]:
        """How many rows pass through the network here, and on all devices, with those beside the mini-batch."""
        rows = len(batch[1])
        every = rows * self.devices.count if sharing is None else sharing.rows
        if self.extra_rows and (sharing is None or sharing.ends):
            here, everywhere = self.devices.computed(self.extra_rows)
            rows, every = rows + here, every + everywhere
        return rows, every

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """On several devices, draw what dropout draws by each for itself, and nothing else by what it drew."""
        self._passes += 1
        if self.devices.count == 1:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            seed = derived_seed(self._task_seed(self.network.num_tasks), self._passes)
            torch.manual_seed(derived_seed(seed, self.devices.rank))
            yield


def _overrides(plugin: Any, name: str) -> bool:
    """Whether a plugin does anything in a callback: whether it is not the empty one of its base class."""
    method = getattr(type(plugin), name, None)
    return method is not None and getattr(method, "__module__", "") != "avalanche.core"


def silent_evaluator() -> EvaluationPlugin:
    """An evaluator without metrics or loggers, and without the warning that it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EvaluationPlugin()
