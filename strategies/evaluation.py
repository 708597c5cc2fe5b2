"""What a strategy's model answers, without changing anything of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.models import avalanche_forward
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from lifelong_ens.training.loop import evaluating
from strategies.loader import evaluation_batches
from strategies.model import TaskModel, task_indices

TaskInference = Literal["entropy", "max_probability"]


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
    with evaluating(model):
        for experience in experiences:
            if isinstance(model, TaskModel) and not set(experience.task_labels) <= set(model.tasks):  # pyright: ignore
                return None
            for x, y, task_labels in evaluation_batches(experience.dataset, batch_size, strategy.device):  # pyright: ignore
                log_probs.append(torch.log_softmax(_answers(model, x, task_labels).float(), dim=-1).cpu())
                labels.append(y.cpu())
    return torch.cat(log_probs, dim=1), torch.cat(labels)


def infer_tasks(
    strategy: SupervisedTemplate, experience: CLExperience, rule: TaskInference, batch_size: int = 128
) -> tuple[float, float] | None:
    """Answer a task's images without being told the task: all tasks answer in one pass, the surest is believed.

    Args:
        strategy: One whose network is a ``TaskNetwork``.
        experience: Images of one task that has been learnt.
        rule: ``entropy``: the task whose prediction has the lowest entropy relative to a uniform one over its
            classes; ``max_probability``: the one with the most probable class.
        batch_size: Images per pass; every learnt task sees each.

    Returns:
        The share of images whose task is found, and the share whose task and class are right, both in [0, 1]; None
        where the network is not ours or has not learnt the task.
    """
    model = strategy.model
    (label,) = experience.task_labels  # pyright: ignore
    if not isinstance(model, TaskModel) or label not in model.tasks:
        return None
    network, own = model.network, model.tasks[label]
    classes = torch.tensor(network.classes_per_task, device=strategy.device)
    found = right = rows = 0
    with evaluating(model):
        for x, y, _ in evaluation_batches(experience.dataset, batch_size, strategy.device):  # pyright: ignore
            tasks = torch.arange(len(classes), device=x.device)
            logits = network(x.repeat(len(tasks), *[1] * (x.dim() - 1)), tasks.repeat_interleave(len(x)))
            log_probs = torch.log_softmax(logits.float(), dim=-1).unflatten(0, (len(tasks), len(x)))
            mine = _certainty(log_probs, classes, rule).argmax(dim=0) == own
            found += int(mine.sum())
            right += int((mine & (log_probs[own].argmax(dim=-1) == y)).sum())
            rows += len(y)
    return found / rows, right / rows


def _certainty(log_probs: Tensor, classes: Tensor, rule: TaskInference) -> Tensor:
    """How sure each task is of each image, ``(tasks, batch)``, of ``(tasks, batch, classes)`` padded with -inf."""
    if rule == "max_probability":
        return log_probs.max(dim=-1).values
    entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
    # a task of one class is always sure, and says nothing
    uniform = classes.clamp(min=2).log().unsqueeze(1)
    return -entropy / uniform


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
