"""The training loop: steps of one optimisation, epochs of batches, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError, NonFiniteLossError
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.sharing import Sharing

Batch = TypeVar("Batch")


class Optimisation:
    """Optimizer, schedule, clipping and precision of one training; a fresh one for every task.

    Args:
        groups: Parameter groups in torch's form; ``lr`` and ``weight_decay`` in a group win over ``fit``.
        fit: How to train.
        steps_per_epoch: Batches in one epoch; the schedule moves at every step.
        epochs: Epochs of this training; None for those of ``fit``.
        before_update: Called at every step when the gradients are there, before anything is done with them.
        sharing: Where the rows of a step are computed on several devices or in several parts.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        fit: Fit,
        steps_per_epoch: int,
        epochs: int | None = None,
        before_update: Callable[[], object] | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        parameter_groups = [dict(group) for group in groups]
        options: dict[str, Any] = {"lr": fit.learning_rate, "weight_decay": fit.weight_decay}
        if fit.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameter_groups, momentum=fit.momentum, **options
            )
        else:
            kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
            self.optimizer = kinds[fit.optimizer](parameter_groups, **options)
        self.parameters = [parameter for group in parameter_groups for parameter in group["params"]]
        if fit.accumulate > 1 and sharing is None:
            raise InputError(
                "accumulate is for strategies over a stream alone: leave it out, or lower batch_size."
            )
        self.clip_norm, self.amp, self.before_update = fit.clip_norm, fit.amp, before_update
        self.sharing = sharing
        total = max(steps_per_epoch * (fit.epochs if epochs is None else epochs), 1)
        self.scheduler = None
        if fit.schedule != "constant" or fit.warmup_epochs:
            factor = _factor(fit, total, round(fit.warmup_epochs * steps_per_epoch))
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context for the forward pass: bfloat16 autocast or nothing, and norms over all devices."""
        precision = torch.autocast(device.type, torch.bfloat16) if self.amp else nullcontext()
        return precision if self.sharing is None else self.sharing.forward(precision)

    def step(self, loss: Tensor) -> None:
        """Backward, then ``update``; of a step in parts, with the last."""
        sharing = self.sharing
        if sharing is None or sharing.starts:
            # what zero_grad does, without its bookkeeping, which is 1 % of a small network's step
            for parameter in self.parameters:
                parameter.grad = None
        if sharing is not None:
            loss = sharing.weighed(loss)
        loss.backward()
        if sharing is None or sharing.ends:
            self.update()

    def update(self) -> None:
        """Clip the gradients that are there, move the parameters, move the schedule."""
        if self.sharing is not None:
            self.sharing.sum_gradients(self.parameters)
        if self.before_update is not None:
            self.before_update()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()


def _factor(fit: Fit, total: int, warmup: int) -> Callable[[int], float]:
    """The learning rate at a step relative to its start."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if fit.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(total - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return factor


def run_epoch(
    batches: Iterable[Batch],
    compute_loss: Callable[[Batch], Tensor],
    optimisation: Optimisation,
    losses: list[Tensor] | None = None,
) -> float:
    """One pass over the batches, a step for each; returns the mean loss.

    Args:
        batches: What the steps are made on.
        compute_loss: The loss of one of them.
        optimisation: What moves the parameters.
        losses: An empty list that is to have the losses so far, for whoever looks on.

    Raises:
        NonFiniteLossError: A loss was NaN or infinite; found at the end of the pass, so as not to wait for
            the device at every step.
    """
    losses = [] if losses is None else losses
    for batch in batches:
        loss = compute_loss(batch)
        optimisation.step(loss)
        losses.append(loss.detach())
    sharing = optimisation.sharing
    return mean_loss(losses if sharing is None else sharing.step_losses())


def mean_loss(losses: list[Tensor]) -> float:
    """The mean of an epoch's losses.

    Raises:
        NonFiniteLossError: Says which step was the first to be NaN or infinite.
    """
    if not losses:
        return math.nan
    stacked = torch.stack(losses)
    mean = float(stacked.mean())
    if not math.isfinite(mean) and not bool((finite := torch.isfinite(stacked)).all()):
        step = int((~finite).nonzero()[0]) + 1
        raise NonFiniteLossError(f"the loss is {stacked[step - 1].item()} at step {step} of {len(losses)}")
    return mean


class EarlyStopping:
    """Remembers the epoch with the best score and puts its weights back at the end.

    Args:
        network: What is trained; all its parameters and buffers are remembered by copy.
        patience: Epochs without a better score before it is time to stop.
    """

    def __init__(self, network: nn.Module, patience: int) -> None:
        self.network, self.patience = network, patience
        self.best, self.since = -math.inf, 0
        self.state: dict[str, Tensor] = {}

    def should_stop(self, score: float) -> bool:
        """Note the score of an epoch, higher is better; True when patience is at its end."""
        if score > self.best:
            self.best, self.since = score, 0
            self.state = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        else:
            self.since += 1
        return self.since >= self.patience

    def restore(self) -> None:
        """Put the best epoch's weights back, in place."""
        for name, tensor in self.network.state_dict().items():
            if name in self.state:
                tensor.copy_(self.state[name])


@contextmanager
def compiled(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Run these modules through ``torch.compile`` inside; code that like modules were compiled to is used again."""
    modules = list(parts)
    for module in modules:
        module.compile()
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module is in its own mode again afterwards."""
    in_training = [module for module in model.modules() if module.training]
    # with many tasks there are thousands of modules
    if in_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True
