"""Learning without forgetting: earlier heads go on answering as they did."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.task import MultiHead
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy


def lwf(
    body: nn.Module,
    *,
    lwf_lambda: float = 1.0,
    temperature: float = 2.0,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Learning without forgetting: on the new task's images, earlier heads are trained to answer as before the task.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        lwf_lambda: Weight of the distillation of each earlier head, at least 0; the paper's lambda_o.
        temperature: What logits are divided by before they are compared, above 0.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    if not lwf_lambda >= 0 or not temperature > 0:
        raise InputError(
            f"lwf_lambda is at least 0 and temperature above 0, not {lwf_lambda} and {temperature}."
        )
    strategy = LearningWithoutForgetting(
        network=MultiHead(body), fit=fit, seed=seed, device=device, plugins=plugins
    )
    strategy.strength, strategy.temperature = lwf_lambda, temperature
    return strategy


class LearningWithoutForgetting(Strategy):
    """Distillation of all earlier heads on the new task's images.

    Source: Li and Hoiem, ECCV 2016, arXiv 1606.09282, with temperature 2 as there; the sum over heads of the
    Kullback-Leibler divergence, whose gradient is that of the paper's cross entropy. Without the paper's warm-up of the
    new head.

    The teacher is a frozen copy of the network as it was before the task, in evaluation mode, which answers for every
    mini-batch. The paper records the answers once; that is cheaper, but wrong for images that are augmented anew in
    every epoch. The copy is there while a task is trained and nothing of it is kept, so the method stores no more than
    the network. The body runs once for all heads, in training mode: its running statistics follow the new task.

    Avalanche's ``LwFPlugin`` (0.6.0) leaves the teacher in training mode, so that dropout is active in it and BatchNorm
    normalises with the batch and moves its statistics; and it runs the student's body a second time.

    Attributes:
        strength: Weight of the distillation.
        temperature: Divides the logits.
    """

    network: MultiHead
    strength = 1.0
    temperature = 2.0

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task with the network as it is now as teacher."""
        present = {self.model.tasks[label] for label in self.experience.task_labels}  # pyright: ignore
        self._earlier = [task for task in range(self.network.num_tasks) if task not in present]
        if not self.strength:
            self._earlier = []
        self._teacher = copy.deepcopy(self.network).requires_grad_(False).eval() if self._earlier else None
        try:
            super().fit_task(validation)
        finally:
            self._teacher = None

    def penalty(self) -> Tensor | None:
        """The distillation loss of the mini-batch."""
        if self._teacher is None:
            return None
        losses = [
            distillation_loss(answer, wanted, self.temperature)
            for answer, wanted in zip(self._answers, self._wanted, strict=True)
        ]
        return self.strength * torch.stack(losses).sum()

    def _logits(self, x: Tensor) -> Tensor:
        """Logits of the images' own tasks; those of earlier heads, and the teacher's, are kept for ``penalty``."""
        features, heads = self.network.body(x), self.network.heads
        self._answers = [heads[earlier](features) for earlier in self._earlier]
        if self._teacher is not None:
            with torch.no_grad():
                known = self._teacher.body(x)
                self._wanted = [self._teacher.heads[task](known) for task in self._earlier]
        return heads(features, self._task())


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of ``logits`` from ``wanted``, both ``(batch, classes)``, in nats."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=1)
    targets = torch.log_softmax(wanted.float() / temperature, dim=1)
    return F.kl_div(log_probs, targets, reduction="batchmean", log_target=True)
