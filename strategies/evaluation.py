"""What a strategy's model answers, without changing anything of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from avalanche.benchmarks import CLExperience
from avalanche.models import avalanche_forward
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from strategies.loader import evaluation_batches
from strategies.model import TaskModel, task_indices


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
            for x, y, task_labels in evaluation_batches(experience.dataset, batch_size, strategy.device):  # pyright: ignore
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
        task = model.tasks[label[0]] if len(label) == 1 else task_indices(task_labels, model.tasks)
        return model.network.member_logits(x, task)
    return avalanche_forward(model, x, task_labels).unsqueeze(0)
