"""What a strategy's model answers, without changing anything of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from avalanche.benchmarks import CLExperience
from avalanche.models import avalanche_forward
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lifelong_ens.metrics.uncertainty import TaskInference, task_certainty
from lifelong_ens.training.devices import ALONE
from lifelong_ens.training.loop import evaluating
from strategies.loader import Batch, evaluation_batches
from strategies.model import TaskModel, task_indices

Answer = TypeVar("Answer")
# log-probabilities (members, images, classes) and labels (images,)
Answers = tuple[Tensor, Tensor]


def predict(
    strategy: SupervisedTemplate, experiences: Sequence[CLExperience], batch_size: int = 512
) -> Answers | None:
    """What the members of each image's task answer; nothing of the model changes.

    Returns:
        Log-probabilities ``(members, images, classes)`` and labels ``(images,)`` on the CPU; None where a task has
        not been learnt yet.
    """
    parts = predict_each(strategy, experiences, batch_size)
    if any(part is None for part in parts):
        return None
    log_probs, labels = zip(*(part for part in parts if part is not None), strict=True)
    return torch.cat(log_probs, dim=1), torch.cat(labels)


def predict_each(
    strategy: SupervisedTemplate, experiences: Sequence[CLExperience], batch_size: int = 512
) -> list[Answers | None]:
    """What ``predict`` says of each experience; the network is put into evaluation mode once for all."""
    model = strategy.model
    with evaluating(model):
        return [_answers(strategy, model, experience, batch_size) for experience in experiences]


def accuracies(strategy: SupervisedTemplate, experiences: Sequence[CLExperience]) -> list[float]:
    """Share of right answers in [0, 1] for each experience; NaN for a task that is not learnt yet."""
    return [_accuracy(answers) for answers in predict_each(strategy, experiences)]


def accuracy(strategy: SupervisedTemplate, experiences: Sequence[CLExperience]) -> float:
    """Share of right answers in [0, 1] over all images of the experiences; NaN for a task not learnt yet."""
    return _accuracy(predict(strategy, experiences))


def infer_tasks(
    strategy: SupervisedTemplate,
    experience: CLExperience,
    rule: TaskInference,
    classes: Sequence[Sequence[int]] | None = None,
) -> tuple[float, float] | None:
    """Answer a task's images without being told the task: all tasks answer, the surest is believed.

    Args:
        strategy: One whose network is a ``TaskNetwork``.
        experience: Images of one task that has been learnt.
        rule: As in ``task_certainty``.
        classes: As in ``shares_found``.

    Returns:
        The share of images whose task is found, and the share whose class is, both in [0, 1]; None where the network
        is not ours or has not learnt the task.
    """
    answers = predict(strategy, [experience])
    if answers is None or not isinstance(strategy.model, TaskModel):
        return None
    claims = claims_of(strategy, experience, rule, range(strategy.model.network.num_tasks))
    return shares_found(strategy, experience, claims, answers, classes)


class Claims(NamedTuple):
    """What each of several tasks says of each image, both ``(tasks, images)`` on the CPU.

    Attributes:
        certainty: How sure it is; higher is surer.
        label: The class it would answer, as a label of its own.
    """

    certainty: Tensor
    label: Tensor


def claims_of(
    strategy: SupervisedTemplate,
    experience: CLExperience,
    rule: TaskInference,
    tasks: Sequence[int],
    batch_size: int = 512,
) -> Claims:
    """What each of these tasks says of an experience's images."""
    model: Any = strategy.model
    batches = evaluation_batches(experience.dataset, batch_size, strategy.device)  # pyright: ignore

    def answer(x: Tensor, _: Tensor) -> Claims:
        logits = [model.network(x, task) for task in tasks]
        certainty = torch.stack([_certainty(one, rule) for one in logits])
        return Claims(certainty.cpu(), torch.stack([one.argmax(dim=-1) for one in logits]).cpu())

    with evaluating(model):
        parts = _ask(strategy, batches, answer)[0]
    return Claims(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def shares_found(
    strategy: SupervisedTemplate,
    experience: CLExperience,
    claims: Claims,
    answers: Answers,
    classes: Sequence[Sequence[int]] | None = None,
) -> tuple[float, float]:
    """The share of an experience's images whose task is found, and the share whose class is, in [0, 1].

    The surest task is believed. Where tasks have different classes, a class is right only if the task is
    (class-incremental learning); where they share classes, another task's answer is right if it is the image's class
    (domain-incremental learning): van de Ven & Tolias 2019, "Three scenarios for continual learning".

    Args:
        strategy: One whose network is a ``TaskNetwork``.
        experience: Images of one task that has been learnt.
        claims: What ``claims_of`` says of all tasks.
        answers: What ``predict`` says of the experience.
        classes: By task label the stream's own ids of its classes; None where no two tasks share one.
    """
    (label,) = experience.task_labels  # pyright: ignore
    index_of: dict[int, int] = strategy.model.tasks  # pyright: ignore
    found = claims.certainty.argmax(dim=0)
    mine = found == index_of[label]
    right = mine & _right(answers)
    if classes is not None:
        # (classes, tasks), tasks in the order of the network's
        ids = pad_sequence([torch.tensor(classes[one]) for one in sorted(index_of, key=index_of.__getitem__)])
        answered = claims.label.gather(0, found.unsqueeze(0))[0]
        right |= ~mine & (ids[answered, found] == ids[answers[1], index_of[label]])
    return float(mine.double().mean()), float(right.double().mean())


def _certainty(logits: Tensor, rule: TaskInference) -> Tensor:
    """How sure a task is of each image, ``(batch,)``, of ``(batch, classes)``."""
    log_probs = torch.log_softmax(logits.float(), dim=-1).unsqueeze(0)
    classes = torch.tensor([logits.shape[-1]], device=logits.device)
    return task_certainty(log_probs, classes, rule)[0]


def _accuracy(answers: Answers | None) -> float:
    return float("nan") if answers is None else float(_right(answers).double().mean())


def _right(answers: Answers) -> Tensor:
    """Whether each image is answered right by the mean of the members' probabilities, ``(images,)``."""
    log_probs, labels = answers
    return log_probs.exp().mean(dim=0).argmax(dim=-1) == labels


def _answers(
    strategy: SupervisedTemplate, model: nn.Module, experience: CLExperience, batch_size: int
) -> Answers | None:
    if isinstance(model, TaskModel) and not set(experience.task_labels) <= set(model.tasks):  # pyright: ignore
        return None
    batches = evaluation_batches(experience.dataset, batch_size, strategy.device)  # pyright: ignore

    def answer(x: Tensor, task_labels: Tensor) -> Tensor:
        return torch.log_softmax(_logits(model, x, task_labels).float(), dim=-1).cpu()

    log_probs, labels = _ask(strategy, batches, answer)
    return torch.cat(log_probs, dim=1), torch.cat(labels)


def _ask(
    strategy: SupervisedTemplate, batches: Iterable[Batch], answer: Callable[[Tensor, Tensor], Answer]
) -> tuple[list[Answer], list[Tensor]]:
    """What is answered, on the CPU, to the images and task labels of each batch; and the labels of its classes.

    On several devices each answers some of the batches, and all of them know the answers.
    """
    devices = getattr(strategy, "devices", ALONE)
    answers, labels = [], []
    for index, (x, y, task_labels) in enumerate(batches):
        if index % devices.count == devices.rank:
            answers.append(answer(x, task_labels))
        labels.append(y.cpu())
    return devices.interleaved(answers), labels


def _logits(model: nn.Module, x: Tensor, task_labels: Tensor) -> Tensor:
    """Member logits ``(members, batch, classes)`` of any strategy's model; one member where it has no members."""
    if isinstance(model, TaskModel):
        label = task_labels.unique().tolist()
        task = model.tasks[label[0]] if len(label) == 1 else task_indices(task_labels, model.tasks)
        return model.network.member_logits(x, task)
    return avalanche_forward(model, x, task_labels).unsqueeze(0)
